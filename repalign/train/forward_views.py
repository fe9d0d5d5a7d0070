"""Forward passes of several augmented views of each image: small crops beside large ones, and maps
of inner layers.

`repalign.train.forward.two_views` is the same pass with two views.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repalign.data import augment
from repalign.data.pixels import to_unit_range
from repalign.models.heads import MLPHead
from repalign.models.local_projector import LocalProjector
from repalign.registry import UserError, from_section, lookup
from repalign.train.modules import (
    apply_module,
    embedding,
    encode_with_head,
    given_features,
    init_encoder_and_head,
)
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree


def views(
    model: Any,
    *,
    groups: Sequence[Mapping[str, Any]],
    head_hidden: int = 128,
    head_features: int = 64,
    head_layers: int = 2,
    head_norm: str | None = None,
    head_norm_last: bool = False,
    predictor_hidden: int | None = None,
    momentum: bool = False,
    maps: Mapping[str, int] | None = None,
) -> Forward:
    """Any number of augmented views of each image through an encoder and a projection head.

    Features of view i, counted over the groups: ``view_<i>/embedding`` [batch, dim], not
    normalised; ``view_<i>/encoder``, the encoder's output before the head; with a predictor
    ``view_<i>/prediction``; with ``momentum`` ``view_<i>/target``, the embedding by the averaged
    encoder and head, stop-gradiented, of the views of the first size only (the large ones of
    SwAV and DINO); with ``maps`` ``view_<i>/<tap>`` [batch, height, width, features]. Each vector
    is also there for all views at once, ``views/embedding`` [batch, views, dim] and so on.

    Successive views of one size pass the encoder together: batch statistics are those of all of
    them, and those of the next size follow. The head sees the views of all sizes at once.

    Args:
        model: maps images in [0, 1] of any of the sizes to ``(embedding, taps)``, or a transformer,
            whose class token is the embedding.
        groups: for each group of views the ``count`` of its views, and the fields of
            `repalign.data.augment.ViewRecipe` that differ from SimCLR's, as
            ``({"count": 2}, {"count": 4, "size": 14, "crop_scale": (0.05, 0.3)})``.
        head_hidden, head_features, head_layers, head_norm, head_norm_last: the projection head, a
            `repalign.models.heads.MLPHead`. Without layers there is no head: the embedding is the
            encoder's output.
        predictor_hidden: hidden width of an MLP from embeddings to embeddings (BYOL, SimSiam); None
            for none.
        momentum: whether the averaged parameters give targets; ``optimizer.average_decay`` has to
            be set.
        maps: the model's taps whose maps are features, by name, each with the number of features
            of its `repalign.models.local_projector.LocalProjector`.
    """
    recipes = []
    for number, group in enumerate(groups):
        place = f"config.forward.groups[{number}]"
        fields = dict(group)
        if "count" not in fields:
            raise UserError(f"{place}: missing count, the number of its views.")
        count = fields.pop("count")
        recipes += [from_section(augment.ViewRecipe, fields, place=place)] * count
    head = projection_head(
        features=head_features,
        hidden=head_hidden,
        layers=head_layers,
        norm=head_norm,
        norm_last=head_norm_last,
    )
    return several_views(
        model, recipes, head, predictor_hidden=predictor_hidden, momentum=momentum, maps=maps
    )


def projection_head(
    *, features: int, hidden: int, layers: int, norm: str | None, norm_last: bool
) -> MLPHead | None:
    """Returns the head of these fields of a config, None for one without layers."""
    return MLPHead(features, hidden, layers, norm, norm_last) if layers else None


def several_views(
    model: Any,
    recipes: Sequence[augment.ViewRecipe],
    head: MLPHead | None,
    *,
    predictor_hidden: int | None = None,
    momentum: bool = False,
    maps: Mapping[str, int] | None = None,
) -> Forward:
    """Returns the forward pass `views`, given a recipe for each view and the head."""
    if not recipes:
        raise UserError("config.forward.groups: there has to be at least one view.")
    projectors = {tap: LocalProjector(features) for tap, features in (maps or {}).items()}
    sizes = [len(list(run)) for _, run in itertools.groupby(recipe.size for recipe in recipes)]

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        images = to_unit_range(batch["image"])
        if recipes[0].size is not None:
            side = recipes[0].size
            images = jnp.zeros((len(images), side, side, images.shape[3]), images.dtype)
        (embedded, taps), params, state = init_encoder_and_head(model, head, key, images)
        if predictor_hidden is not None:
            predictor = MLPHead(embedded.shape[-1], predictor_hidden)
            variables = predictor.init(jax.random.fold_in(key, 2), embedded[:1])
            params["predictor"] = variables["params"]
        for number, (tap, projector) in enumerate(projectors.items()):
            projector_key = jax.random.fold_in(jax.random.fold_in(key, 3), number)
            values = lookup(taps, tap, kind="tap of the encoder")
            params[f"projector_{tap}"] = projector.init(projector_key, values)["params"]
        return params, state

    def draw(key: Key[Array, ""], images: Array) -> list[Array]:
        """Returns for each size [batch * views, height, width, channels]."""
        keys = iter(jax.random.split(key, len(recipes)))
        drawn = iter([recipe(next(keys), images) for recipe in recipes])
        # The views of an image are neighbours: each device keeps all views of its images.
        stacks = [jnp.stack(list(itertools.islice(drawn, count)), axis=1) for count in sizes]
        return [stack.reshape(-1, *stack.shape[2:]) for stack in stacks]

    def embed(
        params: PyTree, state: PyTree, drawn: Sequence[Array]
    ) -> tuple[dict[str, Array], list[dict[str, Array]], PyTree]:
        """Returns outputs [batch, views, dim], the taps for each size, and the new state."""
        codes, taps = [], []
        for images, count in zip(drawn, sizes[: len(drawn)], strict=True):
            (encoded, tapped), state = apply_module(model, params["encoder"], state, images)
            codes.append(_by_view(embedding(encoded), count))
            taps.append(tapped)
        outputs = {"encoder": jnp.concatenate(codes, axis=1) if len(codes) > 1 else codes[0]}
        outputs["embedding"] = outputs["encoder"]
        if head is not None:
            outputs["embedding"] = _of_rows(head, params["head"], outputs["encoder"])
        return outputs, taps, state

    def local_features(params: PyTree, taps: Sequence[dict[str, Array]]) -> dict[str, Array]:
        features, first = {}, 0
        for tapped, count in zip(taps, sizes, strict=True):
            for tap, projector in projectors.items():
                projected = projector.apply({"params": params[f"projector_{tap}"]}, tapped[tap])
                for view, values in enumerate(_views_of(_by_view(projected, count)), start=first):
                    features[f"view_{view}/{tap}"] = values
            first += count
        return features

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del frozen
        drawn = draw(key, to_unit_range(batch["image"]))
        outputs, taps, new_state = embed(params, state, drawn)
        if predictor_hidden is not None:
            predictor = MLPHead(outputs["embedding"].shape[-1], predictor_hidden)
            outputs["prediction"] = _of_rows(predictor, params["predictor"], outputs["embedding"])
        if momentum:
            if average is None:
                raise UserError(
                    "config.forward.momentum needs averaged parameters: set "
                    "config.optimizer.average_decay."
                )
            targets = embed(average, state, drawn[:1])[0]["embedding"]
            outputs["target"] = jax.lax.stop_gradient(targets)
        features = given_features(batch) | local_features(params, taps)
        for name, values in outputs.items():
            features[f"views/{name}"] = values
            for view, one in enumerate(_views_of(values)):
                features[f"view_{view}/{name}"] = one
        return features, new_state

    return Forward(init, apply, encode=encode_with_head(model, head))


def _by_view(rows: Array, count: int) -> Array:
    """Returns rows [batch * views, ...] as [batch, views, ...]."""
    return rows.reshape(-1, count, *rows.shape[1:])


def _views_of(values: Array) -> list[Array]:
    """Returns each view of [batch, views, ...]."""
    return [values[:, view] for view in range(values.shape[1])]


def _of_rows(module: MLPHead, params: PyTree, values: Array) -> Array:
    """Applies a head to [batch, views, dim], all views at once."""
    rows = module.apply({"params": params}, values.reshape(-1, values.shape[-1]))
    return _by_view(rows, values.shape[1])
