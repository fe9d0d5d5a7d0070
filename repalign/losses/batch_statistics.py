"""Means and covariances over the examples or tokens of a batch, with masked ones left out."""

import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, inner_products
from repalign.typing import Array, Bool, Float, Num, Scalar


def zero_masked(
    x: Num[Array, "batch *rest"], where: Bool[Array, "batch *_"] | None
) -> Num[Array, "batch *rest"]:
    """Returns ``x`` with zeros for masked examples or tokens, which pass no gradient, even NaN.

    Masking a loss's values is not enough: the derivative of what came before, times 0, is NaN.
    """
    if where is None:
        return x
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), x, 0.0)


def keep(
    x: Num[Array, "batch *rest"], where: Bool[Array, "batch"] | None
) -> tuple[Float[Array, "batch *rest"], Scalar]:
    """Returns ``x`` in float32 with masked examples set to zero, and the number of the others.

    Masked examples reach neither results nor gradients, even when they are not finite.
    """
    x = as_float(x)
    if where is None:
        return x, jnp.asarray(x.shape[0], x.dtype)
    return zero_masked(x, where), jnp.sum(where).astype(x.dtype)


def token_mean(
    values: Num[Array, "batch *tokens"], where: Bool[Array, "batch *_"] | None = None
) -> Float[Array, "batch"]:
    """Returns each example's mean over its tokens where the mask holds; 0 if it never does.

    ``where`` masks tokens or, of shape [batch], whole examples.
    """
    values = as_float(values)
    axes = tuple(range(1, values.ndim))
    if where is None:
        return jnp.mean(values, axis=axes)
    where = where.reshape(*where.shape, *(1,) * (values.ndim - where.ndim))
    where = jnp.broadcast_to(where, values.shape)
    total = jnp.sum(jnp.where(where, values, 0.0), axis=axes)
    return total / jnp.maximum(jnp.sum(where, axis=axes), 1)


def centered(
    x: Num[Array, "batch dim"], where: Bool[Array, "batch"] | None = None
) -> tuple[Float[Array, "batch dim"], Scalar]:
    """Returns ``x`` minus its mean over the batch (zero rows where masked), and the count."""
    x, count = keep(x, where)
    x = x - jnp.sum(x, axis=0) / jnp.maximum(count, 1.0)
    return zero_masked(x, where), count


def covariance(
    x: Num[Array, "batch dim"], where: Bool[Array, "batch"] | None = None, *, ddof: int = 1
) -> Float[Array, "dim dim"]:
    """Returns ``sum_i (x_i - mean)(x_i - mean)^T / max(N - ddof, 1)``; zero for one example."""
    x, count = centered(x, where)
    return inner_products(x.T, x.T) / jnp.maximum(count - ddof, 1.0)


def smaller_gram(x: Num[Array, "batch dim"]) -> Float[Array, "order order"]:
    """Returns ``x^T x`` or ``x x^T``, whichever is smaller; their nonzero spectra are equal."""
    return inner_products(x.T, x.T) if x.shape[0] > x.shape[1] else inner_products(x, x)


def cholesky_factor(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """Returns the lower Cholesky factor of a covariance.

    Rounding makes that of a matrix without full rank fail; then the matrix's rounding error,
    ``dim eps max_d matrix_dd``, is first added to its diagonal.
    """
    detached = lax.stop_gradient(matrix)
    rounding = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.diagonal(detached))
    failed = ~jnp.all(jnp.isfinite(jnp.linalg.cholesky(detached)))
    ridge = jnp.where(failed, rounding, 0.0).astype(matrix.dtype)
    return jnp.linalg.cholesky(matrix + ridge * jnp.eye(matrix.shape[0], dtype=matrix.dtype))
