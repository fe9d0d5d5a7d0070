"""Gradients through a quantizer: straight-through and the rotation trick."""

from collections.abc import Callable
from types import MappingProxyType

import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, l2_normalize
from repalign.typing import Array, Float


def straight_through(
    z: Float[Array, "*shape"], quantized: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns exactly ``quantized``; its gradient goes to ``z`` unchanged (Bengio et al. 2013).

    Written ``sg(q) + (z - sg(z))`` because the usual ``z + sg(q - z)`` rounds: its value is not q.
    """
    return lax.stop_gradient(quantized) + (z - lax.stop_gradient(z))


def rotate_to(
    src: Float[Array, "*batch dim"], tgt: Float[Array, "*batch dim"]
) -> Float[Array, "*batch dim"]:
    """Returns exactly ``tgt``; its gradient reaches ``src`` rotated and rescaled.

    ``R src`` with ``R = (|tgt| / |src|) (I - 2 w w' + 2 q u')``, ``u = src / |src|``,
    ``q = tgt / |tgt|``, ``w = (u + q) / |u + q|``; R is held constant, ``tgt`` gets no gradient.
    The cotangent keeps its angle to the code. A zero ``src`` has no direction: straight-through
    there.

    Source: Fifty et al. 2024 (arXiv 2410.06424), section 4.2; same as ``rotate_to`` of
    vector-quantize-pytorch 1.32.0, which returns the rounded ``R src`` (and 0 for a zero ``src``).
    """
    src, tgt = as_float(src), lax.stop_gradient(as_float(tgt))
    constant = lax.stop_gradient(src)
    u, q = l2_normalize(constant), l2_normalize(tgt)
    w = l2_normalize(u + q)
    source_norm = jnp.linalg.norm(constant, axis=-1, keepdims=True)
    nonzero = source_norm > 0
    scale = jnp.linalg.norm(tgt, axis=-1, keepdims=True) / jnp.where(nonzero, source_norm, 1.0)

    def along(direction: Array) -> Array:
        return jnp.sum(src * direction, axis=-1, keepdims=True)

    rotated = scale * (src - 2.0 * along(w) * w + 2.0 * along(u) * q)
    return straight_through(jnp.where(nonzero, rotated, src), tgt)


GRADIENTS: MappingProxyType[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {"straight_through": straight_through, "rotation": rotate_to}
)
"""What ``gradient=`` of a quantizer can name."""
