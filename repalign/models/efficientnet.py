"""EfficientNet-Lite in inference form: convolutions with their batch normalisation folded in.

Tan, Le, "EfficientNet", arXiv:1905.11946, in the Lite variant (no squeeze-and-excitation, ReLU6
instead of swish, stem and head not scaled):
tensorflow/tpu@22d5cab models/official/efficientnet/lite/efficientnet_lite_builder.py. It serves as
a frozen teacher, so there is no training form.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from repalign.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Inverted-residual blocks that share a width; the first one has the stride."""

    blocks: int
    kernel_size: int
    stride: int
    expansion: int
    width: int


LITE0 = (
    Stage(blocks=1, kernel_size=3, stride=1, expansion=1, width=16),
    Stage(blocks=2, kernel_size=3, stride=2, expansion=6, width=24),
    Stage(blocks=2, kernel_size=5, stride=2, expansion=6, width=40),
    Stage(blocks=3, kernel_size=3, stride=2, expansion=6, width=80),
    Stage(blocks=3, kernel_size=5, stride=1, expansion=6, width=112),
    Stage(blocks=4, kernel_size=5, stride=2, expansion=6, width=192),
    Stage(blocks=1, kernel_size=3, stride=1, expansion=6, width=320),
)
"""EfficientNet-Lite0's stages; the fifth gives 112 channels at a sixteenth of the resolution."""


class DepthwiseConv(nn.Module):
    """A depthwise convolution with TensorFlow's SAME padding.

    A sum of shifted products, not a grouped convolution: XLA's grouped convolution on CPU is many
    times slower.
    """

    kernel_size: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height_out width_out channels"]:
        size, stride = self.kernel_size, self.stride
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (size, size, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        out_height, out_width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
        padding = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        out = jnp.broadcast_to(bias, (x.shape[0], out_height, out_width, channels))
        for row in range(size):
            for column in range(size):
                window = x[
                    :,
                    row : row + stride * (out_height - 1) + 1 : stride,
                    column : column + stride * (out_width - 1) + 1 : stride,
                ]
                out = out + window * kernel[row, column]
        return out


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise, project (1x1); a shortcut where shapes allow one.

    The 1x1 convolutions are matrix products, twice as fast on CPU as XLA's convolution.
    """

    width: int
    kernel_size: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height_out width_out channels_out"]:
        out = x
        if self.expansion != 1:
            out = nn.Dense(x.shape[-1] * self.expansion, name="expand")(out)
            out = jax.nn.relu6(out)
        out = DepthwiseConv(self.kernel_size, self.stride, name="depthwise")(out)
        out = nn.Dense(self.width, name="project")(jax.nn.relu6(out))
        return x + out if x.shape == out.shape else out


class EfficientNet(nn.Module):
    """EfficientNet-Lite; the default is Lite0 with its ImageNet-1k classifier.

    ``__call__(images) -> (logits, taps)``: images float32 [batch, height, width, 3], normalised as
    ``(pixel - 127) / 128``; logits [batch, classes], or None for a model cut off after its stages.
    Taps: ``stem``, ``stage_1`` ... (each [batch, height, width, channels], before any further
    activation), and ``pooled`` [batch, head_width] where there is a head.

    Attributes:
        stages: the inverted-residual stages; a prefix of ``LITE0`` cuts the model off there.
        stem_width: channels of the stem convolution.
        head_width: channels of the last 1x1 convolution; ``None``: no head, logits are None.
        classes: outputs of the classifier.
    """

    stages: tuple[Stage, ...] = LITE0
    stem_width: int = 32
    head_width: int | None = 1280
    classes: int = 1000

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch classes"] | None, dict[str, Array]]:
        x = jax.nn.relu6(nn.Conv(self.stem_width, (3, 3), (2, 2), name="stem")(images))
        taps = {"stem": x}
        block = 0
        for number, stage in enumerate(self.stages, start=1):
            for position in range(stage.blocks):
                stride = stage.stride if position == 0 else 1
                x = InvertedResidual(
                    stage.width, stage.kernel_size, stride, stage.expansion, name=f"block_{block}"
                )(x)
                block += 1
            taps[f"stage_{number}"] = x
        if self.head_width is None:
            return None, taps
        x = jax.nn.relu6(nn.Dense(self.head_width, name="head")(x))
        taps["pooled"] = x.mean((1, 2))
        return nn.Dense(self.classes, name="classifier")(taps["pooled"]), taps
