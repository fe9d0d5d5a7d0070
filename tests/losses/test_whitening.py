import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import whitening
from repalign.registry import UserError

RNG = np.random.default_rng(4)
MIX = np.diag([3.0, 2.0, 1.0, 0.5]) @ np.linalg.qr(RNG.normal(size=(4, 4)))[0]
A = (RNG.normal(size=(12, 4)) @ MIX + 3).astype(np.float32)
B = (RNG.normal(size=(12, 4)) @ MIX - 1).astype(np.float32)
WHERE = np.arange(12) % 3 > 0


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def cosine(x, y):
    return np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def cholesky_whitened(x, epsilon):
    matrix = (1 - epsilon) * np.cov(x.T) + epsilon * np.eye(4)
    return (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(matrix)).T


def newton_schulz_whitened(x, iterations):
    """The published update, in float64."""
    x = x.astype(np.float64)
    covariance = np.cov(x.T)
    trace = np.trace(covariance)
    p = np.eye(len(covariance))
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * np.linalg.matrix_power(p, 3) @ covariance / trace
    return (x - x.mean(0)) @ p / np.sqrt(trace)


def test_cholesky_whitening_gives_the_identity_covariance():
    white = run(whitening.cholesky_whiten, jnp.asarray(A), epsilon=0.0)
    np.testing.assert_allclose(np.cov(white.T), np.eye(4), atol=2e-5)
    shrunk = run(whitening.cholesky_whiten, jnp.asarray(A), epsilon=0.1)
    np.testing.assert_allclose(shrunk, cholesky_whitened(A, 0.1), rtol=1e-4, atol=1e-5)


def test_w_mse_by_hand_and_masked():
    expected = 2 - 2 * cosine(cholesky_whitened(A, 0.01), cholesky_whitened(B, 0.01))
    result = run(whitening.w_mse, jnp.asarray(A), jnp.asarray(B), epsilon=0.01)
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    poisoned = jnp.asarray(np.where(WHERE[:, None], A, np.nan))
    masked = run(whitening.w_mse, poisoned, jnp.asarray(B), where=jnp.asarray(WHERE))
    alone = run(whitening.w_mse, jnp.asarray(A[WHERE]), jnp.asarray(B[WHERE]))
    np.testing.assert_allclose(masked[WHERE], alone, rtol=1e-4)
    np.testing.assert_allclose(masked[~WHERE], 0.0)


def test_iterative_whitening_is_the_published_iteration():
    for iterations in (1, 4):
        result = run(whitening.iterative_whiten, jnp.asarray(A), iterations=iterations)
        np.testing.assert_allclose(
            result, newton_schulz_whitened(A, iterations), rtol=1e-4, atol=1e-5
        )


def test_iterative_whitening_stays_stable_where_the_published_form_diverges():
    scales = np.float32([5.0, 2.0, 1.0, 0.2])
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0].astype(np.float32)
    x = np.linalg.qr(RNG.normal(size=(40, 5)))[0][:, :4].astype(np.float32)
    x = (x - x.mean(0)) * 6 * scales @ rotation
    result = run(whitening.iterative_whiten, jnp.asarray(x), iterations=25)
    np.testing.assert_allclose(np.cov(result.T), np.eye(4), atol=2e-3)
    covariance = np.cov(x.T).astype(np.float32)
    covariance /= np.trace(covariance)
    p = np.eye(4, dtype=np.float32)
    with np.errstate(all="ignore"):
        for _ in range(25):
            p = np.float32(1.5) * p - np.float32(0.5) * p @ p @ p @ covariance
    error = np.abs(p @ covariance @ p - np.eye(4)).max()
    assert not error < 0.1


def trace_loss(x):
    return np.sum((np.var(x, axis=0, ddof=1) - 1) ** 2)


def test_trace_loss_by_hand():
    result = run(whitening.trace_loss, jnp.asarray(A))
    np.testing.assert_allclose(result, trace_loss(A.astype(np.float64)), rtol=2e-5)


@pytest.mark.parametrize("kind", ["batch", "channel"])
def test_intl_by_hand_and_masked(kind):
    def reference(a, b, trade_off):
        if kind == "batch":
            a, b = newton_schulz_whitened(a, 3), newton_schulz_whitened(b, 3)
            penalty = trace_loss(a) + trace_loss(b)
        else:
            a, b = newton_schulz_whitened(a.T, 3).T, newton_schulz_whitened(b.T, 3).T
            penalty = trace_loss(a.T) + trace_loss(b.T)
        return np.mean(2 - 2 * cosine(a, b)) + trade_off * penalty

    loss = functools.partial(whitening.intl, iterations=3, whitening=kind)
    result = run(loss, jnp.asarray(A), jnp.asarray(B), trade_off=0.4)
    np.testing.assert_allclose(result, reference(A, B, 0.4), rtol=1e-4)
    # The default weight is 0.01 (log2 n - 3): 4 dimensions, or the 8 examples that are kept.
    poisoned = jnp.asarray(np.where(WHERE[:, None], A, np.nan))
    masked = run(loss, poisoned, jnp.asarray(B), where=jnp.asarray(WHERE))
    weight = -0.01 if kind == "batch" else 0.0
    np.testing.assert_allclose(masked, reference(A[WHERE], B[WHERE], weight), rtol=1e-4)


def test_intl_names_the_kinds_of_whitening():
    with pytest.raises(UserError, match="Valid: batch, channel"):
        whitening.intl(jnp.asarray(A), jnp.asarray(B), whitening="zca")
