"""The forward pass of an encoder alone, for objectives whose terms bring their own heads."""

from typing import Any

import jax

from repalign.data import augment
from repalign.data.pixels import to_unit_range
from repalign.train.modules import (
    apply_module,
    embedding,
    encode_images,
    given_features,
    init_module,
)
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree


def encoder(model: Any, *, shift: int = 0, flip: float = 0.0) -> Forward:
    """An encoder alone: ``encoder/embedding`` [batch, features], not normalised, and ``label``.

    Images are shifted by up to ``shift`` pixels and mirrored with probability ``flip``.

    Args:
        model: maps images in [0, 1] to ``(embedding, taps)``, or a transformer, whose class token
            is the embedding.
        shift, flip: see above; 0 leaves the step out.
    """

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        _, params, state = init_module(model, key, to_unit_range(batch["image"]))
        return params, state

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
        shift_key, flip_key = jax.random.split(key)
        images = to_unit_range(batch["image"])
        if shift:
            images = augment.translate(shift_key, images, pixels=shift)
        if flip:
            images = augment.horizontal_flip(flip_key, images, probability=flip)
        (encoded, _), new_state = apply_module(model, params, state, images)
        own = {"encoder/embedding": embedding(encoded), "label": batch["label"]}
        return given_features(batch) | own, new_state

    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, Features]:
        return encode_images(model, params, state, images)

    return Forward(init, apply, encode=encode)
