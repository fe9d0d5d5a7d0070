"""Forward passes: from a batch to named features.

Each function here takes a model and returns a `Forward`. A column of the batch whose name contains
a slash (``teacher/patches``) is a feature already and is passed on as it is.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repalign.data import augment
from repalign.data.pixels import to_signed_range, to_unit_range
from repalign.generation import flow as flows
from repalign.models.heads import LinearClassifier, MLPHead
from repalign.registry import build, from_section, lookup
from repalign.train.state import Batch, Forward, FrozenParams
from repalign.typing import Array, Features, Float, Key, PyTree

LATENT_SCALE = 0.18215
"""What Stable Diffusion's VAE latents are multiplied by (sihyun-yu/REPA@67f7145:train.py:172)."""


def flow(
    model: Any,
    *,
    data: str = "image",
    teacher: Mapping[str, Any] | None = None,
    interpolant: str = "linear",
    time_weighting: str = "uniform",
    label_dropout: float = 0.1,
) -> Forward:
    """A flow model as training sees it: noise the data at a random time, predict the velocity.

    Features: ``flow/data``, ``flow/noise`` [batch, height, width, channels], ``flow/time`` [batch],
    ``sit/output`` and the model's taps (``sit/block_4``, ...); with a teacher, ``teacher/patches``
    [batch, tokens, dim], stop-gradiented. Each label becomes the null label ``model.classes`` with
    probability ``label_dropout``.

    Args:
        model: predicts from ``(x, time, label)``.
        data: ``image``, the column of that name in [-1, 1]; or ``moments``, latents drawn from the
            column of that name (see `sample_latents`).
        teacher: a section that names a frozen encoder of the column ``image``, such as
            `repalign.pretrained.dinov2.dinov2_teacher`, and its arguments; it runs in every step.
            None: the terms need no teacher, or its tokens are a column already.
        interpolant, time_weighting: see `repalign.generation.flow`.
        label_dropout: for classifier-free guidance.
    """
    path = flows.interpolant(interpolant)
    draw = lookup(_DATA, data, kind="data of a flow model")
    encoder, frozen_params = None, None
    if teacher is not None:
        encoder = build(teacher, place="config.forward.teacher")
        frozen_params = FrozenParams(encoder.shapes, encoder.load)

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        data = draw(key, batch)
        time = jnp.zeros((data.shape[0],), jnp.float32)
        return model.init(key, data, time, batch["label"])["params"], {}

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del average
        time_key, noise_key, label_key = jax.random.split(key, 3)
        data = draw(jax.random.fold_in(key, 3), batch)
        noise = jax.random.normal(noise_key, data.shape, data.dtype)
        time = flows.sample_time(
            time_key, data.shape[0], weighting=time_weighting, interpolant=path
        )
        label = flows.drop_labels(
            label_key, batch["label"], rate=label_dropout, null_label=model.classes
        )
        noised = flows.interpolate(data, noise, time, interpolant=path)
        output, taps = model.apply({"params": params}, noised, time, label)
        features = _columns_that_are_features(batch)
        if encoder is not None:
            patches = encoder.apply(frozen, batch["image"])
            features["teacher/patches"] = jax.lax.stop_gradient(patches)
        features |= {
            "flow/data": data,
            "flow/noise": noise,
            "flow/time": time,
            "sit/output": output,
            **{f"sit/{name}": tap for name, tap in taps.items()},
        }
        return features, state

    return Forward(init, apply, frozen_params)


def sample_latents(
    key: Key[Array, ""], moments: Float[Array, "batch height width moments"]
) -> Float[Array, "batch height width channels"]:
    """Returns ``0.18215 (mean + std noise)``; the moments are ``[mean, std]`` along the last axis.

    The second half is the standard deviation and not its logarithm: what the official preprocessing
    stores (sihyun-yu/REPA@67f7145:train.py:71-77, there with the channels first).
    """
    mean, std = jnp.split(moments, 2, axis=-1)
    return (mean + std * jax.random.normal(key, mean.shape, mean.dtype)) * LATENT_SCALE


_DATA = {
    "image": lambda key, batch: to_signed_range(batch["image"]),
    "moments": lambda key, batch: sample_latents(key, batch["moments"]),
}


def two_views(
    model: Any,
    *,
    view: Mapping[str, Any],
    head_hidden: int = 128,
    head_features: int = 64,
) -> Forward:
    """Two augmented views of each image through an encoder and a projection head.

    ``view`` holds the fields of `repalign.data.augment.ViewRecipe` that differ from SimCLR's.

    Features: ``view_0/embedding``, ``view_1/embedding`` [batch, head_features], not normalised, and
    the encoder's outputs before the head, ``view_0/encoder`` and ``view_1/encoder``.
    """
    head = MLPHead(features=head_features, hidden=head_hidden)
    recipe = from_section(augment.ViewRecipe, view, place="config.forward.view")

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
        images = to_unit_range(batch["image"])
        views = jnp.concatenate(augment.two_views(key, images, first=recipe))
        encoded, _ = model.apply({"params": params["encoder"]}, views)
        embedded = head.apply({"params": params["head"]}, encoded)
        features = _columns_that_are_features(batch)
        for view, (code, embedding) in enumerate(
            zip(jnp.split(encoded, 2), jnp.split(embedded, 2), strict=True)
        ):
            features |= {f"view_{view}/encoder": code, f"view_{view}/embedding": embedding}
        return features, state

    return Forward(_encoder_and_head_init(model, head), apply)


def supervised(model: Any, *, classes: int, shift: int = 2, flip: float = 0.5) -> Forward:
    """An encoder with a linear classifier: ``classifier/logits`` [batch, classes] and ``label``.

    Images are shifted by up to ``shift`` pixels and mirrored with probability ``flip``.
    """
    head = LinearClassifier(classes)

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
        images = augment.translate(shift_key, to_unit_range(batch["image"]), pixels=shift)
        images = augment.horizontal_flip(flip_key, images, probability=flip)
        encoded, _ = model.apply({"params": params["encoder"]}, images)
        logits = head.apply({"params": params["head"]}, encoded)
        features = _columns_that_are_features(batch)
        return features | {"classifier/logits": logits, "label": batch["label"]}, state

    return Forward(_encoder_and_head_init(model, head), apply)


def _encoder_and_head_init(model: Any, head: Any):
    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        encoder_key, head_key = jax.random.split(key)
        (embedding, _), variables = model.init_with_output(
            encoder_key, to_unit_range(batch["image"])
        )
        head_params = head.init(head_key, embedding)["params"]
        return {"encoder": variables["params"], "head": head_params}, {}

    return init


def _columns_that_are_features(batch: Batch) -> dict[str, Array]:
    return {name: column for name, column in batch.items() if "/" in name}
