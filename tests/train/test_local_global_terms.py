import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses.mutual_information import local_global_nce
from repalign.registry import UserError
from repalign.train.local_global_terms import local_global, one_location

KEY = jax.random.key(5)
DRAWS = jax.random.normal(jax.random.key(0), (2, 4, 2, 3, 5))
FEATURES = {
    "a/vector": DRAWS[0, :, 0, 0],
    "b/vector": DRAWS[1, :, 1, 2],
    "a/map": DRAWS[0],
    "b/map": DRAWS[1],
}


def loss(*pairs, **fields):
    return local_global(pairs=pairs, **fields).apply({}, {}, FEATURES, KEY)


def test_pairs_add_up_with_the_penalty_of_their_scores():
    output = loss(("a/vector", "b/map"), ("b/vector", "a/vector"), score_clip=5.0)
    maps = local_global_nce(FEATURES["a/vector"], DRAWS[1].reshape(4, 6, 5), score_clip=5.0)
    one = local_global_nce(FEATURES["b/vector"], FEATURES["a/vector"][:, None], score_clip=5.0)
    penalty = maps.score_penalty + one.score_penalty
    np.testing.assert_allclose(output.loss, maps.loss + one.loss + 0.04 * penalty, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["squared_score"], penalty.mean() / 2, rtol=1e-5)
    without = loss(("a/vector", "b/map"), score_clip=5.0, score_penalty=0.0)
    np.testing.assert_allclose(without.loss, maps.loss, rtol=1e-5)


def test_a_map_that_predicts_gives_one_vector_of_each_image():
    found = np.stack([one_location(key, DRAWS[0]) for key in jax.random.split(KEY, 40)])
    rows = np.asarray(DRAWS[0]).reshape(4, 6, 5)
    same = (found[:, :, None] == rows).all(axis=-1)  # draws, images, places
    np.testing.assert_array_equal(same.sum(axis=2), 1)
    assert np.all(same.any(axis=0).sum(axis=1) >= 5)  # nearly all places are drawn
    assert np.any(same[:, 0].argmax(axis=1) != same[:, 1].argmax(axis=1))  # by each image alone
    chosen = one_location(jax.random.fold_in(KEY, 0), DRAWS[0])
    expected = local_global_nce(chosen, DRAWS[1].reshape(4, 6, 5), score_clip=20.0)
    output = loss(("a/map", "b/map"), score_penalty=0.0)
    np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-5)


def test_both_features_learn():
    def mean(features):
        term = local_global(pairs=(("a/vector", "b/map"),))
        return jnp.mean(term.apply({}, {}, features, KEY).loss)

    gradients = jax.grad(mean)(FEATURES)
    assert np.any(gradients["a/vector"]) and np.any(gradients["b/map"])
    assert not np.any(gradients["a/map"])


def test_no_pairs_are_refused():
    with pytest.raises(UserError, match=r"objective\.dim\.pairs: .*at least one pair"):
        local_global(pairs=(), name="dim")
