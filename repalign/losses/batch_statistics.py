"""Means and covariances over the examples of a batch, with masked examples left out."""

import jax.numpy as jnp

from repalign.numerics import as_float, inner_products
from repalign.typing import Array, Bool, Float, Num, Scalar


def keep(
    x: Num[Array, "batch *rest"], where: Bool[Array, "batch"] | None
) -> tuple[Float[Array, "batch *rest"], Scalar]:
    """Returns ``x`` in float32 with masked examples set to zero, and the number of the others.

    Masked examples reach neither results nor gradients, even when they are not finite.
    """
    x = as_float(x)
    if where is None:
        return x, jnp.asarray(x.shape[0], x.dtype)
    kept = jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)
    return kept, jnp.sum(where).astype(x.dtype)


def centered(
    x: Num[Array, "batch dim"], where: Bool[Array, "batch"] | None = None
) -> tuple[Float[Array, "batch dim"], Scalar]:
    """Returns ``x`` minus its mean over the batch (zero rows where masked), and the count."""
    x, count = keep(x, where)
    x = x - jnp.sum(x, axis=0) / jnp.maximum(count, 1.0)
    return keep(x, where)[0], count


def covariance(
    x: Num[Array, "batch dim"], where: Bool[Array, "batch"] | None = None, *, ddof: int = 1
) -> Float[Array, "dim dim"]:
    """Returns ``sum_i (x_i - mean)(x_i - mean)^T / max(N - ddof, 1)``; zero for one example."""
    x, count = centered(x, where)
    return inner_products(x.T, x.T) / jnp.maximum(count - ddof, 1.0)


def smaller_gram(x: Num[Array, "batch dim"]) -> Float[Array, "order order"]:
    """Returns ``x^T x`` or ``x x^T``, whichever is smaller; their nonzero spectra are equal."""
    return inner_products(x.T, x.T) if x.shape[0] > x.shape[1] else inner_products(x, x)
