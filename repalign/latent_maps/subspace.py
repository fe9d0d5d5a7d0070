"""Canonical correlation: the directions in which two latent spaces agree."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign import numerics
from repalign.latent_maps.affine import AffineMap, thin_svd
from repalign.typing import Array, Float, Num


class CanonicalSubspaces(NamedTuple):
    """Maps of two spaces into one shared space.

    Attributes:
        from_a: a's features to canonical variables, which have mean 0, variance 1 and no
            correlation among each other.
        from_b: likewise for b; variable i of both correlates by ``correlations[i]``.
        correlations: descending, in [0, 1].
    """

    from_a: AffineMap
    from_b: AffineMap
    correlations: Float[Array, " components"]


@functools.partial(jax.jit, static_argnames=("components", "principal"))
def canonical_subspaces(
    a: Num[Array, "batch dim_a"],
    b: Num[Array, "batch dim_b"],
    *,
    components: int,
    principal: int | None = None,
) -> CanonicalSubspaces:
    """Canonical correlation analysis of paired examples in closed form.

    The canonical correlations are the singular values of ``U_a' U_b``, U the left singular vectors
    of the centred features (Bjorck and Golub 1973). ``principal`` keeps only that many leading ones
    of each first (SVCCA, Raghu et al. 2017); plain CCA finds perfect correlations in noise when the
    batch is not much larger than the widths. Directions that a set does not span do not count.

    Raises:
        ValueError: not ``1 <= components <= principal <= min(batch - 1, dim_a, dim_b)``.
    """
    limit = min(a.shape[0] - 1, a.shape[1], b.shape[1])
    kept = limit if principal is None else principal
    if not 1 <= components <= kept <= limit:
        raise ValueError(
            f"components = {components} and principal = {principal} must satisfy "
            f"1 <= components <= principal <= {limit}."
        )
    a, b = numerics.as_float(a), numerics.as_float(b)
    mean_a, mean_b = jnp.mean(a, axis=0), jnp.mean(b, axis=0)
    left_a, whiten_a = _whitening(a - mean_a, principal)
    left_b, whiten_b = _whitening(b - mean_b, principal)
    overlap = jnp.matmul(left_a.T, left_b, precision=lax.Precision.HIGHEST)
    rotate_a, correlations, rotate_b = jnp.linalg.svd(overlap, full_matrices=False)
    scale = jnp.sqrt(a.shape[0] - 1.0)

    def to_canonical(
        mean: Float[Array, " dim"],
        whiten: Float[Array, "dim kept"],
        rotation: Float[Array, "kept components"],
    ) -> AffineMap:
        matrix = scale * jnp.matmul(whiten, rotation, precision=lax.Precision.HIGHEST)
        return AffineMap(mean, matrix, jnp.zeros(components, matrix.dtype))

    return CanonicalSubspaces(
        to_canonical(mean_a, whiten_a, rotate_a[:, :components]),
        to_canonical(mean_b, whiten_b, rotate_b[:components].T),
        jnp.clip(correlations[:components], 0.0, 1.0),
    )


def _whitening(
    x: Float[Array, "batch dim"], principal: int | None
) -> tuple[Float[Array, "batch kept"], Float[Array, "dim kept"]]:
    """Returns orthonormal left singular vectors U (0 where not spanned) and T with ``x T = U``."""
    left, values, right = thin_svd(x)
    left, values, right = left[:, :principal], values[:principal], right[:principal]
    spanned = values > 0
    return (
        jnp.where(spanned, left, 0.0),
        jnp.where(spanned, right.T / jnp.where(spanned, values, 1.0), 0.0),
    )
