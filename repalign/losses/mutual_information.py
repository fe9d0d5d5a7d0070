"""Contrastive bounds on the mutual information between parts: past and future, local and global."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels.contrastive.api import log_sum_exp
from repalign.numerics import as_float, inner_products, l2_normalize, map_row_blocks
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Float, Key


def cpc(
    context: Float[Array, "batch context"],
    future: Float[Array, "batch horizons dim"],
    weights: Float[Array, "horizons dim context"],
) -> Float[Array, "batch"]:
    """Contrastive predictive coding: a context has to tell its own future from other sequences'.

    ``mean_k -log( f_k(z_{i,k}, c_i) / sum_j f_k(z_{j,k}, c_i) )`` with
    ``f_k(z, c) = exp(z^T W_k c)``, nothing normalised; at least 0. Negatives are the futures of the
    other sequences at the same horizon. ``log N - loss`` is a lower bound of I(z; c) in nats.

    Args:
        context: [N, C], c_t of every sequence.
        future: [N, K, D], z_{t+1} ... z_{t+K}.
        weights: [K, D, C], one W per horizon.

    Returns:
        [N].

    Source: van den Oord et al. 2018 (CPC), eq. 3 and 4.
    """
    context, future, weights = as_float(context), as_float(future), as_float(weights)

    def horizon(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        weight, target = inputs
        predicted = inner_products(context, weight)
        own = jnp.sum(predicted * target, axis=1)
        return total + log_sum_exp(predicted, target, scale=1.0) - own, None

    start = jnp.zeros_like(context[:, 0])
    total, _ = lax.scan(horizon, start, (weights, jnp.swapaxes(future, 0, 1)))
    return total / len(weights)


class LocalGlobalNCE(NamedTuple):
    """The terms of ``local_global_nce``.

    Attributes:
        loss: [N], the contrastive loss.
        score_penalty: [N], the mean squared score before clipping; AMDIM adds 0.04 times it.
    """

    loss: Float[Array, "batch"]
    score_penalty: Float[Array, "batch"]


def local_global_nce(
    summary: Float[Array, "batch dim"],
    local: Float[Array, "batch locations dim"],
    *,
    score_clip: float = 10.0,
) -> LocalGlobalNCE:
    """AMDIM's local-global infomax: a summary finds every location of its own other view.

    ``s = c tanh(<g_i, l_jp> / (c sqrt(D)))``; per location p
    ``-log( e^{s_iip} / (e^{s_iip} + sum_{j != i, q} e^{s_ijq}) )``, averaged over p; at least 0.
    The N x N P scores of large batches go by blocks of rows (`numerics.map_row_blocks`). AMDIM sums
    it over pairs of scales and both directions.

    Args:
        summary: [N, D], global features of one view.
        local: [N, P, D], local features of the other view.
        score_clip: c, the bound of the scores.

    Returns:
        ``LocalGlobalNCE``; the loss of a single example is 0.

    Source: Bachman et al. 2019 (AMDIM); Philip-Bachman/amdim-public@0333f6b costs.py
    (NCE_MI_MULTI._model_scores).
    """
    batch, locations, dim = local.shape
    all_local = local.reshape(batch * locations, dim)

    def of_rows(rows: tuple[Array, Array, Array]) -> LocalGlobalNCE:
        some, own_local, numbers = rows
        raw = inner_products(some, all_local) / dim**0.5
        penalty = jnp.mean(jnp.square(raw), axis=1)
        if batch == 1:
            return LocalGlobalNCE(jnp.zeros_like(penalty), penalty)
        scores = score_clip * jnp.tanh(raw / score_clip)
        own = jnp.einsum("nd,npd->np", some, own_local, precision=lax.Precision.HIGHEST)
        own = score_clip * jnp.tanh(own / (score_clip * dim**0.5))
        others = numbers[:, None] != jnp.repeat(jnp.arange(batch), locations)
        negative = jax.nn.logsumexp(scores, axis=1, where=others)
        return LocalGlobalNCE(jnp.mean(jax.nn.softplus(negative[:, None] - own), axis=1), penalty)

    rows = (as_float(summary), as_float(local), jnp.arange(batch))
    return map_row_blocks(of_rows, rows, columns=batch * locations)


def patch_info_nce(
    queries: Float[Array, "batch patches dim"],
    keys: Float[Array, "batch patches dim"],
    *,
    temperature: ArrayLike = 0.07,
    negatives: str = "image",
) -> Float[Array, "batch"]:
    """PatchNCE: each output patch finds the input patch at the same place.

    ``mean_p -log( e^{q_p.k_p/t} / sum_r e^{q_p.k_r/t} )`` on unit vectors (normalised inside), at
    least 0; ``keys`` are stop-gradiented, as in CUT.

    Args:
        queries: [N, P, D], features of the translated images.
        keys: [N, P, D], features of the inputs at the same places.
        temperature: positive scalar.
        negatives: r runs over the patches of the same ``"image"`` or of the whole ``"batch"``.

    Returns:
        [N].

    Raises:
        UserError: an unknown name in ``negatives``.

    Source: Park et al. 2020 (CUT); taesungp/contrastive-unpaired-translation@5cd1ecc
    models/patchnce.py. There the positive's place among the negatives is filled with -10 before the
    division by t, here it is left out; the two differ by e^(-10/t) in the denominator, 1e-62 at the
    default.
    """
    queries, keys = l2_normalize(queries), lax.stop_gradient(l2_normalize(keys))
    own = jnp.sum(queries * keys, axis=2) / temperature

    def reduce(rows: Array, columns: Array) -> Array:
        return log_sum_exp(rows, columns, scale=1.0 / temperature)

    if lookup({"image": True, "batch": False}, negatives, kind="negatives"):
        total = jax.vmap(reduce)(queries, keys)
    else:
        flat = (-1, queries.shape[2])
        total = reduce(queries.reshape(flat), keys.reshape(flat)).reshape(own.shape)
    return jnp.mean(total - own, axis=1)


class WassersteinDependency(NamedTuple):
    """The terms of ``wasserstein_dependency``.

    Attributes:
        loss: [N]; its negated mean bounds the dependency from below if the critic is 1-Lipschitz.
        gradient_penalty: [N], ``(||grad f|| - 1)^2``; add it with a weight.
    """

    loss: Float[Array, "batch"]
    gradient_penalty: Float[Array, "batch"]


def wasserstein_dependency(
    critic: Callable[[Array, Array], Array],
    x: Float[Array, "batch *x_shape"],
    y: Float[Array, "batch *y_shape"],
    *,
    key: Key[Array, ""],
    objective: str = "contrastive",
) -> WassersteinDependency:
    """Wasserstein dependency measure: an information bound with a Lipschitz critic.

    ``"contrastive"``: ``log sum_j e^{f(x_i, y_j)} - f(x_i, y_i)`` (Wasserstein predictive coding);
    ``"dual"``: ``mean_{j != i} f(x_i, y_j) - f(x_i, y_i)``, the Kantorovich dual. The penalty is
    taken at ``(x_i, e y_i + (1 - e) y_{i+1})``, e ~ U(0, 1), between a sample of the joint and one
    of the product of the marginals, with respect to both arguments (the paper does not fix the
    points). The N x N scores are held.

    Args:
        critic: takes one x and one y to a scalar.
        x: [N, ...].
        y: [N, ...]; row i belongs to row i of ``x``.
        key: for the points of the penalty.
        objective: which bound.

    Returns:
        ``WassersteinDependency``.

    Raises:
        UserError: an unknown ``objective``.

    Source: Ozair et al. 2019; the penalty is that of Gulrajani et al. 2017 (WGAN-GP).
    """
    x, y = as_float(x), as_float(y)
    scores = jax.vmap(lambda one: jax.vmap(lambda other: critic(one, other))(y))(x)
    own = jnp.diagonal(scores)
    if lookup({"contrastive": True, "dual": False}, objective, kind="objective"):
        loss = jax.nn.logsumexp(scores, axis=1) - own
    else:
        loss = (jnp.sum(scores, axis=1) - own) / max(len(x) - 1, 1) - own
    share = jax.random.uniform(key, (len(y),) + (1,) * (y.ndim - 1), y.dtype)
    between = share * y + (1.0 - share) * jnp.roll(y, -1, axis=0)

    def penalty(one: Array, other: Array) -> Array:
        grads = jax.grad(critic, argnums=(0, 1))(one, other)
        squared = sum(jnp.sum(jnp.square(part)) for part in grads)
        positive = squared > 0
        norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
        return jnp.square(norm - 1.0)

    return WassersteinDependency(loss, jax.vmap(penalty)(x, between))
