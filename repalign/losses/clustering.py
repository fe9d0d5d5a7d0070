"""Losses that compare soft assignments of views to learned prototypes.

"Scores" are the (usually cosine) similarities of embeddings and prototypes, before temperatures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import keep, token_mean, zero_masked
from repalign.numerics import as_float, inner_products, l2_normalize, masked_mean
from repalign.typing import Array, ArrayLike, Bool, Float, Num, Scalar


def _cross_entropy(
    targets: Float[Array, "*shape classes"],
    scores: Num[Array, "*shape classes"],
    temperature: ArrayLike,
) -> Float[Array, "*shape"]:
    """Returns ``-sum_k targets_k log softmax(scores / temperature)_k``."""
    return -jnp.sum(targets * jax.nn.log_softmax(as_float(scores) / temperature, axis=-1), axis=-1)


def sinkhorn(
    scores: Num[Array, "batch prototypes"],
    *,
    epsilon: ArrayLike = 0.05,
    iterations: int = 3,
    marginal: Num[Array, "prototypes"] | None = None,
    where: Bool[Array, "batch"] | None = None,
) -> Float[Array, "batch prototypes"]:
    """Assigns examples to prototypes with (nearly) prescribed prototype masses.

    Alternately scales the columns of ``exp(scores / epsilon)`` to the marginal and its rows to 1,
    ending with the rows. In the log domain, so no epsilon overflows. Differentiable; the losses
    below stop its gradient.

    Args:
        scores: similarities.
        epsilon: entropic regularisation; smaller is harder.
        iterations: at least 1.
        marginal: positive prototype masses; equal by default. Their sum is immaterial.
        where: examples that count; the rows of the others do not influence them.

    Returns:
        Assignments; each row sums to 1.

    Raises:
        ValueError: ``iterations`` below 1.

    Source: Cuturi (arXiv:1306.0895); Caron et al., SwAV (arXiv:2006.09882), section 3;
    lightly-ai/lightly@e8d317f:lightly/loss/swav_loss.py (the same iterates, there with exp).
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn needs iterations >= 1, got {iterations}.")
    log_plan = as_float(scores) / epsilon
    log_marginal = 0.0 if marginal is None else jnp.log(as_float(marginal))
    rows = jnp.ones((log_plan.shape[0], 1), bool) if where is None else where[:, None]
    rows |= ~jnp.any(rows)  # with nothing to balance against, every row stands in

    def balance(_, log_plan):
        log_plan += log_marginal - jax.nn.logsumexp(log_plan, axis=0, keepdims=True, where=rows)
        return log_plan - jax.nn.logsumexp(log_plan, axis=1, keepdims=True)

    return jnp.exp(lax.fori_loop(0, iterations, balance, log_plan))


