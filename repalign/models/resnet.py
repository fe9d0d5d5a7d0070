"""Residual networks, with the stem of ImageNet or of CIFAR.

He et al. 2016 (arXiv:1512.03385); stride in the 3x3 convolution of a bottleneck ("v1.5"), as in
torchvision 0.29.2 (models/resnet.py) and google-research/simclr@be133b3:resnet.py.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from repalign.models.transformer import DataFormat, to_nhwc
from repalign.registry import lookup
from repalign.typing import Array, Float

SIZES = {
    "18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
}
"""Fields of :class:`ResNet` by the usual number of layers: ``ResNet(**SIZES["50"])``."""

_kernel = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNorm(nn.Module):
    """Batch normalisation, epsilon 1e-5, with running averages in the collection ``batch_stats``.

    Where that collection is mutable (a training step) the inputs' own statistics normalise, over
    all axes but the last, and move the averages: ``a <- momentum a + (1 - momentum) new``;
    otherwise the averages normalise. Under jit with a sharded batch the statistics are those of the
    global batch. The variance is the biased one in both places; torch's running average takes the
    unbiased one.

    Attributes:
        momentum: of the running averages; 0.9 is torch's ``momentum=0.1``.
        zero_scale: the learned scale starts at 0 and not at 1.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    zero_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape channels"]) -> Float[Array, "*shape channels"]:
        initial = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", initial, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, x.shape[-1:], jnp.float32),
        }
        if self.is_mutable_collection("batch_stats"):
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide, axis=axes)
            new = {"mean": mean, "var": jnp.mean(jnp.square(wide - mean), axis=axes)}
            if not self.is_initializing():
                for name, average in running.items():
                    kept = self.momentum * average.value
                    average.value = kept + (1.0 - self.momentum) * new[name]
        else:
            new = {name: average.value for name, average in running.items()}
        factor = scale * lax.rsqrt(new["var"] + self.epsilon)
        return ((x - new["mean"]) * factor + bias).astype(self.dtype)


def _conv(
    features: int, size: int, name: str, *, stride: int = 1, dtype: Any = jnp.float32
) -> nn.Conv:
    # Explicit padding, the same on both sides: "SAME" pads strided convolutions otherwise.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        kernel_init=_kernel,
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 (bottleneck), each with a norm, and a shortcut."""

    width: int
    stride: int
    bottleneck: bool
    zero_scale: bool
    momentum: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height_out width_out features"]:
        features = 4 * self.width if self.bottleneck else self.width
        shapes = [(self.width, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            shapes = [(self.width, 1, 1), (self.width, 3, self.stride), (features, 1, 1)]
        out = x
        for number, (width, size, stride) in enumerate(shapes, start=1):
            last = number == len(shapes)
            out = _conv(width, size, f"conv_{number}", stride=stride, dtype=self.dtype)(out)
            norm = BatchNorm(
                self.momentum,
                zero_scale=self.zero_scale and last,
                dtype=self.dtype,
                name=f"norm_{number}",
            )
            out = norm(out) if last else nn.relu(norm(out))
        if self.stride > 1 or x.shape[-1] != features:
            x = _conv(features, 1, "shortcut_conv", stride=self.stride, dtype=self.dtype)(x)
            x = BatchNorm(self.momentum, dtype=self.dtype, name="shortcut_norm")(x)
        return nn.relu(x + out)


class ResNet(nn.Module):
    """A residual network without its classifier.

    Apply it with ``batch_stats`` mutable to train, and with them fixed to use it frozen; see
    `BatchNorm`. ResNet-50 has 23,508,032 parameters, with ImageNet's linear classifier 25,557,032.

    Attributes:
        blocks: residual blocks of the four stages; every stage but the first halves the side.
        bottleneck: blocks of three convolutions with four times the width at their end.
        stem: ``imagenet``, a 7x7 convolution of stride 2 and a max-pool; ``cifar``, a 3x3
            convolution.
        width: channels of the stem and of the first stage.
        zero_scale: the last norm of every block starts at zero, so each block at its shortcut
            (SimCLR, Goyal et al. 2017).
        momentum: of the running batch statistics.
        taps: stages (from 1) whose maps are returned as ``stage_<number>``.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    stem: str = "imagenet"
    width: int = 64
    zero_scale: bool = True
    momentum: float = 0.9
    taps: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch _ _ _"], *, data_format: DataFormat = "NHWC"
    ) -> tuple[Float[Array, "batch features"], dict[str, Float[Array, "batch _ _ _"]]]:
        """Returns the map's mean over positions, and the taps, among them the last ``map``."""
        wrong = [tap for tap in self.taps if not 1 <= tap <= len(self.blocks)]
        if wrong:
            raise ValueError(f"taps {wrong} are no stages of 1..{len(self.blocks)}.")
        large = lookup({"imagenet": True, "cifar": False}, self.stem, kind="stem")
        x = to_nhwc(x, data_format).astype(self.dtype)
        size, stride = (7, 2) if large else (3, 1)
        x = _conv(self.width, size, "stem_conv", stride=stride, dtype=self.dtype)(x)
        x = nn.relu(BatchNorm(self.momentum, dtype=self.dtype, name="stem_norm")(x))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        taps = {}
        for stage, count in enumerate(self.blocks, start=1):
            for number in range(1, count + 1):
                x = ResidualBlock(
                    self.width * 2 ** (stage - 1),
                    2 if stage > 1 and number == 1 else 1,
                    self.bottleneck,
                    self.zero_scale,
                    self.momentum,
                    self.dtype,
                    name=f"stage_{stage}_block_{number}",
                )(x)
            if stage in self.taps:
                taps[f"stage_{stage}"] = x
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2)), {**taps, "map": x}
