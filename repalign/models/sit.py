"""SiT: the scalable interpolant transformer, an adaLN-Zero transformer over latent patches."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.layout import split_examples
from repalign.models.position import sincos_2d, sinusoid
from repalign.models.transformer import (
    Attention,
    Blocks,
    DataFormat,
    Mlp,
    from_nhwc,
    layer_norm,
    patchify,
    to_nhwc,
    unpatchify,
    xavier,
)
from repalign.numerics import take_rows
from repalign.typing import Array, Float, Integer

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
"""Fields of :class:`SiT` by the paper's names; ``SiT(**SIZES["XL"], patch_size=2)`` is SiT-XL/2."""

_FREQUENCIES = 256


def modulated_norm(
    x: Float[Array, "batch tokens width"],
    shift: Float[Array, "batch width"],
    scale: Float[Array, "batch width"],
) -> Float[Array, "batch tokens width"]:
    """Returns ``LayerNorm(x) (1 + scale) + shift``, epsilon 1e-6, in the dtype of ``shift``."""
    normed = layer_norm(x, epsilon=1e-6)
    return (normed * (1 + scale[:, None]) + shift[:, None]).astype(shift.dtype)


class SiTBlock(nn.Module):
    """A transformer block whose norms and residuals the conditioning modulates (adaLN-Zero)."""

    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], conditioning: Float[Array, "batch width"]
    ) -> Float[Array, "batch tokens width"]:
        modulation = nn.Dense(
            6 * x.shape[-1],
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="modulation",
        )(nn.silu(conditioning))
        modulation = split_examples(modulation)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.heads, qk_norm=self.qk_norm, dtype=self.dtype, name="attention")
        x = x + gate[:, None] * attention(modulated_norm(x, shift, scale))
        mlp = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")
        return x + mlp_gate[:, None] * mlp(modulated_norm(x, mlp_shift, mlp_scale))


class SiT(nn.Module):
    """Predicts a velocity of the input's shape from a noisy image or latent, a time and a class.

    Paper: Ma et al. 2024, arXiv:2401.08740; Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero).
    Architecture and initialisation follow sihyun-yu/REPA@67f7145:models/sit.py:146-292: xavier
    uniform linears (patch embedding included), N(0, 0.02) for labels and the time MLP, zero
    for every modulation and for the output layer, so that an untrained model returns zero.

    Deviations: the fixed position table is a constant and no parameter; labels are never dropped
    inside (see :func:`repalign.generation.flow.drop_labels`); REPA's projectors are not part of it.

    Attributes:
        image_size: height and width of the input.
        classes: number of classes; label ``classes`` is the null label. 0 builds an unconditional
            model, which ignores ``y``.
        taps: the blocks (from 1) whose outputs are returned as ``block_<number>``.
        scan, remat: see :class:`repalign.models.transformer.Blocks`.
        dtype: of the computation; parameters, norms and softmax are float32.
    """

    image_size: int = 32
    patch_size: int = 2
    channels: int = 4
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    classes: int = 1000
    taps: tuple[int, ...] = ()
    qk_norm: bool = False
    scan: bool = False
    remat: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch _ _ _"],
        t: Float[Array, " batch"],
        y: Integer[Array, " batch"] | None = None,
        *,
        data_format: DataFormat = "NHWC",
    ) -> tuple[Float[Array, "batch _ _ _"], dict[str, Float[Array, "batch tokens width"]]]:
        """Returns the velocity at ``(x, t, y)`` and the taps.

        Args:
            x: images in ``data_format``.
            t: times, used as they are (not multiplied by 1000).
            y: labels in [0, classes].

        Raises:
            ValueError: an input of another size, or a class-conditional model without labels.
        """
        x = to_nhwc(x, data_format)
        expected = (self.image_size, self.image_size, self.channels)
        if x.shape[1:] != expected:
            raise ValueError(f"this SiT takes images of {expected}, not {x.shape[1:]}.")
        side = self.image_size // self.patch_size
        dense = {"kernel_init": xavier, "dtype": self.dtype}
        tokens = nn.Dense(self.width, name="patch_embedding", **dense)(patchify(x, self.patch_size))
        tokens = tokens + sincos_2d(self.width, (side, side)).astype(self.dtype)

        small = {"kernel_init": nn.initializers.normal(0.02), "dtype": self.dtype}
        conditioning = sinusoid(t, _FREQUENCIES)
        conditioning = nn.silu(nn.Dense(self.width, name="time_1", **small)(conditioning))
        conditioning = split_examples(conditioning, hidden=True)
        conditioning = split_examples(nn.Dense(self.width, name="time_2", **small)(conditioning))
        if self.classes:
            if y is None:
                raise ValueError(
                    "this SiT has classes: pass labels y (the null label is `classes`)."
                )
            labels = nn.Embed(
                self.classes + 1,
                self.width,
                embedding_init=nn.initializers.normal(0.02),
                name="label_embedding",
            )
            label = take_rows(labels.embedding.astype(self.dtype), y)
            conditioning = conditioning + split_examples(label)

        tokens, taps = Blocks(
            functools.partial(SiTBlock, self.heads, self.mlp_ratio, self.qk_norm, dtype=self.dtype),
            self.depth,
            self.taps,
            self.scan,
            self.remat,
            name="blocks",
        )(tokens, conditioning)

        zeros = {"kernel_init": nn.initializers.zeros, "dtype": self.dtype}
        modulation = nn.Dense(2 * self.width, name="final_modulation", **zeros)(
            nn.silu(conditioning)
        )
        modulation = split_examples(modulation)
        tokens = modulated_norm(tokens, *jnp.split(modulation, 2, axis=-1))
        values = nn.Dense(self.patch_size**2 * self.channels, name="final", **zeros)(tokens)
        out = unpatchify(values, self.patch_size, (side, side)).astype(x.dtype)
        return from_nhwc(out, data_format), taps
