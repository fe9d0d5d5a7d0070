"""Orthogonal Procrustes: the rotation that best carries one latent space onto another."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from repalign import numerics
from repalign.latent_maps.affine import AffineMap
from repalign.typing import Array, Num


@functools.partial(jax.jit, static_argnames=("center", "scale"))
def orthogonal_procrustes(
    source: Num[Array, "batch source"],
    target: Num[Array, "batch target"],
    *,
    center: bool = True,
    scale: bool = False,
) -> AffineMap:
    """The orthogonal map (reflections allowed) with the least squared error on the pairs.

    ``R = U V'`` with ``U S V' = svd(X' Y)``, which maximises ``tr(R' X' Y)``. ``center`` moves both
    means to the origin first; ``scale`` multiplies R by the optimal ``tr(S) / |X|_F^2``. With
    different widths R is semi-orthogonal: orthonormal rows (a wider target) or columns.

    Schonemann 1966 (A Generalized Solution of the Orthogonal Procrustes Problem).
    """
    source, target = numerics.as_float(source), numerics.as_float(target)
    source_mean, target_mean = jnp.mean(source, axis=0), jnp.mean(target, axis=0)
    if not center:
        source_mean, target_mean = jnp.zeros_like(source_mean), jnp.zeros_like(target_mean)
    source = source - source_mean
    cross = jnp.matmul(source.T, target - target_mean, precision=lax.Precision.HIGHEST)
    left, values, right = jnp.linalg.svd(cross, full_matrices=False)
    rotation = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
    if scale:
        energy = jnp.sum(jnp.square(source))
        rotation = rotation * jnp.sum(values) / jnp.where(energy > 0, energy, 1.0)
    return AffineMap(source_mean, rotation, target_mean)
