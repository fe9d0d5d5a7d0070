"""Reconstruction errors: what an autoencoder's output misses of its input, per example."""

import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float
from repalign.typing import Array, Float, Num


def squared_error(
    reconstruction: Num[Array, "batch *event"], target: Num[Array, "batch *event"]
) -> Float[Array, "batch"]:
    """Mean squared error of every example; the target receives no gradient.

    Up to a constant a Gaussian log-likelihood of fixed variance.
    """
    return _mean(jnp.square(_difference(reconstruction, target)))


def absolute_error(
    reconstruction: Num[Array, "batch *event"], target: Num[Array, "batch *event"]
) -> Float[Array, "batch"]:
    """Mean absolute error of every example; the target receives no gradient.

    The pixel loss of VQGAN and SimVQ (CompVis/taming-transformers@3ba01b2:
    taming/modules/losses/vqperceptual.py:78).
    """
    return _mean(jnp.abs(_difference(reconstruction, target)))


def _difference(reconstruction: Array, target: Array) -> Array:
    return as_float(reconstruction) - lax.stop_gradient(as_float(target))


def _mean(errors: Array) -> Array:
    return jnp.mean(errors.reshape(errors.shape[0], -1), axis=1)
