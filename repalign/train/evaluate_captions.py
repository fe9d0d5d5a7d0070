"""Evaluators of paired modalities: the gap between them, and zero-shot classification."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.data.captioned_shapes import FACTORS, captions, tokenize
from repalign.metrics import geometry, probes
from repalign.numerics import inner_products, l2_normalize
from repalign.registry import build, lookup
from repalign.train.evaluate import EvaluationContext
from repalign.train.loop import EvaluationResult, Evaluator
from repalign.train.state import TrainState
from repalign.train.step import evaluation_params
from repalign.typing import Array

_BATCH = 500


def modality_gap(
    context: EvaluationContext,
    *,
    reference: Mapping[str, Any],
    first: str = "image/embedding",
    second: str = "text/embedding",
) -> Evaluator:
    """How far two features of the same examples lie apart on the sphere.

    ``modality_gap``: distance of the two mean unit vectors (`repalign.metrics.geometry`), in
    [0, 2]. ``linear_separability``: accuracy at which a linear classifier tells which of the two a
    unit vector is, fitted on the first 80 % of the pairs and tested on the rest; 0.5 if they are
    mixed, 1 if a plane parts them. ``pair_distance``: mean squared distance of the pairs, in
    [0, 4].

    Args:
        reference: source of held-out examples.
        first, second: features [batch, dim] of the forward pass, which is run as in training.

    Source: Fahim et al. 2024 (arXiv:2405.18570), section 3; abrar-fahim/contrastive-gap
    @8c1a17b:src/evaluator.py:1568-1660. Theirs is scikit-learn's LogisticRegression with C = 1 on
    the raw vectors; the classifier here standardises them and is penalised less, so it finds a
    parting plane where theirs may not.
    """
    held_out = build(reference, place="config.evaluation.metrics.modality_gap.reference")
    examples = held_out.gather(np.arange(len(held_out)))
    fitted = int(0.8 * len(held_out))

    @jax.jit
    def measure(a: Array, b: Array) -> dict[str, Array]:
        both = jnp.concatenate([a[:fitted], b[:fitted]]), jnp.concatenate([a[fitted:], b[fitted:]])
        sides = [jnp.repeat(jnp.arange(2), len(part) // 2) for part in both]
        return {
            "modality_gap": geometry.modality_gap(a, b),
            "linear_separability": probes.linear_probe(
                both[0], sides[0], both[1], sides[1], classes=2
            ),
            "pair_distance": jnp.mean(jnp.sum(jnp.square(a - b), axis=1)),
        }

    def evaluate(state: TrainState, key: Array) -> EvaluationResult:
        del key
        pair = _features(context, state, examples, (first, second))
        values = measure(*(l2_normalize(one) for one in pair))
        return EvaluationResult({name: float(value) for name, value in values.items()}, {})

    return evaluate


def zero_shot(context: EvaluationContext, *, references: Mapping[str, Any]) -> Evaluator:
    """Accuracy of naming captioned shapes by the captions of the classes.

    A class is one of the 48 pairs of a shape and a colour. Its vector is the normalised mean of
    the unit vectors of its 81 captions, one for every size, place and background (CLIP's mean over
    templates); an image gets the class of the largest inner product. Gives ``zero_shot_<name>``,
    in [0, 1], for each reference.

    Args:
        references: sources by name, made by `repalign.data.captioned_shapes.captioned_shapes`.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.4; abrar-fahim/contrastive-gap
    @8c1a17b:src/evaluator.py:1197-1210.
    """
    place = "config.evaluation.metrics.zero_shot.references"
    sources = {
        name: build(section, place=f"{place}.{name}") for name, section in references.items()
    }
    held_out = {name: source.gather(np.arange(len(source))) for name, source in sources.items()}
    every = np.array(list(itertools.product(*map(range, map(len, FACTORS.values())))), np.int32)
    classes = len(FACTORS["shape"]) * len(FACTORS["color"])
    # The captions come with images of nothing, which no caption's encoding depends on.
    size = next(iter(held_out.values()))["image"].shape[1:]
    prompts = {
        "image": np.zeros((len(every), *size), np.uint8),
        "tokens": tokenize(captions(every)),
    }

    def evaluate(state: TrainState, key: Array) -> EvaluationResult:
        del key
        (text,) = _features(context, state, prompts, ("text/embedding",))
        # Shape and colour are the leading factors: a class's captions are neighbours.
        text = l2_normalize(text).reshape(classes, -1, text.shape[-1])
        text = l2_normalize(jnp.mean(text, axis=1))
        metrics = {}
        for name, examples in held_out.items():
            (image,) = _features(context, state, examples, ("image/embedding",))
            named = jnp.argmax(inner_products(l2_normalize(image), text), axis=1)
            shape, color = examples["factors"][:, 0], examples["factors"][:, 1]
            truth = shape * len(FACTORS["color"]) + color
            metrics[f"zero_shot_{name}"] = float(np.mean(np.asarray(named) == truth))
        return EvaluationResult(metrics, {})

    return evaluate


def _features(
    context: EvaluationContext,
    state: TrainState,
    examples: Mapping[str, np.ndarray],
    names: tuple[str, ...],
) -> list[Array]:
    """Returns features [examples, dim] of the forward pass; what they do not need is not run."""

    @jax.jit
    def one_batch(state: TrainState, batch: Mapping[str, Array]) -> list[Array]:
        features, _ = context.experiment.forward.apply(
            evaluation_params(state),
            batch,
            jax.random.key(0),
            average=state.average,
            frozen=state.frozen,
            state=state.forward,
        )
        return [lookup(features, name, kind="feature of the forward pass") for name in names]

    count = len(next(iter(examples.values())))
    parts = [
        one_batch(
            state, {name: column[start : start + _BATCH] for name, column in examples.items()}
        )
        for start in range(0, count, _BATCH)
    ]
    return [jnp.concatenate(part) for part in zip(*parts, strict=True)]
