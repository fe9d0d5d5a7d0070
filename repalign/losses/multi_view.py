"""Contrastive losses on more than two views of every example; views are [batch, views, dim]."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels.contrastive.api import log_sum_exp
from repalign.numerics import l2_normalize, map_row_blocks, squared_distances
from repalign.typing import Array, ArrayLike, Float


def _view_pairs(views: Array) -> Array:
    """Returns the similarities of the pairs k < l of views of the same example, [batch, pairs]."""
    pairs = itertools.combinations(range(views.shape[1]), 2)
    return jnp.stack([jnp.sum(views[:, i] * views[:, j], axis=1) for i, j in pairs], axis=1)


def _check(views: Array) -> None:
    if views.shape[1] < 2:
        raise ValueError(f"expected at least two views on the second axis, got {views.shape}.")


def mv_info_nce(
    views: Float[Array, "batch views dim"], *, temperature: ArrayLike
) -> Float[Array, "batch"]:
    """Multi-view InfoNCE: one term per example, over all pairs of its views at once.

    ``-log( sum_{k != l} e^{z_i^k.z_i^l/t} / sum_k sum_{(j,l) != (i,k)} e^{z_i^k.z_j^l/t} )`` on
    unit vectors (normalised inside); at least 0.

    Args:
        views: [N, V, D] with V >= 2.
        temperature: positive scalar.

    Returns:
        [N].

    Raises:
        ValueError: fewer than two views.

    Source: Koromilas et al. 2025, MV-InfoNCE; pakoromilas/Multi-View-CL@e446c10 models/losses.py
    (MVINFONCE).
    """
    _check(views)
    views = l2_normalize(views)
    batch, count, dim = views.shape
    flat, ids = views.reshape(batch * count, dim), jnp.arange(batch * count)
    total = log_sum_exp(flat, flat, scale=1.0 / temperature, exclude=(ids, ids))
    positive = jax.nn.logsumexp(_view_pairs(views) / temperature, axis=1) + jnp.log(2.0)
    return jax.nn.logsumexp(total.reshape(batch, count), axis=1) - positive


def mv_dhel(
    views: Float[Array, "batch views dim"], *, temperature: ArrayLike
) -> Float[Array, "batch"]:
    """Multi-view decoupled hyperspherical energy loss: negatives come from within each view.

    ``-log( sum_{k<l} e^{z_i^k.z_i^l/t} / prod_k sum_{j != i} e^{z_i^k.z_j^k/t} )`` on unit vectors
    (normalised inside); it may be negative. A single example has no denominator.

    Args:
        views: [N, V, D] with V >= 2.
        temperature: positive scalar.

    Returns:
        [N].

    Raises:
        ValueError: fewer than two views.

    Source: Koromilas et al. 2025, MV-DHEL; pakoromilas/Multi-View-CL@e446c10 models/losses.py
    (MVDHEL); for two views Koromilas et al. 2024 (DHEL).
    """
    _check(views)
    views = l2_normalize(views)
    positive = jax.nn.logsumexp(_view_pairs(views) / temperature, axis=1)
    if len(views) == 1:
        return -positive
    ids = jnp.arange(len(views))
    per_view = [
        log_sum_exp(views[:, k], views[:, k], scale=1.0 / temperature, exclude=(ids, ids))
        for k in range(views.shape[1])
    ]
    return sum(per_view) - positive


def cacr(
    views: Float[Array, "batch views dim"],
    *,
    positive_temperature: ArrayLike = 1.0,
    negative_temperature: ArrayLike = 1.0,
    attraction: ArrayLike = 1.0,
    repulsion: ArrayLike = 1.0,
    stop_weights: bool = False,
) -> Float[Array, "batch"]:
    """Contrastive attraction and repulsion: far positives pull more, near negatives push more.

    With ``d`` the squared distance of unit vectors (normalised inside), for a query z:
    ``alpha sum_k p_k d(z, z_k+) - beta sum_j n_j d(z, z_j-)``, ``p = softmax_k(t+ d(z, z_k+))``
    over its other views and ``n = softmax_j(-t- d(z, z_j-))`` over the other examples. The
    attraction is the mean over all V queries of an example; the repulsion is the mean over the
    pairs k < l of views, the query in view k and its negatives in view l. It may be negative. The
    N x N distances of one pair of views are held at a time, for large batches a block of rows.

    Args:
        views: [N, V, D] with V >= 2.
        positive_temperature: t+.
        negative_temperature: t-.
        attraction: alpha.
        repulsion: beta.
        stop_weights: treats p and n as constants; the official code does not.

    Returns:
        [N]; a single example has no repulsion.

    Raises:
        ValueError: fewer than two views.

    Source: Zheng et al. 2021 (CACR); JegZheng/CACR-SSL@4dd3ef3
    small_scale_experiments/losses/__init__.py (our_loss1, our_loss2).
    """
    _check(views)
    views = l2_normalize(views)
    batch, count, _ = views.shape
    weigh = lax.stop_gradient if stop_weights else lambda weights: weights

    squared = [
        jnp.sum(jnp.square(views[:, k, None, :] - jnp.delete(views, k, axis=1)), axis=2)
        for k in range(count)
    ]
    pulls = [
        jnp.sum(weigh(jax.nn.softmax(positive_temperature * d, axis=1)) * d, axis=1)
        for d in squared
    ]
    attracted = attraction * sum(pulls) / count
    if batch == 1:
        return attracted

    @jax.checkpoint
    def push(queries: Array, others: Array) -> Array:
        def of_rows(rows: tuple[Array, Array]) -> Array:
            some, numbers = rows
            distances = squared_distances(some, others)
            negative = numbers[:, None] != jnp.arange(batch)
            weights = jax.nn.softmax(-negative_temperature * distances, axis=1, where=negative)
            return jnp.sum(weigh(weights) * distances, axis=1)

        return map_row_blocks(of_rows, (queries, jnp.arange(batch)), columns=batch)

    pairs = list(itertools.combinations(range(count), 2))
    pushed = sum(push(views[:, i], views[:, j]) for i, j in pairs) / len(pairs)
    return attracted - repulsion * pushed
