"""A masked autoencoder: a transformer that sees some patches, a small one that predicts all."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from repalign.models.layout import split_examples
from repalign.models.position import sincos_2d
from repalign.models.transformer import Blocks, LayerNorm, xavier
from repalign.models.vit import ViT, ViTBlock
from repalign.typing import Array, Float, Integer


class MaskedDecoder(nn.Module):
    """Predicts the pixels of every patch from the encoding of the visible ones.

    The encoder's tokens are projected, a learned mask token stands in for every hidden patch, all
    tokens get their fixed sine-cosine position (the class token none) and pass the blocks.
    Source: He et al. (arXiv:2111.06377); facebookresearch/mae@efb2a80:models_mae.py:52-66, 172-196.

    Attributes:
        values: numbers to predict for a patch, patch_size^2 * channels.
        width, depth, heads: of the blocks; the official decoder's by default, for every encoder.
        scan, remat: see `repalign.models.transformer.Blocks`.
    """

    values: int
    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    scan: bool = False
    remat: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        cls: Float[Array, "batch encoder_width"],
        patches: Float[Array, "batch visible encoder_width"],
        restore: Integer[Array, "batch tokens"],
        *,
        grid: tuple[int, int],
    ) -> tuple[Float[Array, "batch tokens values"], dict[str, Array]]:
        """Returns the predictions, float32, in the order of the image's patches, and a tap.

        The tap ``decoded`` [batch, tokens, width] is what the predictions are a linear map of.

        Args:
            cls: encoding of the class token.
            patches: encodings of the visible patches, in shuffled order.
            restore: from `repalign.losses.masked.random_masking`.
            grid: rows and columns of patches.
        """
        dense = {"kernel_init": xavier, "dtype": self.dtype}
        encoded = jnp.concatenate([cls[:, None], patches], axis=1)
        x = nn.Dense(self.width, name="embedding", **dense)(encoded)
        mask = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        batch, tokens = restore.shape
        hidden = jnp.broadcast_to(
            mask.astype(self.dtype), (batch, tokens - patches.shape[1], self.width)
        )
        shuffled = jnp.concatenate([x[:, 1:], split_examples(hidden)], axis=1)
        in_place = jnp.take_along_axis(shuffled, restore[..., None], axis=1)
        positions = np.concatenate([np.zeros((1, self.width)), sincos_2d(self.width, grid)])
        x = jnp.concatenate([x[:, :1], in_place], axis=1) + jnp.asarray(positions, self.dtype)

        block = functools.partial(ViTBlock, self.heads, self.mlp_ratio, dtype=self.dtype)
        x, _ = Blocks(block, self.depth, (), self.scan, self.remat, name="blocks")(x)
        x = LayerNorm(dtype=self.dtype, name="norm")(x[:, 1:])
        predictions = nn.Dense(self.values, name="predictions", **dense)(x)
        return predictions.astype(jnp.float32), {"decoded": x}


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches and the decoder of all patches.

    Attributes:
        encoder: a transformer with a class token; its ``scan``, ``remat`` and ``dtype`` hold for
            the decoder too.
        width, depth, heads: of the decoder, see `MaskedDecoder`.
    """

    encoder: ViT
    width: int = 512
    depth: int = 8
    heads: int = 16

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        visible: Integer[Array, "batch visible"],
        restore: Integer[Array, "batch tokens"],
    ) -> tuple[Float[Array, "batch tokens values"], dict[str, Array]]:
        """Returns the predicted patches, the encoder's outputs and taps, and the decoder's tap.

        Args:
            images: cut into patches by the encoder.
            visible, restore: from `repalign.losses.masked.random_masking`.
        """
        encoder = self.encoder
        grid = (images.shape[1] // encoder.patch_size, images.shape[2] // encoder.patch_size)
        encoded, taps = encoder(images, visible=visible)
        predictions, decoder_taps = MaskedDecoder(
            encoder.patch_size**2 * images.shape[-1],
            self.width,
            self.depth,
            self.heads,
            scan=encoder.scan,
            remat=encoder.remat,
            dtype=encoder.dtype,
            name="decoder",
        )(encoded["cls"], encoded["patches"], restore, grid=grid)
        return predictions, {**encoded, **taps, **decoder_taps}
