import functools

import jax
import jax.numpy as jnp
import numpy as np

from repalign.losses import correlation

RNG = np.random.default_rng(8)
A = (RNG.normal(size=(20, 3)) + 2).astype(np.float32)
B = np.concatenate([A + RNG.normal(size=(20, 3)), RNG.normal(size=(20, 2))], 1).astype(np.float32)
WHERE = np.arange(20) % 4 > 0


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def cka(a, b):
    """By centred Gram matrices of the examples, the other form of the index."""
    center = np.eye(len(a)) - 1 / len(a)
    gram_a, gram_b = center @ a @ a.T @ center, center @ b @ b.T @ center
    return np.sum(gram_a * gram_b) / np.sqrt(np.sum(gram_a**2) * np.sum(gram_b**2))


def canonical_correlations(a, b):
    """Cosines of the principal angles between the centred column spaces."""
    q_a, q_b = (np.linalg.qr(x - x.mean(0))[0] for x in (a, b))
    return np.linalg.svd(q_a.T @ q_b, compute_uv=False)


def test_cka_loss_by_gram_matrices():
    result = run(correlation.cka_loss, jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_allclose(result, 1 - cka(A, B), rtol=1e-4)
    poisoned = jnp.asarray(np.where(WHERE[:, None], A, np.nan))
    masked = run(correlation.cka_loss, poisoned, jnp.asarray(B), where=jnp.asarray(WHERE))
    np.testing.assert_allclose(masked, 1 - cka(A[WHERE], B[WHERE]), rtol=1e-4)


def test_cka_ignores_rotation_and_scale():
    rotation = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    turned = jnp.asarray(1e3 * A @ rotation, jnp.float32)
    np.testing.assert_allclose(run(correlation.cka_loss, jnp.asarray(A), turned), 0.0, atol=1e-5)


def test_cca_loss_by_principal_angles():
    result = run(correlation.cca_loss, jnp.asarray(A), jnp.asarray(B), regularization=1e-6)
    np.testing.assert_allclose(result, -canonical_correlations(A, B).sum(), rtol=1e-4)
    mixed = jnp.asarray(A @ RNG.normal(size=(3, 3)), jnp.float32)
    same = run(correlation.cca_loss, jnp.asarray(A), mixed, regularization=1e-6)
    np.testing.assert_allclose(same, -3.0, rtol=1e-3)
