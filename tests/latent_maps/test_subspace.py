import jax.numpy as jnp
import numpy as np
import pytest

from repalign.latent_maps.subspace import canonical_subspaces


def two_views(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy linear views of the same three sources."""
    rng = np.random.default_rng(0)
    sources = rng.normal(size=(count, 3))
    a = sources @ rng.normal(size=(3, 6)) + 0.5 * rng.normal(size=(count, 6)) + 4.0
    b = sources @ rng.normal(size=(3, 5)) + 0.5 * rng.normal(size=(count, 5))
    return a, b


def eigenvalue_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The textbook form: eigenvalues of C_aa^-1 C_ab C_bb^-1 C_ba."""
    joint = np.cov(np.concatenate([a, b], axis=1), rowvar=False)
    dim = a.shape[1]
    aa, bb, ab = joint[:dim, :dim], joint[dim:, dim:], joint[:dim, dim:]
    values = np.linalg.eigvals(np.linalg.solve(aa, ab) @ np.linalg.solve(bb, ab.T))
    return np.sqrt(np.sort(np.maximum(values.real, 0.0))[::-1])


def test_correlations_agree_with_the_eigenvalue_form_and_variables_are_canonical():
    a, b = two_views(80)
    found = canonical_subspaces(jnp.asarray(a), jnp.asarray(b), components=4)
    np.testing.assert_allclose(found.correlations, eigenvalue_correlations(a, b)[:4], rtol=1e-4)
    joint = np.cov(
        np.concatenate([found.from_a(jnp.asarray(a)), found.from_b(jnp.asarray(b))], axis=1),
        rowvar=False,
    )
    np.testing.assert_allclose(joint[:4, :4], np.eye(4), atol=1e-4)
    np.testing.assert_allclose(joint[4:, 4:], np.eye(4), atol=1e-4)
    np.testing.assert_allclose(joint[:4, 4:], np.diag(found.correlations), atol=1e-4)


def test_principal_directions_are_taken_first():
    a, b = two_views(80)
    found = canonical_subspaces(jnp.asarray(a), jnp.asarray(b), components=2, principal=3)

    def leading(x: np.ndarray) -> np.ndarray:
        return np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[0][:, :3]

    expected = eigenvalue_correlations(leading(a), leading(b))[:2]
    np.testing.assert_allclose(found.correlations, expected, rtol=1e-4)


def test_directions_without_variance_do_not_count():
    a, b = two_views(40)
    repeated = np.concatenate([b, b], axis=1)
    found = canonical_subspaces(jnp.asarray(a), jnp.asarray(repeated), components=6)
    expected = eigenvalue_correlations(a, b)[:5]
    np.testing.assert_allclose(found.correlations[:5], expected, rtol=1e-3)
    assert found.correlations[5] < 1e-5
    assert np.all(np.isfinite(found.from_b.matrix))


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="principal <= 3"):
        canonical_subspaces(jnp.ones((4, 5)), jnp.ones((4, 5)), components=4)
