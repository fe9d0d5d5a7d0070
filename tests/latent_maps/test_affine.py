import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from repalign.latent_maps.affine import least_squares


def pairs(count: int, source_dim: int, target_dim: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    source = rng.normal(size=(count, source_dim)) + 2.0
    target = source @ rng.normal(size=(source_dim, target_dim)) - 1.0
    return source, target + 0.1 * rng.normal(size=target.shape)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_agrees_with_scikit_learn(l2):
    source, target = pairs(40, 7, 4)
    model = Ridge(alpha=40 * l2) if l2 else LinearRegression()
    model.fit(source, target)
    fitted = least_squares(jnp.asarray(source), jnp.asarray(target), l2=l2)
    np.testing.assert_allclose(fitted.matrix, model.coef_.T, rtol=1e-4, atol=1e-5)
    new = source[:5] + 0.5
    np.testing.assert_allclose(fitted(jnp.asarray(new)), model.predict(new), rtol=1e-4, atol=1e-5)


def test_fewer_pairs_than_dimensions_gives_the_minimum_norm_map():
    source, target = pairs(6, 12, 3)
    fitted = least_squares(jnp.asarray(source), jnp.asarray(target))
    centered = source - source.mean(axis=0)  # rank 5: one direction is rounding noise
    expected = np.linalg.pinv(centered, rcond=1e-6) @ (target - target.mean(axis=0))
    np.testing.assert_allclose(fitted.matrix, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fitted(jnp.asarray(source)), target, atol=1e-4)


def test_constant_source_predicts_the_mean():
    fitted = least_squares(jnp.ones((5, 3)), jnp.arange(10.0).reshape(5, 2))
    np.testing.assert_allclose(fitted(jnp.zeros((1, 3))), [[4.0, 5.0]])


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="negative"):
        least_squares(jnp.ones((3, 2)), jnp.ones((3, 2)), l2=-1.0)
