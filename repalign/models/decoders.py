"""Decoders of frozen latent spaces."""

import flax.linen as nn

from repalign.models.transformer import LayerNorm
from repalign.typing import Array, Float


class LatentClassifier(nn.Module):
    """Class logits of a latent vector: layer norm, linear, tanh, layer norm, linear.

    The stitching decoder of relative representations, whose hidden width is the number of anchors:
    lucmos/relreps@627ed13:experiments/sec:model-reusability-vision/vision_stitching_imagenet.ipynb.
    Its second norm takes the statistics of each feature over the batch, in evaluation over the test
    set; a layer norm needs no other examples.
    """

    classes: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch classes"]:
        x = nn.Dense(self.hidden, name="linear_1")(LayerNorm(name="norm_1")(x))
        x = LayerNorm(name="norm_2")(nn.tanh(x))
        return nn.Dense(self.classes, name="linear_2")(x)
