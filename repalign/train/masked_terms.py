"""Terms of masked prediction with parameters of their own: heads, and clusters learned online."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.scipy.special import entr

from repalign.losses import clustering, distillation
from repalign.metrics import codebook
from repalign.models.transformer import xavier
from repalign.numerics import as_float, l2_normalize
from repalign.train.objective import Term, TermOutput
from repalign.typing import Array, Features, PyTree


def mimic(
    *,
    student: str,
    teacher: str,
    positions: str | None = None,
    where: str | None = None,
    distance: str = "cosine",
    target: str = "l2",
    name: str = "mimic",
) -> Term:
    """A linear head on the student's tokens mimics a frozen teacher's (MR-MAE).

    The distance by default is ``1 - cosine``, half the squared L2 distance of features scaled to
    unit length; see `repalign.losses.distillation.feature_distillation`.

    Args:
        student: feature [batch, tokens, width].
        teacher: feature [batch, teacher's tokens, dim]; no gradient.
        positions: feature [batch, tokens], which of the teacher's tokens each of the student's is
            (``mae/visible`` for a masked autoencoder's encoder); None: all, in order.
        where: feature [batch, tokens], the tokens that count (``mae/masked``); None: all.
        distance, target: as in the loss.
        name: the name of the term.

    Source: Gao et al. 2023, MR-MAE (arXiv:2303.05475): mimicking at the visible tokens,
    reconstruction at the masked ones. No code was published (Alpha-VL/ConvMAE@4c97b4c announces
    the paper in README.md:23 and holds MCMAE's code only).
    """

    def head(features: Features) -> nn.Dense:
        return nn.Dense(features[teacher].shape[-1], kernel_init=xavier)

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        return {"head": head(features).init(key, features[student])["params"]}, {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        tokens = features[teacher]
        if positions is not None:
            tokens = jnp.take_along_axis(tokens, features[positions][..., None], axis=1)
        loss = distillation.feature_distillation(
            head(features).apply({"params": params["head"]}, features[student]),
            tokens,
            distance=distance,
            target=target,
            where=None if where is None else features[where],
        )
        return TermOutput(loss, state, {})

    return Term(name, apply, init)


def capi(
    *,
    teacher: str,
    student: str,
    positions: str,
    clusters: int = 16_384,
    target_temp: float = 0.06,
    pred_temp: float = 0.12,
    student_temp: float = 0.12,
    iterations: int = 3,
    positionwise: bool = True,
    balanced: bool = True,
    name: str = "capi",
) -> Term:
    """CAPI: cluster the teacher's patches online, predict the clusters of hidden patches.

    The sum of `repalign.losses.clustering.capi_clustering`, whose gradient reaches the clusters
    alone, and of `repalign.losses.clustering.capi_prediction`, whose gradient reaches the student
    and its head. Scores of the teacher are an affine map of its unit-length patches; the student's
    are cosines of its predictions and the head's rows, times a learned scale a cluster.

    Metrics: ``clustering``, ``prediction`` (the two losses), ``target_entropy`` (mean entropy of an
    assignment), ``usage_entropy`` (entropy of the shares of the batch's tokens that each cluster
    wins; ``log(clusters)`` if all are used alike), all in nats.

    Args:
        teacher: feature [batch, tokens, dim], of all patches of an averaged encoder.
        student: feature [batch, hidden, width], predictions.
        positions: feature [batch, hidden], which tokens were predicted.
        clusters: their number; the batch should be about as large with ``positionwise``.
        target_temp, pred_temp, iterations, positionwise: of the clustering loss.
        student_temp: of the prediction loss.
        balanced: False leaves out Sinkhorn's balancing: an assignment is the softmax of the scores
            over ``target_temp`` (an ablation).
        name: the name of the term.

    Source: Darcet et al. (arXiv:2502.08769); facebookresearch/capi@98b4fa1: train_capi.py:71-108,
    model.py:466-563. There the clusters have an optimizer of their own, at half the rate.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        cluster_key, head_key = jax.random.split(key)
        dim, width = features[teacher].shape[-1], features[student].shape[-1]
        return {
            "clusters": {
                "kernel": jax.random.normal(cluster_key, (clusters, dim)),
                "bias": jnp.zeros((clusters,)),
            },
            # Only the direction of a row counts; its length is the scale.
            "head": {
                "kernel": 0.02 * jax.random.truncated_normal(head_key, -2, 2, (clusters, width)),
                "scale": jnp.ones((clusters,)),
            },
        }, {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        patches = l2_normalize(lax.stop_gradient(features[teacher]))
        scores = _products(patches, params["clusters"]["kernel"]) + params["clusters"]["bias"]
        if balanced:
            clustering_loss, assignments = clustering.capi_clustering(
                scores,
                target_temp=target_temp,
                pred_temp=pred_temp,
                iterations=iterations,
                positionwise=positionwise,
            )
        else:
            assignments = jax.nn.softmax(lax.stop_gradient(scores) / target_temp, axis=-1)
            clustering_loss = clustering.capi_prediction(scores, assignments, temperature=pred_temp)
        head = params["head"]
        cosines = _products(l2_normalize(features[student]), l2_normalize(head["kernel"]))
        targets = jnp.take_along_axis(assignments, features[positions][..., None], axis=1)
        prediction_loss = clustering.capi_prediction(
            cosines * head["scale"], targets, temperature=student_temp
        )
        winners = jax.nn.one_hot(jnp.argmax(assignments, axis=-1), clusters)
        metrics = {
            "clustering": jnp.mean(clustering_loss),
            "prediction": jnp.mean(prediction_loss),
            "target_entropy": jnp.mean(jnp.sum(entr(assignments), axis=-1)),
            "usage_entropy": codebook.entropy(jnp.sum(winners, axis=(0, 1))),
        }
        return TermOutput(clustering_loss + prediction_loss, state, metrics)

    return Term(name, apply, init)


def _products(tokens: Array, rows: Array) -> Array:
    """Returns [batch, tokens, rows], the inner products of tokens and rows, float32."""
    highest = lax.Precision.HIGHEST
    return jnp.einsum("btd,kd->btk", as_float(tokens), as_float(rows), precision=highest)
