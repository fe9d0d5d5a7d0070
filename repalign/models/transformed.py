"""An encoder followed by a square linear map of its embedding, free or orthogonal."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from repalign.losses.backward_compatibility import orthogonal_matrix
from repalign.registry import build, lookup
from repalign.typing import Array, Float

_MATRICES = {
    "none": None,
    "orthogonal": (nn.initializers.zeros, orthogonal_matrix),
    "linear": (lambda key, shape: jnp.eye(*shape), lambda matrix: matrix),
}


class TransformedEncoder(nn.Module):
    """The embedding h of ``encoder`` as ``h M``; the taps are the encoder's, and ``before`` is h.

    Attributes:
        encoder: a model that returns ``(embedding, taps)``.
        transformation: ``none`` (M is the identity), ``orthogonal`` (a learned rotation, see
            `repalign.losses.backward_compatibility.orthogonal_matrix`) or ``linear`` (any matrix).
            Both start at the identity and have as many parameters.
    """

    encoder: nn.Module
    transformation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch _ _ _"]
    ) -> tuple[Float[Array, "batch features"], dict[str, Array]]:
        embedding, taps = self.encoder(x)
        taps = {**taps, "before": embedding}
        chosen = lookup(_MATRICES, self.transformation, kind="transformation")
        if chosen is None:
            return embedding, taps
        initializer, matrix = chosen
        size = embedding.shape[-1]
        free = self.param("transformation_matrix", initializer, (size, size))
        return jnp.matmul(embedding, matrix(free), precision=jax.lax.Precision.HIGHEST), taps


def transformed_encoder(
    *, encoder: Mapping[str, Any], transformation: str = "none"
) -> TransformedEncoder:
    """Returns a `TransformedEncoder` from a config section: ``encoder`` is a model's section."""
    lookup(_MATRICES, transformation, kind="transformation")
    return TransformedEncoder(build(encoder, place="config.model.encoder"), transformation)
