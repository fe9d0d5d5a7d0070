"""A multi-layer perceptron as an image encoder, where positions of small images are inputs."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.layout import split_examples
from repalign.models.transformer import DataFormat, to_nhwc
from repalign.typing import Array, Float


class MLP(nn.Module):
    """(Linear, ReLU) for each of ``widths``, then Linear to ``features``, on flattened images.

    Attributes:
        widths: of the hidden layers.
        features: of the embedding, which has no activation.
    """

    widths: tuple[int, ...] = (128, 128)
    features: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch _ _ _"], *, data_format: DataFormat = "NHWC"
    ) -> tuple[Float[Array, "batch features"], dict[str, Float[Array, "batch _"]]]:
        """Returns the embedding, and the last hidden layer as the tap ``hidden``."""
        x = to_nhwc(x, data_format).astype(self.dtype)
        x = split_examples(x.reshape(x.shape[0], -1))
        for number, width in enumerate(self.widths, start=1):
            dense = nn.Dense(
                width,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"linear_{number}",
            )
            x = nn.relu(dense(x))
        out = nn.Dense(self.features, dtype=self.dtype, name=f"linear_{len(self.widths) + 1}")(x)
        return out, {"hidden": x}
