"""The forward pass of a tokenizer: encode, quantize, decode."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repalign.data import augment
from repalign.data.pixels import to_signed_range, to_unit_range
from repalign.registry import build
from repalign.train.modules import given_features
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree


def tokenizer(model: Any, *, quantizer: Mapping[str, Any], flip: float = 0.0) -> Forward:
    """An autoencoder with a quantizer between its two halves.

    Features: ``tokenizer/image`` and ``tokenizer/reconstruction`` [batch, height, width, channels]
    in [-1, 1], ``tokenizer/latent`` and ``tokenizer/quantized`` [batch, rows, columns, dim],
    ``tokenizer/indices`` [batch, rows, columns] (and an axis more where a vector has several), and
    the quantizer's own loss of every vector, ``tokenizer/loss`` [batch, rows, columns]. The
    reconstruction's gradient passes the quantizer as it is configured to; the latent's own does
    not.

    Args:
        model: has ``encode``, ``decode`` and a ``__call__`` of both, such as
            `repalign.models.tokenizer.Tokenizer`.
        quantizer: a section that names a bottleneck, such as
            `repalign.quantizers.bottleneck.VectorQuantizer`, and its fields.
        flip: probability of a mirror image.
    """
    bottleneck = build(quantizer, place="config.forward.quantizer")

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        model_key, quantizer_key = jax.random.split(key)
        images = to_signed_range(batch["image"])
        (_, taps), variables = model.init_with_output(model_key, images)
        params, state = bottleneck.init(quantizer_key, taps["latent"].shape[-1])
        return {"autoencoder": variables["params"], "quantizer": params}, state

    def quantize(params: PyTree, state: PyTree, images: Array, key: Key[Array, ""] | None):
        autoencoder = {"params": params["autoencoder"]}
        z = model.apply(autoencoder, images, method="encode")
        return z, *bottleneck.apply(params["quantizer"], state, z, key)

    def decode(params: PyTree, state: PyTree, quantized: Array) -> Array:
        del state
        return model.apply({"params": params["autoencoder"]}, quantized, method="decode")

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del average, frozen
        images = to_signed_range(batch["image"])
        flip_key, quantizer_key = jax.random.split(key)
        if flip:
            images = augment.horizontal_flip(flip_key, images, probability=flip)
        z, output, new_state = quantize(params, state, images, quantizer_key)
        decoded = decode(params, state, output.quantized)
        features = {
            **given_features(batch),
            "tokenizer/image": images,
            "tokenizer/reconstruction": decoded,
            "tokenizer/latent": z,
            "tokenizer/quantized": output.quantized,
            "tokenizer/indices": output.indices,
            "tokenizer/loss": output.loss,
        }
        return features, new_state

    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, Features]:
        z, output, _ = quantize(params, state, to_unit_range(images) * 2.0 - 1.0, None)
        taps = {"latent": z, "map": output.quantized, "indices": output.indices}
        vectors = output.quantized.reshape(len(images), -1, output.quantized.shape[-1])
        return jnp.mean(vectors, axis=1), taps

    return Forward(init, apply, encode=encode, decode=decode)
