"""Losses by which a student imitates a teacher's features, relations or predictions.

The teacher never receives a gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import token_mean, zero_masked
from repalign.numerics import (
    as_float,
    cosine_similarity,
    inner_products,
    l2_normalize,
    map_row_blocks,
    squared_distances,
)
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Num


def _smooth_l1(difference: Float[Array, "*shape"], beta: ArrayLike) -> Float[Array, "*shape"]:
    """Returns ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``."""
    magnitude = jnp.abs(difference)
    return jnp.where(magnitude < beta, 0.5 * jnp.square(difference) / beta, magnitude - 0.5 * beta)


def _layer_norm(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
    """Returns each vector with mean 0 and (biased) variance 1; constant vectors give 0."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)


_DISTANCES = {
    "l2": lambda student, teacher, beta: jnp.mean(jnp.square(student - teacher), axis=-1),
    "l1": lambda student, teacher, beta: jnp.mean(jnp.abs(student - teacher), axis=-1),
    "smooth_l1": lambda student, teacher, beta: jnp.mean(
        _smooth_l1(student - teacher, beta), axis=-1
    ),
    "cosine": lambda student, teacher, beta: 1.0 - cosine_similarity(student, teacher),
}
_TARGETS = {"none": lambda teacher: teacher, "layer_norm": _layer_norm, "l2": l2_normalize}


def feature_distillation(
    student: Num[Array, "batch *tokens dim"],
    teacher: Num[Array, "batch *tokens dim"],
    *,
    distance: str = "smooth_l1",
    beta: ArrayLike = 1.0,
    target: str = "layer_norm",
    where: Bool[Array, "batch *tokens"] | None = None,
) -> Float[Array, "batch"]:
    """Distance of the student's features to the teacher's, averaged over dimensions and tokens.

    Args:
        distance: ``l2`` (mean squared), ``l1``, ``smooth_l1`` (quadratic below ``beta``) or
            ``cosine`` (1 - cosine).
        target: what is done to the teacher's features: nothing, layer norm without affine
            parameters, or scaling to unit length.
        where: tokens that count; give the masked ones for a masked prediction. An example
            without any has loss 0.

    Raises:
        UserError: an unknown name for ``distance`` or ``target``.

    Sources, as (distance, beta, target, tokens):
    FD (arXiv:2205.14141): smooth_l1, 2, layer_norm, all;
        SwinTransformer/Feature-Distillation@2115145:models/feature_distillation.py:127-164.
    dBOT (arXiv:2209.03917): smooth_l1, 2, layer_norm, masked;
        liuxingbin/dbot@db3b15e:models_mae.py:272-289.
    I-JEPA (arXiv:2301.08243): smooth_l1, 1, layer_norm, target blocks;
        facebookresearch/ijepa@52c1ae9:src/train.py:295-313.
    SRA (arXiv:2505.02831): smooth_l1, 0.05, none, all; the teacher is the EMA model's later block
        at less noise; vvvvvjdy/SRA@1723f85:SiT-SRA/loss.py:10-25.
    CAE (arXiv:2202.03026), its alignment, weight 2: l2, none, masked; Atten4Vis/CAE@a7fd162:
        furnace/engine_for_pretraining.py:70. The teacher is the encoder itself on masked patches.
    IWM (arXiv:2403.00504): l2, none, target tokens; the student is a predictor that is told the
        transformation between source and target. No public code: the paper's formula.
    FitNets (arXiv:1412.6550): l2, none. MR-MAE (arXiv:2303.05475): l2, l2, visible.
    dBOT and Latent MIM divide by the unbiased variance, FD and I-JEPA by the biased one, as here.
    """
    measure = lookup(_DISTANCES, distance, kind="distance")
    student, teacher = zero_masked(student, where), zero_masked(teacher, where)
    fixed = lookup(_TARGETS, target, kind="target")(lax.stop_gradient(as_float(teacher)))
    return token_mean(measure(as_float(student), fixed, beta), where)


