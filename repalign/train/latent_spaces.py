"""Latent spaces of frozen encoders that shall work together: columns of them, and evaluators.

Everything here depends on the run's seed: seed s trains the encoder of a column with seed
``s + seed_offset``, so that both sides of a comparison vary from seed to seed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.latent_maps.affine import least_squares
from repalign.latent_maps.procrustes import orthogonal_procrustes
from repalign.latent_maps.relative import relative_representation
from repalign.metrics import probes, retrieval
from repalign.numerics import inner_products, l2_normalize
from repalign.registry import UserError, build, lookup
from repalign.train import encoders
from repalign.train.evaluate import EvaluationContext
from repalign.train.loop import EvaluationResult, Evaluator
from repalign.train.state import TrainState
from repalign.train.step import evaluation_params
from repalign.typing import Array, PyTree


def representation(
    source: Any,
    cache: Any,
    run_seed: int,
    *,
    encoder: str,
    config: str = "",
    seed_offset: int = 0,
    space: str = "absolute",
    anchors: int = 0,
) -> np.ndarray:
    """A data column: every image in the latent space of a frozen encoder, [examples, dim], float32.

    Args:
        source: the data; its ``image`` column is encoded.
        cache: keeps the encoder and its embeddings.
        run_seed: the seed of the run (of the replica).
        encoder, config: see `repalign.train.encoders.frozen_encoder`; its seed is
            ``run_seed + seed_offset``.
        seed_offset: keeps the seeds of two encoders apart.
        space: ``absolute``, the embedding; ``relative``, its cosine similarities to those of the
            anchors (see `repalign.latent_maps.relative`).
        anchors: number of anchors, drawn from the images by the run's seed.
    """
    values = encoders.embeddings(
        source.arrays["image"], cache, encoder=encoder, config=config, seed=run_seed + seed_offset
    )
    view = lookup(_SPACES, space, kind="space")
    return np.asarray(view(values, values[anchor_indices(len(values), anchors, run_seed)]))


def class_means(
    source: Any,
    cache: Any,
    run_seed: int,
    *,
    encoder: str,
    config: str = "",
    seed_offset: int = 0,
    classes: int,
) -> np.ndarray:
    """A data column: the prototypes of all classes in a frozen encoder's space, for every image.

    The prototype of a class is the mean of its L2-normalised embeddings over the source; a class
    without images has zeros. [examples, classes, dim], float32, one array of prototypes for all.
    Arguments as in `representation`.
    """
    values = representation(
        source, cache, run_seed, encoder=encoder, config=config, seed_offset=seed_offset
    )
    unit = np.asarray(l2_normalize(jnp.asarray(values)))
    members = source.arrays["label"][:, None] == np.arange(classes)
    counts = np.maximum(members.sum(axis=0), 1)
    means = (members.astype(np.float32).T @ unit) / counts[:, None]
    return np.broadcast_to(means.astype(np.float32), (len(unit), *means.shape))


def anchor_indices(examples: int, anchors: int, seed: int) -> np.ndarray:
    """Returns the indices of ``anchors`` distinct examples, drawn uniformly.

    Raises:
        UserError: more anchors than examples.
    """
    if anchors > examples:
        raise UserError(f"there are {examples} examples, fewer than the {anchors} anchors.")
    return np.random.default_rng(seed).choice(examples, anchors, replace=False)


_SPACES = {
    "absolute": lambda values, anchors: values,
    "relative": lambda values, anchors: relative_representation(
        jnp.asarray(values), jnp.asarray(anchors)
    ),
}


def run_seed(context: EvaluationContext, key: jax.Array) -> int:
    """Returns the seed of the run whose key an evaluator is given."""
    given = jax.random.key_data(key)
    return next(
        seed
        for seed in context.experiment.config.seeds
        if np.array_equal(jax.random.key_data(jax.random.key(seed)), given)
    )


def stitching(
    context: EvaluationContext,
    *,
    column: str,
    other: Mapping[str, Any],
    reference: Mapping[str, Any],
    alignment: str = "none",
    pairs: int = 0,
    shuffled: bool = False,
    classes: int = 10,
    topk: int = 10,
) -> Evaluator:
    """A classifier trained in one encoder's space, used unchanged on another encoder's.

    The experiment's model is the classifier and was trained on the column; zero-shot stitching
    gives it what another encoder makes of held-out images. Metrics: ``unstitched_accuracy`` on the
    column's own encoder, ``stitched_accuracy`` on the other, ``stitching_gap`` (their difference),
    ``other_probe`` (a linear probe of the other encoder's embeddings, trained there: what they
    hold), and of held-out images across the spaces, by cosine, ``neighbor_jaccard`` and
    ``mean_reciprocal_rank`` (queries of the column's encoder, gallery of the other).

    Args:
        column: the data column that the classifier was trained on (`representation`); it says which
            encoder, space and anchors.
        other: the other encoder: ``encoder``, ``config`` and ``seed_offset`` as in
            `representation`.
        reference: source of the held-out images.
        alignment: how the other encoder's embeddings reach an absolute space: ``none``,
            ``procrustes`` (rotation, shift and scale) or ``affine`` (ridge regression, penalty 0.01
            times the mean variance), fitted on training images that both have encoded.
        pairs: how many training images that fit has, the anchors of as many; 0: all.
        shuffled: control: the other encoder's anchors stand in another order.
        classes: number of classes of ``other_probe``.
        topk: neighbours that are compared.

    Raises:
        UserError: an unknown alignment, or spaces of different width that nothing aligns.
    """
    own = dict(context.experiment.config.data.columns[column])
    space, anchors = own.pop("space", "absolute"), own.pop("anchors", 0)
    own.pop("name")
    align = lookup(_ALIGNMENTS, alignment, kind="alignment")
    held_out = build(reference, place="config.evaluation.metrics.stitching.reference")
    images = {"train": context.source.gather(np.arange(len(context.source)))["image"]}
    test = held_out.gather(np.arange(len(held_out)))
    images["test"] = test["image"]
    labels = jnp.asarray(test["label"])
    train_labels = context.source.gather(np.arange(len(context.source)))["label"]
    model = context.experiment.model

    def embed(section: Mapping[str, Any], seed: int, split: str) -> Array:
        section = dict(section)
        offset = section.pop("seed_offset", 0)
        values = encoders.embeddings(images[split], context.cache, seed=seed + offset, **section)
        return jnp.asarray(values)

    @jax.jit
    def accuracy(params: PyTree, state: PyTree, values: Array) -> Array:
        logits = model.apply({"params": params, **state}, values)
        return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))

    def evaluate(state: TrainState, key: jax.Array) -> EvaluationResult:
        seed = run_seed(context, key)
        own_train, own_test = embed(own, seed, "train"), embed(own, seed, "test")
        other_train, other_test = embed(other, seed, "train"), embed(other, seed, "test")
        probe = probes.linear_probe(
            other_train, jnp.asarray(train_labels), other_test, labels, classes=classes
        )
        chosen = anchor_indices(len(own_train), anchors, seed)
        if space == "relative":
            other_chosen = np.roll(chosen, 1) if shuffled else chosen
            here = relative_representation(own_test, own_train[chosen])
            there = relative_representation(other_test, other_train[other_chosen])
        else:
            fitted = anchor_indices(len(own_train), pairs, seed) if pairs else slice(None)
            here = own_test
            there = align(other_train[fitted], own_train[fitted])(other_test)
        if here.shape[1] != there.shape[1]:
            raise UserError(
                f"the spaces have {here.shape[1]} and {there.shape[1]} dimensions: give "
                "config.evaluation.final_metrics.stitching an alignment, or use relative ones."
            )
        params = evaluation_params(state)
        unstitched = float(accuracy(params, state.forward, here))
        stitched = float(accuracy(params, state.forward, there))
        queries, gallery = l2_normalize(here), l2_normalize(there)
        ranks = retrieval.match_ranks(queries, gallery)
        metrics = {
            "unstitched_accuracy": unstitched,
            "stitched_accuracy": stitched,
            "stitching_gap": unstitched - stitched,
            "other_probe": float(probe),
            "neighbor_jaccard": float(
                jnp.mean(retrieval.neighbor_jaccard(queries, gallery, k=topk))
            ),
            "mean_reciprocal_rank": float(retrieval.mean_reciprocal_rank(ranks)),
        }
        return EvaluationResult(metrics, {})

    return evaluate


def _ridge(source: Array, target: Array):
    return least_squares(source, target, l2=0.01 * float(jnp.mean(jnp.var(source, axis=0))))


_ALIGNMENTS = {
    "none": lambda source, target: lambda values: values,
    "procrustes": lambda source, target: orthogonal_procrustes(source, target, scale=True),
    "affine": _ridge,
}


def compatibility(
    context: EvaluationContext, *, old: Mapping[str, Any], reference: Mapping[str, Any]
) -> Evaluator:
    """Whether a new encoder's queries find their class in a gallery that an old one has indexed.

    Every held-out image is a query, all the others are the gallery, similarity is the cosine, and
    an image of the same class is relevant. Metrics are the mean average precision of three
    searches (and their ``top_1``, the share of queries whose nearest image is relevant):
    ``old_self_test`` (old queries, old gallery), ``cross_test`` (queries of the new encoder, cut to
    the old width, in the old gallery), ``new_self_test`` (new queries, new gallery, whole width);
    and ``compatibility_gain``, the cross-test minus the old self-test: positive where the new
    encoder is worth deploying without indexing the gallery anew (Shen et al. 2020,
    arXiv:2003.11942, the empirical criterion).

    Args:
        old: the old encoder: ``encoder``, ``config`` and ``seed_offset`` as in `representation`.
        reference: source of the held-out images.
    """
    held_out = build(reference, place="config.evaluation.metrics.compatibility.reference")
    data = held_out.gather(np.arange(len(held_out)))
    labels = jnp.asarray(data["label"])
    section = dict(old)
    offset = section.pop("seed_offset", 0)

    @jax.jit
    def search(queries: Array, gallery: Array) -> tuple[Array, Array]:
        itself = jnp.eye(len(labels), dtype=bool)
        scores = inner_products(l2_normalize(queries), l2_normalize(gallery))
        scores = jnp.where(itself, -jnp.inf, scores)
        relevant = (labels[:, None] == labels[None, :]) & ~itself
        nearest = jnp.take_along_axis(relevant, jnp.argmax(scores, axis=1)[:, None], axis=1)
        precision = jnp.mean(retrieval.average_precision(scores, relevant))
        return precision, jnp.mean(nearest.astype(jnp.float32))

    def evaluate(state: TrainState, key: jax.Array) -> EvaluationResult:
        new_encoder = encoders.model_encoder(
            context.experiment.forward, evaluation_params(state), state.forward
        )
        new = jnp.asarray(encoders.encode(new_encoder, data["image"]))
        seed = run_seed(context, key) + offset
        gallery = jnp.asarray(
            encoders.embeddings(data["image"], context.cache, seed=seed, **section)
        )
        searches = {
            "old_self_test": (gallery, gallery),
            "cross_test": (new[:, : gallery.shape[1]], gallery),
            "new_self_test": (new, new),
        }
        metrics = {}
        for name, pair in searches.items():
            precision, top = search(*pair)
            metrics |= {name: float(precision), f"{name}_top_1": float(top)}
        metrics["compatibility_gain"] = metrics["cross_test"] - metrics["old_self_test"]
        return EvaluationResult(metrics, {})

    return evaluate
