"""Pixels as numbers: uint8 images to floating point and back."""

import jax.numpy as jnp

from repalign.typing import Array, Float, Shaped, UInt8


def to_unit_range(images: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns uint8 images as float32 in [0, 1]; floating-point images are returned as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) * (1.0 / 255.0)


def to_signed_range(images: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns uint8 images as float32 in [-1, 1]; floating-point latents come back as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def from_signed_range(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Returns images in [-1, 1] as uint8, rounded and clipped."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
