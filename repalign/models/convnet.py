"""A small convolutional encoder for images of 28 or 32 pixels."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.transformer import DataFormat, to_nhwc
from repalign.typing import Array, Float


class ConvNet(nn.Module):
    """Stages of a stride-2 and ``blocks`` stride-1 3x3 convolutions, each with norm and ReLU.

    Every stage halves the side (rounded up): three stages turn 28x28 and 32x32 images into 4x4
    maps. There are no batch statistics: the model is one pure function in training and evaluation.

    Attributes:
        widths: channels of the stages.
        blocks: stride-1 convolutions after each stage's stride-2 one.
        groups: groups of the GroupNorm after each convolution; 0: no norm.
        taps: stages (from 1) whose maps are returned as ``stage_<number>``.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 0
    groups: int = 8
    taps: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch _ _ _"], *, data_format: DataFormat = "NHWC"
    ) -> tuple[Float[Array, "batch features"], dict[str, Float[Array, "batch _ _ _"]]]:
        """Returns the map's mean over positions, and the taps, among them the last ``map``."""
        wrong = [tap for tap in self.taps if not 1 <= tap <= len(self.widths)]
        if wrong:
            raise ValueError(f"taps {wrong} are no stages of 1..{len(self.widths)}.")
        x, taps = to_nhwc(x, data_format).astype(self.dtype), {}
        for stage, width in enumerate(self.widths, start=1):
            for number in range(self.blocks + 1):
                x = nn.Conv(
                    width,
                    (3, 3),
                    strides=1 if number else 2,
                    use_bias=not self.groups,
                    kernel_init=nn.initializers.he_normal(),
                    dtype=self.dtype,
                    name=f"stage_{stage}_conv_{number}",
                )(x)
                if self.groups:
                    x = nn.GroupNorm(
                        self.groups, dtype=self.dtype, name=f"stage_{stage}_norm_{number}"
                    )(x)
                x = nn.relu(x)
            if stage in self.taps:
                taps[f"stage_{stage}"] = x
        return jnp.mean(x, axis=(1, 2)), {**taps, "map": x}
