"""A latent predictor: a transformer that sees some patches, a small one that predicts others."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.kernels.attention import attention
from repalign.models.layout import split_examples, split_heads
from repalign.models.position import sincos_2d
from repalign.models.transformer import Blocks, LayerNorm, Mlp, xavier
from repalign.models.vit import ViT
from repalign.typing import Array, Float, Integer


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context of another length."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch queries width"], context: Float[Array, "batch keys width"]
    ) -> Float[Array, "batch queries width"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"a width of {width} cannot be split over {self.heads} heads.")
        dense = functools.partial(nn.Dense, width, kernel_init=xavier, dtype=self.dtype)

        def heads(name: str, tokens: Array) -> Array:
            projected = split_examples(dense(name=name)(tokens), hidden=True)
            return projected.reshape(*tokens.shape[:2], self.heads, width // self.heads)

        query = heads("query", x)
        out = attention(
            query, heads("key", context), heads("value", context), partition=split_heads(query)
        )
        out = split_examples(out.reshape(x.shape), hidden=True)
        return split_examples(dense(name="proj")(out))


class PredictorBlock(nn.Module):
    """A pre-norm block of cross-attention and an MLP; queries do not see one another."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch queries width"], context: Float[Array, "batch keys width"]
    ) -> Float[Array, "batch queries width"]:
        cross = CrossAttention(self.heads, dtype=self.dtype, name="attention")
        x = x + cross(LayerNorm(dtype=self.dtype, name="norm_1")(x), context)
        mlp = Mlp(self.mlp_ratio, "gelu", dtype=self.dtype, name="mlp")
        return x + mlp(LayerNorm(dtype=self.dtype, name="norm_2")(x))


class LatentPredictor(nn.Module):
    """An encoder of visible patches, and a predictor that is asked for some of the hidden ones.

    A query is a learned mask token with the position of the patch asked for. It attends to the
    encoder's patches alone, whose positions are added to them once more; so a prediction does not
    depend on what else is asked for. The predictor has the encoder's width.

    Source: Darcet et al., CAPI (arXiv:2502.08769), section 3; facebookresearch/capi@98b4fa1:
    model.py:178-209, 245-462. There positions are rotary, norms are RMS norms, projections have no
    bias, branches are dropped at random and the context has registers.

    Attributes:
        encoder: its ``scan``, ``remat`` and ``dtype`` hold for the predictor too.
        depth, heads: of the predictor; the official one has half the encoder's blocks.
    """

    encoder: ViT
    depth: int = 12
    heads: int = 16

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        visible: Integer[Array, "batch visible"],
        hidden: Integer[Array, "batch hidden"],
    ) -> tuple[Float[Array, "batch hidden encoder_width"], dict[str, Array]]:
        """Returns the predictions, and the encoder's outputs and taps.

        Args:
            images: cut into patches by the encoder.
            visible: indices of the patches that the encoder sees.
            hidden: indices of those to predict.
        """
        encoder = self.encoder
        grid = (images.shape[1] // encoder.patch_size, images.shape[2] // encoder.patch_size)
        encoded, taps = encoder(images, visible=visible)
        table = jnp.asarray(sincos_2d(encoder.width, grid), encoder.dtype)
        table = split_examples(jnp.broadcast_to(table, (images.shape[0], *table.shape)))

        def positions(indices: Array) -> Array:
            return jnp.take_along_axis(table, indices[..., None], axis=1)

        normal = nn.initializers.normal(0.02)
        mask = self.param("mask_token", normal, (encoder.width,), jnp.float32)
        queries = positions(hidden) + mask.astype(encoder.dtype)
        context = encoded["patches"] + positions(visible)
        block = functools.partial(PredictorBlock, self.heads, dtype=encoder.dtype)
        stack = Blocks(block, self.depth, (), encoder.scan, encoder.remat, name="predictor")
        x, _ = stack(queries, context)
        x = LayerNorm(dtype=encoder.dtype, name="predictor_norm")(x)
        return x.astype(jnp.float32), {**encoded, **taps}
