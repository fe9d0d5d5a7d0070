"""A convolutional autoencoder of images, of VQGAN's shape; its bottleneck is not part of it.

Esser et al. 2021 (arXiv:2012.09841); CompVis/taming-transformers@3ba01b2:
taming/modules/diffusionmodules/model.py:29-537 and taming/models/vqgan.py:26-36. Dropout, which the
published configurations leave at 0, is left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from repalign.kernels.attention import attention
from repalign.models.convnet import GroupNorm
from repalign.models.layout import split_heads
from repalign.models.transformer import REMAT_POLICIES
from repalign.registry import lookup
from repalign.typing import Array, Float

# torch's default for convolutions, U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _conv(features: int, size: int, name: str, *, stride: int = 1, dtype: Any) -> nn.Conv:
    # "SAME" pads a stride-2 convolution below and to the right, as the official code does by hand.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding="SAME",
        kernel_init=_kernel,
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, 3x3 convolution) twice, and a shortcut, 1x1 if the width changes."""

    features: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        out = x
        for number in (1, 2):
            out = GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{number}")(out)
            out = _conv(self.features, 3, f"conv_{number}", dtype=self.dtype)(nn.silu(out))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "shortcut", dtype=self.dtype)(x)
        return x + out


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, with a norm before and a shortcut."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        normalized = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)

        def tokens(name: str) -> Array:
            # One axis at a time: on an explicit mesh no reshape may cut or join two.
            projected = _conv(channels, 1, name, dtype=self.dtype)(normalized)
            return projected.reshape(batch, -1, channels)[:, :, None]

        query, key, value = (tokens(name) for name in ("query", "key", "value"))
        out = attention(query, key, value, partition=split_heads(query))[:, :, 0].reshape(x.shape)
        return x + _conv(channels, 1, "proj", dtype=self.dtype)(out)


def _block(remat: str | None) -> type[ResidualBlock]:
    if remat is None:
        return ResidualBlock
    policy = lookup(REMAT_POLICIES, remat, kind="rematerialisation policy")
    return nn.remat(ResidualBlock, policy=policy)


class TokenizerEncoder(nn.Module):
    """Images to a map of latent vectors; see `Tokenizer` for the attributes."""

    dim: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    groups: int
    attention: bool
    remat: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        block, lowest = _block(self.remat), len(self.multipliers)
        x = _conv(self.width, 3, "conv_in", dtype=self.dtype)(x.astype(self.dtype))
        for level, multiplier in enumerate(self.multipliers, start=1):
            for number in range(1, self.blocks + 1):
                x = block(
                    self.width * multiplier,
                    self.groups,
                    self.dtype,
                    name=f"level_{level}_block_{number}",
                )(x)
                if self.attention and level == lowest:
                    x = AttentionBlock(
                        self.groups, self.dtype, name=f"level_{level}_attention_{number}"
                    )(x)
            if level < lowest:
                features = x.shape[-1]
                x = _conv(features, 3, f"level_{level}_down", stride=2, dtype=self.dtype)(x)
        x = _middle(x, block, self)
        x = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        x = _conv(self.dim, 3, "conv_out", dtype=self.dtype)(x)
        # The bottleneck decides in float32.
        return _conv(self.dim, 1, "to_latent", dtype=jnp.float32)(x)


class TokenizerDecoder(nn.Module):
    """Maps of latent vectors to images; see `Tokenizer` for the attributes."""

    channels: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    groups: int
    attention: bool
    remat: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch height width channels"]:
        block, lowest = _block(self.remat), len(self.multipliers)
        x = _conv(z.shape[-1], 1, "from_latent", dtype=self.dtype)(z.astype(self.dtype))
        x = _conv(self.width * self.multipliers[-1], 3, "conv_in", dtype=self.dtype)(x)
        x = _middle(x, block, self)
        for level in range(lowest, 0, -1):
            features = self.width * self.multipliers[level - 1]
            for number in range(1, self.blocks + 2):
                x = block(features, self.groups, self.dtype, name=f"level_{level}_block_{number}")(
                    x
                )
                if self.attention and level == lowest:
                    x = AttentionBlock(
                        self.groups, self.dtype, name=f"level_{level}_attention_{number}"
                    )(x)
            if level > 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(features, 3, f"level_{level}_up", dtype=self.dtype)(x)
        x = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return _conv(self.channels, 3, "conv_out", dtype=jnp.float32)(x)


def _middle(x: Array, block: type[ResidualBlock], part: Any) -> Array:
    features = x.shape[-1]
    x = block(features, part.groups, part.dtype, name="middle_block_1")(x)
    if part.attention:
        x = AttentionBlock(part.groups, part.dtype, name="middle_attention")(x)
    return block(features, part.groups, part.dtype, name="middle_block_2")(x)


class Tokenizer(nn.Module):
    """Encoder and decoder; a forward pass puts a quantizer between ``encode`` and ``decode``.

    Each level but the last halves the side: five levels make 16x16 vectors of a 256x256 image.
    Latents and reconstructions are float32 in every ``dtype``.

    Attributes:
        channels: of the images.
        dim: of the latent vectors.
        width: channels at the highest level; ``multipliers`` times that at each level.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        groups: of the group norms; they must divide every level's channels.
        attention: one-head attention after every block of the lowest level and in the middle.
        remat: None, or the policy (`repalign.models.transformer.REMAT_POLICIES`) by which every
            residual block recomputes its activations in the backward pass.
    """

    channels: int = 3
    dim: int = 256
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    attention: bool = True
    remat: str | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        shape = (self.width, self.multipliers, self.blocks, self.groups, self.attention)
        self.encoder = TokenizerEncoder(self.dim, *shape, self.remat, self.dtype)
        self.decoder = TokenizerDecoder(self.channels, *shape, self.remat, self.dtype)

    def encode(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        """Returns the latent vectors of images.

        Raises:
            ValueError: a side that the levels cannot halve evenly, or another number of channels.
        """
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor or x.shape[3] != self.channels:
            raise ValueError(
                f"images of {x.shape[1:]} do not fit a tokenizer of {self.channels} channels that "
                f"needs sides divisible by {factor}."
            )
        return self.encoder(x)

    def decode(
        self, z: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch height width channels"]:
        """Returns the images of latent vectors."""
        return self.decoder(z)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width channels"], dict[str, jax.Array]]:
        """Returns the reconstruction without any bottleneck, and the tap ``latent``."""
        z = self.encode(x)
        return self.decode(z), {"latent": z}
