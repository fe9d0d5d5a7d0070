import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import KDTree
from sklearn.metrics.pairwise import cosine_similarity

from repalign.metrics import geometry
from repalign.registry import UserError


@pytest.mark.parametrize("estimator", geometry.ESTIMATORS)
@pytest.mark.parametrize("dimension", [2, 5])
def test_two_nn_finds_the_dimension_of_an_embedded_cube(estimator, dimension):
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(1500, dimension)) @ rng.normal(size=(dimension, 12))
    measured = geometry.two_nn_dimension(jnp.asarray(points), estimator=estimator)
    np.testing.assert_allclose(measured, dimension, rtol=0.15)
    distances = KDTree(points).query(points, k=3)[0]
    log_ratios = np.sort(np.log(distances[:, 2] / distances[:, 1]))
    if estimator == "maximum_likelihood":
        expected = 1.0 / log_ratios.mean()
    else:
        survival = -np.log(1.0 - np.arange(1, 1351) / 1500)
        expected = (log_ratios[:1350] @ survival) / np.square(log_ratios[:1350]).sum()
    np.testing.assert_allclose(measured, expected, rtol=1e-3)


def test_two_nn_regression_without_discarding_leaves_out_the_infinite_point():
    points = np.random.default_rng(0).normal(size=(40, 3))
    distances = KDTree(points).query(points, k=3)[0]
    log_ratios = np.sort(np.log(distances[:, 2] / distances[:, 1]))[:39]
    survival = -np.log(1.0 - np.arange(1, 40) / 40)
    measured = geometry.two_nn_dimension(jnp.asarray(points), discard=0.0)
    expected = (log_ratios @ survival) / np.square(log_ratios).sum()
    np.testing.assert_allclose(measured, expected, rtol=1e-3)


def test_two_nn_leaves_duplicates_out():
    points = jax.random.normal(jax.random.key(0), (60, 3))
    # Both copies of a duplicated point lose their ratio, whatever the rest is.
    repeated = jnp.concatenate([points, 100.0 + jnp.zeros((4, 3))])
    for estimator in geometry.ESTIMATORS:
        np.testing.assert_allclose(
            geometry.two_nn_dimension(repeated, estimator=estimator),
            geometry.two_nn_dimension(points, estimator=estimator),
            rtol=1e-3,
        )


def test_isotropy_is_one_for_a_symmetric_set_and_small_for_a_cone():
    axes = jnp.concatenate([jnp.eye(4), -jnp.eye(4)])
    np.testing.assert_allclose(geometry.isotropy(axes), 1.0, rtol=1e-5)
    cone = 3.0 * jnp.array([1.0, 0.0, 0.0]) + 0.1 * jax.random.normal(jax.random.key(0), (50, 3))
    assert geometry.isotropy(cone) < 0.01


def test_average_cosine_is_the_mean_over_pairs():
    features = np.random.default_rng(0).normal(size=(20, 5)) + 0.5
    cosines = cosine_similarity(features)[np.triu_indices(20, k=1)]
    np.testing.assert_allclose(
        geometry.average_cosine(jnp.asarray(features)), cosines.mean(), rtol=1e-4
    )


def test_modality_gap():
    a, b = jnp.array([[2.0, 0.0], [5.0, 0.0]]), jnp.array([[0.0, -1.0]])
    np.testing.assert_allclose(geometry.modality_gap(a, b), np.sqrt(2.0), rtol=1e-6)
    np.testing.assert_allclose(geometry.modality_gap(a, -a), 2.0, rtol=1e-6)


def test_mistakes_are_named():
    points = jnp.ones((5, 2))
    with pytest.raises(UserError, match="maximum_likelihood, regression"):
        geometry.two_nn_dimension(points, estimator="mean")
    with pytest.raises(ValueError, match="discard = 1.0"):
        geometry.two_nn_dimension(points, discard=1.0)
