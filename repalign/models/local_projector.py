"""AMDIM's projection of a map, for contrasts between a summary and local features."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.heads import BatchStandardize
from repalign.typing import Array, Float


class LocalProjector(nn.Module):
    """``norm(W_2 relu(W_1 x) + W_3 x + b_3)`` at every position of a map: 1x1 convolutions.

    The norm is over batch and positions, with scale and bias, by the statistics of the map that it
    is given. W_2 starts at zero, as in the official code; W_3 starts at random, there near the
    identity where it is wide enough.

    Source: Bachman et al. 2019 (arXiv:1906.00910); Philip-Bachman/amdim-public@0333f6b:model.py
    (FakeRKHSConvNet, without its optional inner norm).
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        rows = x.reshape(-1, x.shape[-1])
        dense = {"features": self.features, "dtype": self.dtype}
        inner = nn.relu(nn.Dense(use_bias=False, name="linear_1", **dense)(rows))
        zeros = nn.initializers.zeros
        out = nn.Dense(use_bias=False, kernel_init=zeros, name="linear_2", **dense)(inner)
        out = out + nn.Dense(name="shortcut", **dense)(rows)
        out = BatchStandardize(dtype=self.dtype, name="norm")(out)
        return out.reshape(*x.shape[:-1], self.features)
