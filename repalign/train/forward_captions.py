"""Forward passes of paired modalities: images and their captions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from repalign.data.pixels import to_unit_range
from repalign.models.text import TextEncoder
from repalign.numerics import l2_normalize
from repalign.registry import from_section
from repalign.train.modules import (
    apply_module,
    embedding,
    encode_images,
    given_features,
    init_module,
)
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree


def dual_encoder(
    model: Any, *, text: Mapping[str, Any] | None, head_features: int = 512
) -> Forward:
    """Two encoders, each with a linear projection into one space: what CLIP trains.

    Features: ``image/embedding`` and ``text/embedding`` [batch, head_features], l2-normalised. The
    images are not augmented.

    Without a text encoder a second encoder of the model's architecture reads the same images, with
    a start of its own, and gives ``copy/embedding`` in place of ``text/embedding``: two encoders
    and one modality, the control of Fahim et al. (arXiv:2405.18570; abrar-fahim/contrastive-gap
    @8c1a17b:src/config.py:117, ``same_inputs``).

    Args:
        model: maps images in [0, 1] to ``(embedding, taps)``, or a transformer, whose class token
            is the embedding.
        text: the fields of `repalign.models.text.TextEncoder`, which reads the column ``tokens``;
            None for the control.
        head_features: the size of the common space.

    Source: Radford et al. 2021 (arXiv:2103.00020), projections without a bias as in
    openai/CLIP@d05afc4:clip/model.py:354.
    """
    head = nn.Dense(head_features, use_bias=False)
    second_name, second = "copy", model
    if text is not None:
        second_name = "text"
        second = from_section(TextEncoder, text, place="config.forward.text")

    def inputs(batch: Batch) -> dict[str, Array]:
        images = to_unit_range(batch["image"])
        return {"image": images, second_name: images if text is None else batch["tokens"]}

    encoders = {"image": model, second_name: second}

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        params, state = {}, {}
        for index, (name, given) in enumerate(inputs(batch).items()):
            encoder_key, head_key = jax.random.split(jax.random.fold_in(key, index))
            (encoded, _), params[name], state[name] = init_module(
                encoders[name], encoder_key, given
            )
            head_variables = head.init(head_key, embedding(encoded))
            params[f"{name}_head"] = head_variables["params"]
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
        del key, average, frozen
        features, new_state = given_features(batch), {}
        for name, given in inputs(batch).items():
            (encoded, _), new_state[name] = apply_module(
                encoders[name], params[name], state[name], given
            )
            projected = head.apply({"params": params[f"{name}_head"]}, embedding(encoded))
            features[f"{name}/embedding"] = l2_normalize(projected)
        return features, new_state

    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, Features]:
        return encode_images(model, params["image"], state["image"], images)

    return Forward(init, apply, encode=encode)
