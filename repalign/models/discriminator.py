"""A discriminator of image patches."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.heads import BatchStandardize
from repalign.typing import Array, Float

_kernel = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
    """PatchGAN: 4x4 convolutions with batch norm and leaky ReLU, one logit a patch, high for real.

    The norms use the statistics of the batch they are given and keep no averages: a discriminator
    serves in training only. Their scales start at 1, the official ones at N(1, 0.02).

    Source: Isola et al. 2017 (arXiv:1611.07004); CompVis/taming-transformers@3ba01b2:
    taming/modules/discriminator/model.py:17-67.

    Attributes:
        width: channels of the first convolution; they double with every layer, up to 8 times.
        layers: convolutions of stride 2; 3 give patches of 70x70 pixels.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch rows columns"], dict[str, Array]]:
        """Returns the logits, float32, and no taps.

        Raises:
            ValueError: an image that is smaller than a patch.
        """
        smallest = 2**self.layers * 3
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {x.shape[1:3]} are too small for a discriminator of {self.layers} "
                f"layers, which needs {smallest} pixels."
            )
        x = x.astype(self.dtype)
        for number in range(1, self.layers + 2):
            features = self.width * min(2 ** (number - 1), 8)
            stride = 2 if number <= self.layers else 1
            x = self._conv(features, stride, number, use_bias=number == 1, dtype=self.dtype)(x)
            if number > 1:
                norm = BatchStandardize(dtype=self.dtype, name=f"norm_{number}")
                x = norm(x.reshape(-1, features)).reshape(x.shape)
            x = nn.leaky_relu(x, 0.2)
        x = self._conv(1, 1, self.layers + 2, use_bias=True, dtype=jnp.float32)(x)
        return x[..., 0], {}

    def _conv(
        self, features: int, stride: int, number: int, *, use_bias: bool, dtype: Any
    ) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            (stride, stride),
            padding=1,
            use_bias=use_bias,
            kernel_init=_kernel,
            dtype=dtype,
            name=f"conv_{number}",
        )