def swapped_assignment(
    high: Sequence[Num[Array, "batch prototypes"]],
    low: Sequence[Num[Array, "batch prototypes"]],
    *,
    temperature: ArrayLike = 0.1,
    sinkhorn_iterations: int = 3,
    sinkhorn_epsilon: ArrayLike = 0.05,
    queue: Sequence[Num[Array, "queue prototypes"]] | None = None,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """SwAV: every other view predicts the Sinkhorn assignment of each high-resolution view.

    ``(1/H) sum_h 1/(V - 1) sum_{v != h} mean_i CE(sg sinkhorn(S_h)_i, softmax(S_v / T)_i)`` over
    all V = H + L views. The assignments depend on the whole batch, hence a scalar.

    Args:
        high: scores of the high-resolution views; ``low``: of the others (may be empty).
        queue: for each high-resolution view, scores of earlier embeddings, which take part in the
            balancing only.

    Raises:
        ValueError: fewer than two views, none of high resolution, or a queue of another length.

    Source: Caron et al. (arXiv:2006.09882), section 3; lightly-ai/lightly@e8d317f:
    lightly/loss/swav_loss.py.
    """
    high, low = ([zero_masked(view, where) for view in views] for views in (high, low))
    views = [*high, *low]
    if not high or len(views) < 2:
        raise ValueError(
            f"{len(high)} high- and {len(low)} low-resolution views: swapped assignment needs at "
            "least one high-resolution view and one other."
        )
    if queue is not None and len(queue) != len(high):
        raise ValueError(f"{len(queue)} queues for {len(high)} high-resolution views.")
    batch = high[0].shape[0]
    loss = jnp.zeros(())
    for index, scores in enumerate(high):
        mask = where
        if queue is not None:
            scores = jnp.concatenate([scores, queue[index].astype(scores.dtype)])
            if where is not None:
                mask = jnp.concatenate([where, jnp.ones(queue[index].shape[0], bool)])
        assignments = sinkhorn(
            scores, epsilon=sinkhorn_epsilon, iterations=sinkhorn_iterations, where=mask
        )
        targets = lax.stop_gradient(assignments[:batch])
        others = [view for other, view in enumerate(views) if other != index]
        for view in others:
            entropy = _cross_entropy(targets, view, temperature)
            loss += masked_mean(entropy, where) / len(others)
    return loss / len(high)


def _teacher_probabilities(
    scores: Num[Array, "*shape classes"],
    center: Float[Array, "*center classes"],
    temperature: ArrayLike,
) -> Float[Array, "*shape classes"]:
    """Returns the centred, sharpened assignments of a teacher; no gradient passes."""
    return lax.stop_gradient(
        jax.nn.softmax((as_float(scores) - center.reshape(-1)) / temperature, axis=-1)
    )


def _new_center(
    scores: Num[Array, "views batch classes"],
    center: Float[Array, "*center classes"],
    momentum: ArrayLike,
    where: Bool[Array, "batch"] | None,
) -> Float[Array, "*center classes"]:
    """Returns the running mean of teacher scores, moved towards this batch's mean."""
    kept, count = keep(jnp.swapaxes(scores, 0, 1), where)
    mean = jnp.sum(kept, axis=(0, 1)) / (jnp.maximum(count, 1.0) * kept.shape[1])
    moved = momentum * center + (1.0 - momentum) * mean
    # A batch without any example leaves the centre as it is.
    return lax.stop_gradient(jnp.where(count > 0, moved, center))


def dino(
    teacher: Sequence[Num[Array, "batch classes"]] | Num[Array, "teacher_views batch classes"],
    student: Sequence[Num[Array, "batch classes"]] | Num[Array, "student_views batch classes"],
    center: Float[Array, "*center classes"],
    *,
    teacher_temp: ArrayLike = 0.04,
    student_temp: ArrayLike = 0.1,
    center_momentum: ArrayLike = 0.9,
    where: Bool[Array, "batch"] | None = None,
) -> tuple[Scalar, Float[Array, "*center classes"]]:
    """DINO: cross-entropy of student views against centred, sharpened teacher views.

    ``mean over pairs t != s and examples of CE(softmax((T_t - c) / teacher_temp),
    softmax(S_s / student_temp))``: teacher view t and student view s of the same index are the
    same crop and are left out. The teacher and the centre receive no gradient.

    Args:
        teacher: scores of the teacher's (global) views; ``student``: of all views, in that order.
        center: the state, of shape [classes] or one that broadcasts, such as [1, classes].

    Returns:
        The loss with the centre as it came, and the new centre
        ``m c + (1 - m) mean(teacher scores)``.

    Raises:
        ValueError: no pair of different views.

    Source: Caron et al. (arXiv:2104.14294); lightly-ai/lightly@e8d317f:
    lightly/loss/dino_loss.py.
    """
    scores = jnp.stack([zero_masked(as_float(view), where) for view in teacher])
    targets = _teacher_probabilities(scores, center, teacher_temp)
    losses = [
        masked_mean(_cross_entropy(target, zero_masked(view, where), student_temp), where)
        for t, target in enumerate(targets)
        for s, view in enumerate(student)
        if s != t
    ]
    if not losses:
        raise ValueError(
            "dino needs a student view that differs from a teacher view; got one view."
        )
    return sum(losses) / len(losses), _new_center(scores, center, center_momentum, where)


def ibot(
    teacher: Num[Array, "batch tokens classes"],
    student: Num[Array, "batch tokens classes"],
    masked: Bool[Array, "batch tokens"],
    center: Float[Array, "*center classes"],
    *,
    teacher_temp: ArrayLike = 0.04,
    student_temp: ArrayLike = 0.1,
    center_momentum: ArrayLike = 0.9,
) -> tuple[Float[Array, "batch"], Float[Array, "*center classes"]]:
    """iBOT: cross-entropy on masked patch tokens against the teacher's view of the whole image.

    Args:
        teacher: patch scores of the teacher, which sees every patch; no gradient.
        student: patch scores of the student on the same crop, some of its patches masked.
        masked: True where the student's patch was masked.
        center: the state, as in ``dino``.

    Returns:
        Per example the mean over its masked tokens (0 if there is none), and the new centre, a
        running mean over all tokens. The class token's term is ``dino``.

    Source: Zhou et al. (arXiv:2111.07832); bytedance/ibot@da316d8:main_ibot.py:530-572.
    """
    targets = _teacher_probabilities(teacher, center, teacher_temp)
    loss = token_mean(_cross_entropy(targets, student, student_temp), masked)
    return loss, _new_center(jnp.swapaxes(teacher, 0, 1), center, center_momentum, None)


class MSNDiagnostics(NamedTuple):
    """The two parts of ``msn``: the cross-entropy, and the entropy of the mean assignment."""

    cross_entropy: Scalar
    mean_entropy: Scalar


def msn(
    anchors: Num[Array, "views batch dim"],
    targets: Num[Array, "batch dim"],
    prototypes: Num[Array, "prototypes dim"],
    *,
    temperature: ArrayLike = 0.1,
    sharpening: ArrayLike = 0.25,
    sinkhorn_iterations: int = 0,
    regularization_weight: ArrayLike = 1.0,
    where: Bool[Array, "batch"] | None = None,
) -> tuple[Scalar, MSNDiagnostics]:
    """MSN: masked anchor views predict the sharpened assignment of an unmasked target view.

    With ``p = softmax(cos(anchor, prototypes) / temperature)`` and ``q`` the same of the target,
    raised to ``1 / sharpening`` and renormalised:
    ``mean CE(sg q, p) + w (log K - H(mean p))``; the second term (mean-entropy maximisation) is
    the KL divergence of the mean prediction from the uniform distribution.

    Embeddings and prototypes are normalised inside. A batch statistic, hence a scalar. Gradients
    reach anchors and prototypes, through the predictions only. ``sinkhorn_iterations`` above 0
    balances the targets over the prototypes, which the official code can do as well.

    Source: Assran et al. (arXiv:2204.07141); facebookresearch/msn@4388dc1:
    src/losses.py:33-90.
    """
    prototypes = l2_normalize(prototypes)
    views, batch, dim = anchors.shape
    anchors = jax.vmap(lambda view: zero_masked(view, where))(anchors)
    targets = zero_masked(targets, where)
    scores = inner_products(l2_normalize(anchors).reshape(views * batch, dim), prototypes)
    log_p = jax.nn.log_softmax(scores / temperature, axis=-1).reshape(views, batch, -1)
    target_scores = inner_products(l2_normalize(targets), prototypes)
    # Raising to 1 / sharpening and renormalising is dividing the logits by sharpening.
    log_q = jax.nn.log_softmax(target_scores / (temperature * sharpening), axis=-1)
    if sinkhorn_iterations:
        q = sinkhorn(log_q, epsilon=1.0, iterations=sinkhorn_iterations, where=where)
    else:
        q = jnp.exp(log_q)
    q = lax.stop_gradient(q)
    cross_entropy = masked_mean(jnp.mean(-jnp.sum(q * log_p, axis=-1), axis=0), where)
    predictions, count = keep(jnp.swapaxes(jnp.exp(log_p), 0, 1), where)
    mean_prediction = jnp.sum(predictions, axis=(0, 1)) / (jnp.maximum(count, 1.0) * views)
    tiny = jnp.finfo(mean_prediction.dtype).tiny
    mean_entropy = -jnp.sum(mean_prediction * jnp.log(jnp.maximum(mean_prediction, tiny)))
    loss = cross_entropy + regularization_weight * (jnp.log(prototypes.shape[0]) - mean_entropy)
    return loss, MSNDiagnostics(cross_entropy, mean_entropy)


def capi_clustering(
    scores: Num[Array, "batch tokens clusters"],
    *,
    target_temp: ArrayLike = 0.06,
    pred_temp: ArrayLike = 0.12,
    iterations: int = 3,
    positionwise: bool = True,
) -> tuple[Float[Array, "batch"], Float[Array, "batch tokens clusters"]]:
    """CAPI's online clustering of teacher patches: scores predict their own balanced assignment.

    ``loss_b = mean_t CE(sg A_bt, softmax(scores_bt / pred_temp))`` with ``A`` the Sinkhorn
    assignment of ``scores / target_temp``; its gradient trains the clustering head alone (the
    scores are a linear map of l2-normalised, stop-gradiented teacher tokens).

    Args:
        positionwise: True balances the clusters over the batch at every token position separately,
            so that a cluster cannot encode a position; False over all tokens together.

    Returns:
        The loss, and the assignments, which carry no gradient: targets of ``capi_prediction``.

    Source: Darcet et al. (arXiv:2502.08769); facebookresearch/capi@98b4fa1:
    model.py:513-563 (there exp with 1e-8 added to every sum; here the log domain).
    """
    fixed = lax.stop_gradient(scores)
    if positionwise:
        by_position = jax.vmap(
            lambda at_position: sinkhorn(at_position, epsilon=target_temp, iterations=iterations)
        )
        assignments = jnp.swapaxes(by_position(jnp.swapaxes(fixed, 0, 1)), 0, 1)
    else:
        flat = fixed.reshape(-1, fixed.shape[-1])
        assignments = sinkhorn(flat, epsilon=target_temp, iterations=iterations).reshape(
            fixed.shape
        )
    return jnp.mean(_cross_entropy(assignments, scores, pred_temp), axis=1), assignments


def capi_prediction(
    scores: Num[Array, "batch tokens clusters"],
    assignments: Num[Array, "batch tokens clusters"],
    *,
    temperature: ArrayLike = 0.12,
    where: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch"]:
    """CAPI's student loss: mean cross-entropy of predicted patches against teacher assignments.

    Per example, over the tokens where ``where`` holds (0 if it never does); the assignments
    receive no gradient. Source: facebookresearch/capi@98b4fa1:train_capi.py:71-87.
    """
    scores, assignments = zero_masked(scores, where), zero_masked(assignments, where)
    entropy = _cross_entropy(lax.stop_gradient(as_float(assignments)), scores, temperature)
    return token_mean(entropy, where)
