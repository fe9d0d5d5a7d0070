"""Relative representations: an example described by its similarities to anchor examples."""

import jax.numpy as jnp

from repalign import numerics
from repalign.registry import lookup
from repalign.typing import Array, Float, Num


def _cosines(x: Array, anchors: Array) -> Array:
    return numerics.inner_products(numerics.l2_normalize(x), numerics.l2_normalize(anchors))


def _distances(x: Array, anchors: Array) -> Array:
    squared = numerics.squared_distances(x, anchors)
    apart = squared > 0  # the inner where keeps the gradient at distance 0 finite
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


PROJECTIONS = {
    "cosine": _cosines,
    "euclidean": _distances,
    "inner_product": numerics.inner_products,
}


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
        UserError: an unknown projection.
    """
    return lookup(PROJECTIONS, projection, kind="projection")(x, anchors)
