"""Whitening of a batch of embeddings, and the joint-embedding losses built on it."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import (
    centered,
    cholesky_factor,
    covariance,
    keep,
    smaller_gram,
    zero_masked,
)
from repalign.numerics import cosine_similarity, masked_mean
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Bool, Float, Num, Scalar


def cholesky_whiten(
    x: Num[Array, "batch dim"],
    *,
    epsilon: ArrayLike = 1e-4,
    where: Bool[Array, "batch"] | None = None,
) -> Float[Array, "batch dim"]:
    """Whitens the centred batch with the inverse Cholesky factor of its covariance.

    The covariance is first shrunk to ``(1 - epsilon) C + epsilon I`` (and, where rounding leaves
    that without a factor, increased by its rounding error). Masked rows come out as 0.

    Source: htdt/self-supervised@d9662c8:methods/whitening.py:20-47. Deviation: the released
    configuration has epsilon 0, which fails (NaN) for batches of no more than ``dim`` examples.
    """
    x, _ = centered(x, where)
    matrix = covariance(x, where)
    factor = cholesky_factor((1.0 - epsilon) * matrix + epsilon * jnp.eye(x.shape[1]))
    return jax.scipy.linalg.solve_triangular(factor, x.T, lower=True).T


def iterative_whiten(
    x: Num[Array, "batch dim"],
    *,
    iterations: int = 4,
    where: Bool[Array, "batch"] | None = None,
) -> Float[Array, "batch dim"]:
    """IterNorm: multiplies the centred batch by a Newton-Schulz approximation of ``C^-1/2``.

    With ``S = C / tr C``: ``Y_0 = S, Z_0 = I, T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z``, and the
    result is ``x Z / sqrt(tr C)``. Few iterations whiten the large directions only: 4 is the
    published setting and is meant to be partial. Masked rows come out as 0; a constant batch
    gives 0.

    Source: Huang et al. (arXiv:1904.03441); winci-ai/INTL@0aa69af:
    methods/whitening.py:49-60. Deviation: the coupled form. The published one,
    ``P <- (3 P - P^3 S) / 2``, is equal in exact arithmetic but unstable: in float32 it diverges
    after about ten iterations at a condition number of 25.
    """
    x, count = centered(x, where)
    # x f(x^T x) = f(x x^T) x for a polynomial f: the smaller of the two matrices does.
    few_examples = x.shape[0] < x.shape[1]
    matrix = smaller_gram(x) / jnp.maximum(count - 1.0, 1.0)
    trace = jnp.trace(matrix)
    inverse_trace = jnp.where(trace > 0, 1.0 / jnp.where(trace > 0, trace, 1.0), 0.0)
    identity = jnp.eye(matrix.shape[0], dtype=x.dtype)

    def product(a, b):
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    y, z = matrix * inverse_trace, identity
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * product(z, y)
        y, z = product(y, step), product(step, z)
    # The inner where keeps the derivative of sqrt finite for a constant batch.
    scale = jnp.where(trace > 0, jnp.sqrt(jnp.where(trace > 0, inverse_trace, 1.0)), 0.0)
    return (product(z, x) if few_examples else product(x, z)) * scale


def w_mse(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    epsilon: ArrayLike = 1e-4,
    where: Bool[Array, "batch"] | None = None,
) -> Float[Array, "batch"]:
    """W-MSE: ``2 - 2 cos(white a_i, white b_i)`` per example, in [0, 4].

    Each view is whitened over the batch on its own (``cholesky_whiten``); gradients flow through
    the whitening. Masked examples have value 0 and pass no gradient.

    Source: Ermolov et al. (arXiv:2007.06346); htdt/self-supervised@d9662c8:
    methods/w_mse.py:19-36, with one whitening of the whole batch instead of random sub-batches.
    """
    white_a = cholesky_whiten(a, epsilon=epsilon, where=where)
    white_b = cholesky_whiten(b, epsilon=epsilon, where=where)
    return zero_masked(2.0 - 2.0 * cosine_similarity(white_a, white_b), where)


def _variance_deviations(
    x: Num[Array, "batch dim"], where: Bool[Array, "batch"] | None
) -> Float[Array, "dim"]:
    """Returns ``(1 - Var(x_d))^2`` with the unbiased variance over the batch."""
    x, count = centered(x, where)
    variance = jnp.sum(jnp.square(x), axis=0) / jnp.maximum(count - 1.0, 1.0)
    return jnp.square(variance - 1.0)


def trace_loss(x: Num[Array, "batch dim"], *, where: Bool[Array, "batch"] | None = None) -> Scalar:
    """``sum_d (1 - Var(x_d))^2`` with the unbiased variance over the batch, a scalar >= 0.

    Source: Weng et al. (arXiv:2305.16789); winci-ai/INTL@0aa69af:methods/intl.py:27-35.
    """
    return jnp.sum(_variance_deviations(x, where))


def intl(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    iterations: int = 4,
    whitening: str = "channel",
    trade_off: ArrayLike | None = None,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """INTL: ``mean_i (2 - 2 cos(w_a_i, w_b_i)) + beta (trace_loss(w_a) + trace_loss(w_b))``.

    ``w`` is ``iterative_whiten`` of each view. A batch statistic, hence a scalar.

    Args:
        whitening: ``batch`` decorrelates the dimensions with statistics over the examples;
            ``channel``, the released default, decorrelates the examples with statistics over the
            dimensions (everything transposed, the trace loss too).
        trade_off: beta; by default ``0.01 (log2 n - 3)`` for n whitened axes: the width for
            ``batch``, the batch size for ``channel``.

    Raises:
        UserError: another name for ``whitening``.

    Source: Weng et al. (arXiv:2305.16789); winci-ai/INTL@0aa69af:methods/intl.py,
    methods/base.py:24-34 and methods/whitening.py:12-38.
    """
    across_examples = lookup({"batch": False, "channel": True}, whitening, kind="whitening")
    white, deviations = [], 0.0
    for x in (a, b):
        if across_examples:
            white.append(iterative_whiten(keep(x, where)[0].T, iterations=iterations).T)
            each = _variance_deviations(white[-1].T, None)
            deviations += jnp.sum(keep(each, where)[0])
        else:
            white.append(iterative_whiten(x, iterations=iterations, where=where))
            deviations += trace_loss(white[-1], where=where)
    if trade_off is None:
        size = keep(a, where)[1] if across_examples else a.shape[1]
        trade_off = 0.01 * (jnp.log2(jnp.maximum(size, 1)) - 3.0)
    return masked_mean(2.0 - 2.0 * cosine_similarity(*white), where) + trade_off * deviations
