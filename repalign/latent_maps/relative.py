"""Relative representations: an example described by its similarities to anchor examples."""

import jax.numpy as jnp

from repalign import numerics
from repalign.typing import Array, Float, Num

PROJECTIONS = ("cosine", "euclidean", "inner_product")


def relative_representation(
    x: Num[Array, "batch dim"],
    anchors: Num[Array, "anchors dim"],
    *,
    projection: str = "cosine",
) -> Float[Array, "batch anchors"]:
    """Similarity (or distance) of every example to every anchor.

    * ``"cosine"``: invariant to rotations and to the scale of each vector; in [-1, 1].
    * ``"euclidean"``: distances; invariant to rotations and shifts common to both.
    * ``"inner_product"``: invariant to rotations only.

    Encode the same anchors with two models and their relative representations are comparable.
    Moschella et al. 2023 (Relative Representations Enable Zero-Shot Latent Space Communication),
    Eq. 2; the other projections are those of Cannistraci et al. 2024 (From Bricks to Bridges).

    Raises:
        ValueError: an unknown projection.
    """
    if projection == "cosine":
        return numerics.inner_products(numerics.l2_normalize(x), numerics.l2_normalize(anchors))
    if projection == "inner_product":
        return numerics.inner_products(x, anchors)
    if projection == "euclidean":
        squared = numerics.squared_distances(x, anchors)
        apart = squared > 0  # the inner where keeps the gradient at distance 0 finite
        return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
    raise ValueError(f"unknown projection {projection!r}; valid: {', '.join(PROJECTIONS)}.")
