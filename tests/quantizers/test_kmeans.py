"""k-means and dead codes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.kmeans import dead_codes, kmeans, revive_dead_codes
from repalign.quantizers.vector import CodebookStatistics
from repalign.registry import UserError


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_separated_clusters_are_found(distance):
    centers = jnp.asarray([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]])
    x = jnp.repeat(centers, 30, axis=0) + 0.1 * jax.random.normal(jax.random.key(0), (90, 2))
    cluster = jax.jit(
        partial(kmeans, num_codes=3, iterations=5, distance=distance, initialization="plus_plus")
    )
    result = cluster(jax.random.key(1), x)
    np.testing.assert_array_equal(result.statistics.cluster_size, 30.0)
    order = np.argsort(np.arctan2(result.codebook[:, 1], result.codebook[:, 0]))
    expected = np.asarray(centers)[[2, 0, 1]]
    if distance == "cosine":
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(np.linalg.norm(result.codebook, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(result.codebook[order], expected, atol=0.1)


def test_inertia_falls_and_empty_codes_stay():
    def cluster(x, num_codes, iterations):
        run = jax.jit(partial(kmeans, num_codes=num_codes, iterations=iterations))
        return run(jax.random.key(1), x)

    x = jax.random.normal(jax.random.key(0), (60, 3))
    assert cluster(x, 5, 4).inertia < 0.9 * cluster(x, 5, 1).inertia
    # 20 vectors at 4 places and 30 codes: every code is still a vector, no NaN from an empty one.
    x = jnp.repeat(x[:4], 5, axis=0)
    result = cluster(x, 30, 2)
    distances = np.min(np.sum(np.square(result.codebook[:, None] - x), axis=2), axis=1)
    np.testing.assert_allclose(distances, 0.0, atol=1e-10)
    assert jnp.sum(result.statistics.cluster_size) == 20


def test_revival_takes_distinct_vectors_and_resets_statistics():
    codebook = jnp.zeros((6, 2))
    sizes = jnp.asarray([0.0, 5.0, 0.5, 3.0, 0.0, 1.9])
    statistics = CodebookStatistics(sizes, jnp.ones((6, 2)))
    z = jnp.arange(1.0, 17.0).reshape(2, 4, 2)
    revive = jax.jit(partial(revive_dead_codes, threshold=2.0, reset_size=4.0))
    dead = np.asarray(dead_codes(statistics, threshold=2.0))
    np.testing.assert_array_equal(dead, [True, False, True, False, True, True])
    updated, after = revive(jax.random.key(0), codebook, statistics, z)
    rows = {tuple(row) for row in np.asarray(z).reshape(-1, 2)}
    revived = [tuple(row) for row in np.asarray(updated)[dead]]
    assert set(revived) <= rows and len(set(revived)) == 4
    np.testing.assert_array_equal(updated[~dead], 0.0)
    np.testing.assert_array_equal(after.cluster_size, np.where(dead, 4.0, sizes))
    np.testing.assert_array_equal(after.embed_avg[dead], 4.0 * updated[dead])
    # Fewer vectors than dead codes: one of each vector, the rest wait.
    updated, after = revive(jax.random.key(0), codebook, statistics, z[0, :3])
    assert np.sum(np.any(np.asarray(updated) != 0, axis=1)) == 3
    assert np.sum(np.asarray(after.cluster_size) == 4.0) == 3
    empty, _ = revive_dead_codes(jax.random.key(0), codebook, statistics, z[:, :0])
    np.testing.assert_array_equal(empty, codebook)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="0 vectors"):
        kmeans(jax.random.key(0), jnp.zeros((0, 2)), num_codes=2)
    with pytest.raises(UserError, match="plus_plus"):
        kmeans(jax.random.key(0), jnp.zeros((3, 2)), num_codes=2, initialization="pp")
