import jax.numpy as jnp
import numpy as np
from sklearn.metrics import average_precision_score

from repalign.metrics import retrieval


def test_match_ranks_count_better_items_and_earlier_ties():
    gallery = jnp.array([[1.0], [3.0], [2.0], [3.0], [0.0]])
    queries = jnp.ones((5, 1))
    np.testing.assert_array_equal(retrieval.match_ranks(queries, gallery), [4, 1, 3, 2, 5])
    targets = jnp.array([3, 3])
    np.testing.assert_array_equal(retrieval.match_ranks(queries[:2], gallery, targets), [2, 2])


def test_recall_and_reciprocal_rank_of_random_pairs():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(40, 6))
    gallery = queries + rng.normal(size=(40, 6))
    ranks = retrieval.match_ranks(jnp.asarray(queries), jnp.asarray(gallery))
    scores = queries @ gallery.T
    expected = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(ranks, expected)
    np.testing.assert_allclose(retrieval.recall_at_k(ranks, k=5), np.mean(expected <= 5))
    np.testing.assert_allclose(
        retrieval.mean_reciprocal_rank(ranks), np.mean(1.0 / expected), rtol=1e-6
    )


def test_average_precision_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(12.0), (6, 1)), axis=1)
    relevant = rng.uniform(size=(6, 12)) < 0.4
    relevant[0] = False
    measured = retrieval.average_precision(jnp.asarray(scores), jnp.asarray(relevant))
    expected = [average_precision_score(relevant[i], scores[i]) for i in range(1, 6)]
    np.testing.assert_allclose(measured[1:], expected, rtol=1e-5)
    assert measured[0] == 0.0


def test_label_retrieval_on_a_worked_example():
    # Unit vectors by angle; the neighbours of 0 in order: 1, 2, 3, 4.
    angles = jnp.deg2rad(jnp.array([0.0, 10.0, 25.0, 60.0, 170.0]))
    embeddings = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    labels = jnp.array([0, 1, 0, 0, 2])
    np.testing.assert_array_equal(
        retrieval.label_recall_at_k(embeddings, labels, k=1), [0.0, 0.0, 0.0, 1.0, 0.0]
    )
    np.testing.assert_array_equal(
        retrieval.label_recall_at_k(embeddings, labels, k=2), [1.0, 0.0, 1.0, 1.0, 0.0]
    )
    # R = 2 for label 0. Queries 0 and 2 have their first hit at place 2: (1/2) / 2. Query 3 has it
    # at place 1 and the other past R: 1 / 2. Labels 1 and 2 have no other example.
    np.testing.assert_allclose(
        retrieval.map_at_r(embeddings, labels), [0.25, 0.0, 0.25, 0.5, 0.0], rtol=1e-6
    )


def test_neighbor_jaccard_is_the_overlap_of_two_sets_of_neighbors():
    rng = np.random.default_rng(3)
    queries, gallery = rng.normal(size=(2, 30, 5)).astype(np.float32)
    own = np.argsort(-gallery @ gallery.T, axis=1)[:, :4]
    found = np.argsort(-queries @ gallery.T, axis=1)[:, :4]
    expected = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(own, found, strict=True)]
    measured = retrieval.neighbor_jaccard(jnp.asarray(queries), jnp.asarray(gallery), k=4)
    np.testing.assert_allclose(measured, expected, rtol=1e-6)
    same = retrieval.neighbor_jaccard(jnp.asarray(gallery), jnp.asarray(gallery), k=4)
    np.testing.assert_array_equal(same, 1.0)
