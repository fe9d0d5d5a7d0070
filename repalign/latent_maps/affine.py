"""Affine maps from one latent space to another, fitted on paired examples in closed form."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign import numerics
from repalign.typing import Array, Float, Num


class AffineMap(NamedTuple):
    """``x -> (x - source_mean) @ matrix + target_mean``."""

    source_mean: Float[Array, " source"]
    matrix: Float[Array, "source target"]
    target_mean: Float[Array, " target"]

    def __call__(self, x: Num[Array, "batch source"]) -> Float[Array, "batch target"]:
        shifted = numerics.as_float(x) - self.source_mean
        return jnp.matmul(shifted, self.matrix, precision=lax.Precision.HIGHEST) + self.target_mean


@functools.partial(jax.jit, static_argnames=("l2",))
def least_squares(
    source: Num[Array, "batch source"], target: Num[Array, "batch target"], *, l2: float = 0.0
) -> AffineMap:
    """The affine map with the least mean squared error on the pairs.

    Minimises ``1/N sum_i |(x_i - mean x) W - (y_i - mean y)|^2 + l2 |W|_F^2``; scikit-learn's
    ridge ``alpha`` is ``N * l2``. From the singular value decomposition of the source: without a
    penalty, directions the source does not span get a zero (the minimum-norm solution).

    Raises:
        ValueError: a negative penalty.
    """
    if l2 < 0:
        raise ValueError(f"l2 = {l2} is negative.")
    source, target = numerics.as_float(source), numerics.as_float(target)
    source_mean, target_mean = jnp.mean(source, axis=0), jnp.mean(target, axis=0)
    left, values, right = thin_svd(source - source_mean)
    spanned = values > 0
    gains = values / jnp.where(spanned, jnp.square(values) + source.shape[0] * l2, 1.0)
    coefficients = jnp.matmul(left.T, target - target_mean, precision=lax.Precision.HIGHEST)
    matrix = jnp.matmul(right.T, gains[:, None] * coefficients, precision=lax.Precision.HIGHEST)
    return AffineMap(source_mean, matrix, target_mean)


def thin_svd(
    x: Float[Array, "batch dim"],
) -> tuple[
    Float[Array, "batch directions"], Float[Array, " directions"], Float[Array, "directions dim"]
]:
    """Thin singular value decomposition whose values below the rounding error are exactly 0.

    The bound is numpy.linalg.matrix_rank's: the largest value times max(shape) times epsilon.
    """
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    noise = values[0] * max(x.shape) * jnp.finfo(x.dtype).eps
    return left, jnp.where(values > noise, values, 0.0), right
