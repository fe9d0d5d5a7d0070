"""Losses that align a generator's or tokenizer's representation with a teacher's, and prefixes.

A teacher never receives a gradient. Tokens are [batch, tokens, dim]; ``where`` holds for the tokens
(or, of shape [batch], for the examples) that count: an example without any has loss 0.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from repalign.losses.batch_statistics import keep, token_mean, zero_masked
from repalign.losses.correlation import cka_loss
from repalign.numerics import as_float, cosine_similarity, l2_normalize
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Num, Scalar


def _in_pairs(
    students: Array | Sequence[Array], teachers: Array | Sequence[Array]
) -> list[tuple[Array, Array]]:
    """Returns the (student, teacher) pairs of two arrays or of two sequences of equal length."""
    students = [students] if isinstance(students, jax.Array | np.ndarray) else list(students)
    teachers = [teachers] if isinstance(teachers, jax.Array | np.ndarray) else list(teachers)
    if len(students) != len(teachers) or not teachers:
        raise ValueError(
            f"{len(students)} student arrays for {len(teachers)} teachers: pass one student array "
            "(for REPA, one projector output) for each teacher, and at least one."
        )
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"pair {index}: the student has shape {student.shape} and the teacher "
                f"{teacher.shape}; project the student to the teacher's width, and resize one "
                "image or token grid so that the numbers of tokens agree."
            )
    return list(zip(students, teachers, strict=True))


def repa(
    projections: Num[Array, "batch tokens dim"] | Sequence[Num[Array, "batch _ _"]],
    teachers: Num[Array, "batch tokens dim"] | Sequence[Num[Array, "batch _ _"]],
    *,
    where: Bool[Array, "batch"] | Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch"]:
    """REPA: negative cosine similarity of projected hidden tokens to a frozen encoder's patches.

    ``loss_b = -(1/T) sum_t cos(h_bt, y_bt)``, averaged over the teachers if there are several.

    Args:
        projections: the projector's output, or one output for each teacher.
        teachers: the encoder's patch tokens, or a sequence of them (widths may differ).
        where: tokens or examples that count; all by default.

    Returns:
        One value per example, in [-1, 1]. No gradient reaches ``teachers``.

    Raises:
        ValueError: unequal numbers of projections and teachers, or unequal shapes in a pair.

    Source: Yu et al., Representation Alignment for Generation (arXiv:2410.06940), L_REPA;
    sihyun-yu/REPA@67f7145:loss.py:78-88, which averages the same terms over the batch. A zero
    token has similarity and gradient 0 here (torch's ``normalize`` clamps the norm at 1e-12).
    """
    pairs = _in_pairs(projections, teachers)
    losses = [
        token_mean(
            -cosine_similarity(
                zero_masked(projection, where), lax.stop_gradient(zero_masked(teacher, where))
            ),
            where,
        )
        for projection, teacher in pairs
    ]
    return sum(losses) / len(losses)


def spatial_normalize(
    tokens: Num[Array, "batch tokens dim"], *, alpha: ArrayLike = 1.0, epsilon: ArrayLike = 1e-6
) -> Float[Array, "batch tokens dim"]:
    """iREPA's teacher: ``(y - alpha mean_t y) / (std_t y + epsilon)`` over each image's tokens.

    Per dimension, with the unbiased standard deviation (0 for a single token). It removes most of
    the global component, so that the spatial structure is what ``repa`` then matches. The result
    carries no gradient.

    Args:
        alpha: how much of the mean to remove; 0.6 in the paper's latent-space runs, 1 removes all.

    Source: Singh et al., iREPA (arXiv:2512.10794); End2End-Diffusion/iREPA@99ad4ac:
    jit/spnorm.py:8-22 and ldm/utils.py:113-127.
    """
    tokens = lax.stop_gradient(as_float(tokens))
    mean = jnp.mean(tokens, axis=1, keepdims=True)
    squared = jnp.sum(jnp.square(tokens - mean), axis=1, keepdims=True)
    deviation = jnp.sqrt(squared / max(tokens.shape[1] - 1, 1))
    return (tokens - alpha * mean) / (deviation + epsilon)


def attention_alignment(
    student_logits: Num[Array, "batch heads queries keys"]
    | Sequence[Num[Array, "batch heads queries keys"]],
    teacher_logits: Num[Array, "batch heads queries keys"]
    | Sequence[Num[Array, "batch heads queries keys"]],
) -> Float[Array, "batch"]:
    """HASTE: cross-entropy of the student's attention maps against a frozen teacher's.

    ``-sum_k softmax(T)_k log softmax(S)_k`` over the keys, averaged over queries, heads and layer
    pairs. Pass attention logits (before the softmax), one array for each layer pair. The teacher
    receives no gradient. Released setting: layers 4-7 and the first 12 heads of SiT-XL/2 against
    layers 8-11 of DINOv2-B, weight 0.5, together with ``repa``, both stopped part of the way.

    Raises:
        ValueError: unequal numbers of layers, or unequal shapes in a pair.

    Source: Wang et al., HASTE (arXiv:2505.16792); NUS-HPC-AI-Lab/HASTE@eb7b1f1:
    loss.py:94-101.
    """
    losses = []
    for student, teacher in _in_pairs(student_logits, teacher_logits):
        target = jax.nn.softmax(lax.stop_gradient(as_float(teacher)), axis=-1)
        entropy = -jnp.sum(target * jax.nn.log_softmax(as_float(student), axis=-1), axis=-1)
        losses.append(jnp.mean(entropy, axis=(1, 2)))
    return sum(losses) / len(losses)


def _self_similarity(tokens: Num[Array, "batch tokens dim"]) -> Float[Array, "batch tokens tokens"]:
    """Returns the cosine similarities of each image's tokens."""
    unit = l2_normalize(tokens)
    return jnp.einsum("btd,bsd->bts", unit, unit, precision=lax.Precision.HIGHEST)


def _pair_mean(
    values: Float[Array, "batch tokens tokens"],
    where: Bool[Array, "batch"] | Bool[Array, "batch tokens"] | None,
) -> Float[Array, "batch"]:
    """Returns each example's mean over pairs of tokens that both count."""
    if where is not None and where.ndim == 2:
        where = (where[:, :, None] & where[:, None, :]).reshape(where.shape[0], -1)
    return token_mean(values.reshape(values.shape[0], -1), where)


def self_similarity_alignment(
    student: Num[Array, "batch tokens student_dim"],
    teacher: Num[Array, "batch tokens teacher_dim"],
    *,
    where: Bool[Array, "batch"] | Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch"]:
    """Mean squared difference of token self-similarity (Gram) matrices, in [0, 4] per example.

    ``(1/T^2) sum_ts (cos(h_t, h_s) - cos(y_t, y_s))^2``; the widths may differ, so no projector is
    needed. The teacher receives no gradient.

    Source: the structural term of SARA (arXiv:2503.08253), there a Frobenius norm of unstated
    scale; the Gram anchoring loss of DINOv3 (arXiv:2508.10104).
    """
    student, teacher = zero_masked(student, where), zero_masked(teacher, where)
    difference = _self_similarity(student) - _self_similarity(lax.stop_gradient(teacher))
    return _pair_mean(jnp.square(difference), where)


def patch_kernel_alignment(
    student: Num[Array, "batch tokens student_dim"],
    teacher: Num[Array, "batch tokens teacher_dim"],
    *,
    where: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch"]:
    """PaKA: ``1 - CKA`` of an image's student and teacher tokens, in [0, 1] per example.

    Linear kernels over the tokens, centred (``correlation.cka_loss`` over tokens in place of
    examples): which patches belong together, whatever the width, scale or rotation of the features.
    The teacher receives no gradient.

    Args:
        where: tokens that count; an example with fewer than two has loss 0.

    Source: PaKA (arXiv:2509.05606); lightly-ai/lightly@e8d317f:
    lightly/loss/patch_kernel_alignment_loss.py:84-137, which averages over the images that have two
    tokens and forms the token by token kernels, where the products of features are used here.
    """
    teacher = lax.stop_gradient(teacher)
    if where is None:
        return jax.vmap(cka_loss)(student, teacher)
    losses = jax.vmap(lambda a, b, mask: cka_loss(a, b, where=mask))(student, teacher, where)
    return jnp.where(jnp.sum(where, axis=1) >= 2, losses, 0.0)


def foundation_model_alignment(
    latents: Num[Array, "batch tokens dim"],
    features: Num[Array, "batch tokens dim"],
    *,
    cosine_margin: ArrayLike = 0.5,
    distance_margin: ArrayLike = 0.25,
    cosine_weight: ArrayLike = 1.0,
    distance_weight: ArrayLike = 1.0,
    where: Bool[Array, "batch"] | Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch"]:
    """VA-VAE: keeps a tokenizer's latents near a vision foundation model's features.

    ``w_c mean_t relu(1 - m_c - cos(z_t, f_t)) + w_d mean_ts relu(|cos(z_t, z_s) - cos(f_t, f_s)|
    - m_d)`` per example: inside the margins the latents are free to serve reconstruction.

    Args:
        latents: the tokenizer's latents, mapped linearly to the features' width.
        features: the frozen model's tokens on the same grid; no gradient.
        cosine_margin: 0.5 and ``distance_margin`` 0.25 are the released configuration's.

    Source: Yao et al., VA-VAE (arXiv:2501.01423); hustvl/LightningDiT@2725fed:
    vavae/ldm/modules/losses/contperceptual.py:123-134. The adaptive weight, a ratio of gradient
    norms, belongs to the training step.
    """
    latents, features = zero_masked(latents, where), zero_masked(features, where)
    features = lax.stop_gradient(features)
    cosine = jax.nn.relu(1.0 - cosine_margin - cosine_similarity(latents, features))
    difference = jnp.abs(_self_similarity(latents) - _self_similarity(features))
    return cosine_weight * token_mean(cosine, where) + distance_weight * _pair_mean(
        jax.nn.relu(difference - distance_margin), where
    )


def modality_gap(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """``||mean_i a_i - mean_i b_i||^2`` of l2-normalised embeddings of two modalities, in [0, 4].

    A batch statistic; both sides receive gradients. The other terms that close the gap, pairwise
    distances and uniformity across modalities, are in ``uniformity``.

    Source: the gap of Liang et al. (arXiv:2203.02053), squared so that it is smooth at 0.
    """
    a, b = zero_masked(a, where), zero_masked(b, where)
    difference, count = keep(l2_normalize(a) - l2_normalize(b), where)
    return jnp.sum(jnp.square(jnp.sum(difference, axis=0) / jnp.maximum(count, 1.0)))


def matryoshka(
    loss: Callable[..., Array],
    *embeddings: Num[Array, "batch dim"],
    prefixes: Sequence[int],
    relative_importance: Sequence[float] | None = None,
) -> Float[Array, "*shape"]:
    """Applies a loss to nested prefixes: ``sum_m c_m loss(a[:, :m], b[:, :m], ...)``.

    Args:
        loss: any loss of the embeddings; bind hyper-parameters, labels and masks before.
        embeddings: arrays of equal width, each cut to its first m dimensions.
        prefixes: the widths m, such as 8, 16, ..., D.
        relative_importance: the weights c_m; 1 each by default.

    Returns:
        What ``loss`` returns, summed over the prefixes.

    Raises:
        ValueError: a prefix outside [1, D], or another number of weights.

    Source: Kusupati et al. (arXiv:2205.13147), eq. 1.
    """
    weights = [1.0] * len(prefixes) if relative_importance is None else list(relative_importance)
    width = min(embedding.shape[1] for embedding in embeddings)
    if not prefixes or min(prefixes) < 1 or max(prefixes) > width:
        raise ValueError(f"prefixes must be between 1 and the width {width}, got {list(prefixes)}.")
    if len(weights) != len(prefixes):
        raise ValueError(f"{len(weights)} relative importances for {len(prefixes)} prefixes.")
    return sum(
        weight * loss(*(embedding[:, :prefix] for embedding in embeddings))
        for weight, prefix in zip(weights, prefixes, strict=True)
    )


def matryoshka_2d(
    loss: Callable[..., Array],
    *layers: Num[Array, "layers batch dim"],
    prefixes: Sequence[int],
    depths: Sequence[int] | None = None,
    kl_weight: ArrayLike = 1.0,
    kl_temperature: ArrayLike = 0.3,
) -> Float[Array, "*shape"]:
    """Matryoshka over layers too: a shallow layer's prefix has to serve as the last layer's.

    ``M(last) + (1/n) sum_l M(l) / l + w T sum_l KL(softmax(last / T) || softmax(l / T))``, with M
    the sum of the loss over the prefixes (``matryoshka``) and the n shallow layers l. The paper
    draws one shallow layer and one prefix beside the whole width at every step; give those.

    Args:
        loss: any loss of the embeddings, as for ``matryoshka``.
        layers: one array for each input of the loss, the layers' embeddings stacked, last layer
            last.
        prefixes: the widths.
        depths: the number l, from 1, of each shallow layer given; 1, 2, ... by default.
        kl_weight, kl_temperature: w and T. The divergence is over the dimensions, averaged over the
            inputs of the loss; both layers receive its gradient.

    Returns:
        What ``loss`` returns, with the mean divergence over the batch added to every value.

    Raises:
        ValueError: only one layer, or another number of depths than of shallow layers.

    Source: Li et al. (arXiv:2402.14776); UKPLab/sentence-transformers@85ec645:
    sentence_transformers/losses/AdaptiveLayerLoss.py:205-250 with losses/Matryoshka2dLoss.py. The
    authors' code (SeanLee97/AnglE@5155458:angle_emb/angle.py:480-546) holds the successor, which
    divides by 1 + log l and compares prefixes with principal components.
    """
    count = layers[0].shape[0]
    depths = list(range(1, count)) if depths is None else list(depths)
    if count < 2 or len(depths) != count - 1:
        raise ValueError(
            f"{count} layers for {len(depths)} depths: give the shallow layers, a depth for each, "
            "and the last layer after them."
        )

    def of_layer(index: int) -> Array:
        return matryoshka(loss, *(layer[index] for layer in layers), prefixes=prefixes)

    shallow = sum(of_layer(index) / depth for index, depth in enumerate(depths)) / len(depths)
    divergence = 0.0
    for layer in layers:
        log_probabilities = jax.nn.log_softmax(as_float(layer) / kl_temperature, axis=-1)
        last = log_probabilities[-1]
        difference = jnp.exp(last) * (last - log_probabilities[:-1])
        divergence += jnp.mean(jnp.sum(difference, axis=(0, 2))) / len(layers)
    return of_layer(-1) + shallow + kl_weight * kl_temperature * divergence


def matryoshka_cross_entropy(
    logits: Num[Array, "prefixes batch classes"],
    labels: Integer[Array, "batch"],
    *,
    relative_importance: Sequence[float] | None = None,
) -> Float[Array, "batch"]:
    """Cross-entropy summed over the classifiers of nested prefixes: ``sum_g c_g CE(l_gn, y_n)``.

    Args:
        logits: of one classifier for each prefix of the embedding.
        relative_importance: the weights c_g; 1 each by default.

    Raises:
        ValueError: another number of weights than of prefixes.

    Source: Kusupati et al. (arXiv:2205.13147), eq. 1; RAIVNLab/MRL@7ccb42d:MRL.py:11-30.
    """
    weights = jnp.ones(logits.shape[0])
    if relative_importance is not None:
        weights = jnp.asarray(relative_importance, jnp.float32)
    if weights.shape != (logits.shape[0],):
        raise ValueError(f"{weights.size} relative importances for {logits.shape[0]} prefixes.")
    labels = jnp.broadcast_to(labels, logits.shape[:2])
    losses = optax.softmax_cross_entropy_with_integer_labels(as_float(logits), labels)
    return jnp.sum(weights[:, None] * losses, axis=0)
