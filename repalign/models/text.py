"""A transformer text encoder: token ids to one vector a text."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.transformer import Blocks, LayerNorm
from repalign.models.vit import ViTBlock
from repalign.numerics import as_float
from repalign.typing import Array, Float, Int


class TextEncoder(nn.Module):
    """Encodes texts of at most ``length`` tokens; token 0 is padding.

    Tokens get a learned embedding and a learned position and pass pre-norm transformer blocks that
    see the whole text; the encoding is the mean of the outputs of the tokens that are not padding
    (zero for an empty text). Padding is a word like others to the blocks: a text has one encoding
    only when it is always padded to the same length, as CLIP's texts are. CLIP itself (openai/CLIP
    @d05afc4:clip/model.py:343-356) lets tokens see what comes before them only and reads the last.

    Attributes:
        vocabulary: number of different tokens, padding included.
        length: the longest text.
        taps: the blocks (from 1) whose outputs are returned as ``block_<number>``.
        scan, remat: see :class:`repalign.models.transformer.Blocks`.
    """

    vocabulary: int
    length: int
    width: int = 512
    depth: int = 12
    heads: int = 8
    taps: tuple[int, ...] = ()
    scan: bool = False
    remat: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch width"], dict[str, Float[Array, "batch tokens width"]]]:
        """Returns the encodings and the taps, among them the normalised ``tokens``.

        Raises:
            ValueError: more tokens than ``length``.
        """
        count = tokens.shape[1]
        if count > self.length:
            raise ValueError(f"a text of {count} tokens is longer than length={self.length}.")
        small = nn.initializers.normal(0.02)
        words = self.param("words", small, (self.vocabulary, self.width), jnp.float32)
        positions = self.param("positions", small, (self.length, self.width), jnp.float32)
        x = (words[tokens] + positions[:count]).astype(self.dtype)
        block = functools.partial(ViTBlock, self.heads, dtype=self.dtype)
        x, taps = Blocks(block, self.depth, self.taps, self.scan, self.remat, name="blocks")(x)
        x = LayerNorm(dtype=self.dtype, name="final_norm")(x)
        words_seen = (tokens != 0)[..., None]
        total = jnp.sum(jnp.where(words_seen, as_float(x), 0.0), axis=1)
        mean = total / jnp.maximum(jnp.sum(words_seen, axis=1), 1)
        return mean.astype(self.dtype), {**taps, "tokens": x}
