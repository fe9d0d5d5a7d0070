"""Similarity indices of two representations of the same examples, as losses."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import centered, cholesky_factor, covariance
from repalign.numerics import inner_products
from repalign.typing import Array, ArrayLike, Bool, Num, Scalar


def cka_loss(
    a: Num[Array, "batch a_dim"],
    b: Num[Array, "batch b_dim"],
    *,
    epsilon: ArrayLike = 1e-12,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """``1 - CKA(a, b)`` with linear kernels, a batch statistic in [0, 1]; widths may differ.

    ``CKA = ||A^T B||_F^2 / (||A^T A||_F ||B^T B||_F)`` of the centred data; ``epsilon`` is added to
    the product of squared norms under the root, so that constant representations cost 1. Both
    sides receive gradients (stop a teacher's outside). Invariant to rotations and to scale.

    Source: Kornblith et al. (arXiv:1905.00414), with the linear kernel.
    """
    a, _ = centered(a, where)
    b, _ = centered(b, where)
    # Scaling first keeps fourth powers of the data within float32.
    a = a * lax.rsqrt(jnp.mean(jnp.square(a)) + epsilon)
    b = b * lax.rsqrt(jnp.mean(jnp.square(b)) + epsilon)

    def squared_norm(x, y):
        return jnp.sum(jnp.square(inner_products(x.T, y.T)))

    return 1.0 - squared_norm(a, b) * lax.rsqrt(squared_norm(a, a) * squared_norm(b, b) + epsilon)


def cca_loss(
    a: Num[Array, "batch a_dim"],
    b: Num[Array, "batch b_dim"],
    *,
    regularization: ArrayLike = 1e-4,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """Deep CCA: minus the sum of the canonical correlations, in [-min(D_a, D_b), 0].

    The correlations are the singular values of ``L_a^-1 S_ab L_b^-T``, with Cholesky factors of
    the covariances plus ``regularization`` (or the rounding error of the factorisation, if that is
    larger) times the identity. A batch statistic: the batch should
    be several times wider than the representation. Both sides receive gradients.

    Source: Andrew et al., Deep CCA (ICML 2013), its regularised objective.
    """
    a, count = centered(a, where)
    b, _ = centered(b, where)
    cross = inner_products(a.T, b.T) / jnp.maximum(count - 1.0, 1.0)

    def whiten(x, matrix):
        own = covariance(x, where)
        factor = cholesky_factor(own + regularization * jnp.eye(x.shape[1], dtype=own.dtype))
        return jax.scipy.linalg.solve_triangular(factor, matrix, lower=True)

    return -jnp.sum(jnp.linalg.svd(whiten(b, whiten(a, cross).T), compute_uv=False))
