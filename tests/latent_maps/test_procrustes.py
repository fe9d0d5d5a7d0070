import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from repalign.latent_maps.procrustes import orthogonal_procrustes


def points(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim))


def test_agrees_with_scipy():
    source, target = points(30, 5, 0), points(30, 5, 1)
    rotation, total = scipy.linalg.orthogonal_procrustes(source, target)
    arrays = (jnp.asarray(source), jnp.asarray(target))
    fitted = orthogonal_procrustes(*arrays, center=False)
    np.testing.assert_allclose(fitted.matrix, rotation, atol=1e-5)
    scaled = orthogonal_procrustes(*arrays, center=False, scale=True)
    np.testing.assert_allclose(scaled.matrix, rotation * total / np.square(source).sum(), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_recovers_a_rigid_motion_with_a_reflection(scale):
    source = points(20, 4, 0)
    rotation = scipy.stats.ortho_group.rvs(4, random_state=0)
    rotation[:, 0] *= -np.linalg.det(rotation)  # determinant -1
    target = scale * source @ rotation + np.arange(4)
    fitted = orthogonal_procrustes(jnp.asarray(source), jnp.asarray(target), scale=scale != 1.0)
    np.testing.assert_allclose(fitted.matrix, scale * rotation, atol=1e-4)
    np.testing.assert_allclose(fitted(jnp.asarray(source)), target, atol=1e-4)


def test_into_a_wider_space_keeps_distances():
    source = points(20, 3, 0)
    target = np.concatenate([source[:, ::-1], np.zeros((20, 2))], axis=1)
    fitted = orthogonal_procrustes(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(fitted.matrix @ fitted.matrix.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(fitted(jnp.asarray(source)), target, atol=1e-5)