def knowledge_distillation(
    student_logits: Num[Array, "batch classes"],
    teacher_logits: Num[Array, "batch classes"],
    *,
    temperature: ArrayLike = 4.0,
) -> Float[Array, "batch"]:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` per example, in nats.

    The factor keeps the gradient's scale independent of T. Source: Hinton et al.
    (arXiv:1503.02531), section 2.
    """
    student = jax.nn.log_softmax(as_float(student_logits) / temperature, axis=-1)
    teacher = jax.nn.log_softmax(lax.stop_gradient(as_float(teacher_logits)) / temperature, axis=-1)
    # exp underflows to 0 before 0 * log 0 could become NaN, unless a logit is -inf.
    divergence = jnp.where(jnp.isneginf(teacher), 0.0, jnp.exp(teacher) * (teacher - student))
    return temperature**2 * jnp.sum(divergence, axis=-1)


def _distances(
    x: Float[Array, "batch dim"], rows: Integer[Array, "rows"]
) -> Float[Array, "rows batch"]:
    """Returns Euclidean distances with a zero gradient where they vanish, 0 to the row itself."""
    squared = squared_distances(x[rows], x)
    apart = (squared > 1e-12) & (rows[:, None] != jnp.arange(x.shape[0]))
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def relational_distance(
    student: Num[Array, "batch student_dim"], teacher: Num[Array, "batch teacher_dim"]
) -> Float[Array, "batch"]:
    """RKD-D: smooth-L1 difference of normalised pairwise distances, averaged for each example.

    Distances are divided by the mean of the positive ones; the widths may differ. The mean of the
    result is the official loss (all N^2 pairs, the diagonal included). Large batches go by blocks
    of rows (`numerics.map_row_blocks`).

    Source: Park et al. (arXiv:1904.05068); lenscloth/RKD@0a6c3c0:metric/loss.py:136-148.
    """

    student, teacher = as_float(student), lax.stop_gradient(as_float(teacher))
    batch = student.shape[0]
    numbers = jnp.arange(batch)

    def mean_distance(x):
        def totals(rows):
            distances = _distances(x, rows)
            return jnp.sum(distances, axis=1), jnp.sum(distances > 0, axis=1, dtype=x.dtype)

        sums, counts = map_row_blocks(totals, numbers, columns=batch)
        mean = jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1.0)
        # All rows equal: every distance is 0 and stays so.
        return jnp.where(mean > 0, mean, 1.0)

    student_mean, teacher_mean = mean_distance(student), mean_distance(teacher)

    def differences(rows):
        difference = _distances(student, rows) / student_mean
        difference -= _distances(teacher, rows) / teacher_mean
        return jnp.mean(_smooth_l1(difference, 1.0), axis=1)

    return map_row_blocks(differences, numbers, columns=batch)


def relational_angle(
    student: Num[Array, "batch student_dim"], teacher: Num[Array, "batch teacher_dim"]
) -> Float[Array, "batch"]:
    """RKD-A: smooth-L1 difference of the angles' cosines at each example, averaged over pairs.

    At example i: ``cos`` between ``x_j - x_i`` and ``x_k - x_i`` for all j, k, one example at a
    time, and for large batches by blocks of j. The mean of the result is the official loss.

    Source: Park et al. (arXiv:1904.05068); lenscloth/RKD@0a6c3c0:metric/loss.py:118-133.
    """
    student, teacher = as_float(student), lax.stop_gradient(as_float(teacher))

    def at_vertex(vertices):
        arms = l2_normalize(student - vertices[0]), l2_normalize(teacher - vertices[1])

        def one_side(rows):
            cosines = [inner_products(some, all_) for some, all_ in zip(rows, arms, strict=True)]
            return jnp.mean(_smooth_l1(cosines[0] - cosines[1], 1.0), axis=1)

        return jnp.mean(map_row_blocks(one_side, arms, columns=student.shape[0]))

    return lax.map(jax.checkpoint(at_vertex), (student, teacher))


def attention_transfer(
    student: Num[Array, "batch tokens student_dim"], teacher: Num[Array, "batch tokens teacher_dim"]
) -> Float[Array, "batch"]:
    """Squared difference of normalised activation maps, averaged over the tokens.

    The map of an example is ``mean_d x_td^2``, scaled to unit length over its tokens.
    Source: Zagoruyko & Komodakis (arXiv:1612.03928) (p = 2, here squared, as in their code).
    """

    def activation(x):
        return l2_normalize(jnp.mean(jnp.square(as_float(x)), axis=-1))

    return jnp.mean(
        jnp.square(activation(student) - activation(lax.stop_gradient(teacher))), axis=-1
    )


def perceptual(
    student: Sequence[Num[Array, "batch *_"]], teacher: Sequence[Num[Array, "batch *_"]]
) -> Float[Array, "batch"]:
    """``sum_j mean (s_j - t_j)^2`` over the maps of several layers of one frozen network.

    Args:
        student: maps that the network gives for the produced image, [batch, ...], which differ in
            shape from layer to layer; ``teacher``: those for the real image.

    Raises:
        ValueError: unequal numbers of maps.

    Source: Johnson et al. (arXiv:1603.08155), section 3.2; jcjohnson/fast-neural-style@813c834:
    fast_neural_style/ContentLoss.lua. Its style part is ``gram_style``.
    """
    return sum(
        token_mean(jnp.square(as_float(ours) - lax.stop_gradient(as_float(theirs))))
        for ours, theirs in zip(student, teacher, strict=True)
    )


def gram_style(
    student: Num[Array, "batch tokens dim"], teacher: Num[Array, "batch tokens dim"]
) -> Float[Array, "batch"]:
    """``||G(s) - G(t)||_F^2`` with the channels' Gram matrix ``G(x) = x^T x / (T D)``.

    It compares which channels are active together, wherever they are; over tokens instead of
    channels, ``alignment.self_similarity_alignment`` does. Source: Johnson et al.
    (arXiv:1603.08155).
    """

    def gram(x):
        x = as_float(x)
        product = jnp.einsum("btd,bte->bde", x, x, precision=lax.Precision.HIGHEST)
        return product / (x.shape[1] * x.shape[2])

    return jnp.sum(jnp.square(gram(student) - gram(lax.stop_gradient(teacher))), axis=(1, 2))


def token_relation_distillation(
    student_queries: Num[Array, "batch heads tokens student_dim"],
    student_keys: Num[Array, "batch heads tokens student_dim"],
    teacher_queries: Num[Array, "batch heads tokens teacher_dim"],
    teacher_keys: Num[Array, "batch heads tokens teacher_dim"],
) -> Float[Array, "batch"]:
    """``KL(softmax(Q_t K_t^T / sqrt(d_t)) || softmax(Q_s K_s^T / sqrt(d_s)))``, mean over tokens.

    Any pair of projections may stand for Q and K: queries and keys distil attention, values with
    values the value relations; the widths may differ, the number of relation heads not.
    Source: Wang et al., MiniLMv2 (arXiv:2012.15828).
    """

    def log_relations(queries, keys):
        logits = jnp.einsum(
            "bhtd,bhsd->bhts", as_float(queries), as_float(keys), precision=lax.Precision.HIGHEST
        )
        return jax.nn.log_softmax(logits * queries.shape[-1] ** -0.5, axis=-1)

    student = log_relations(student_queries, student_keys)
    teacher = lax.stop_gradient(log_relations(teacher_queries, teacher_keys))
    return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), axis=(1, 2))
