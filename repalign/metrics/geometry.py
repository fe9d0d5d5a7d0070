"""The shape of a set of representations: intrinsic dimension, isotropy, modality gap."""

import functools

import jax
import jax.numpy as jnp

from repalign import numerics
from repalign.kernels import neighbors
from repalign.registry import lookup
from repalign.typing import Array, Float, Num, Scalar

ESTIMATORS = {"regression": True, "maximum_likelihood": False}


@functools.partial(jax.jit, static_argnames=("estimator", "discard"))
def two_nn_dimension(
    features: Num[Array, "batch dim"],
    *,
    estimator: str = "regression",
    discard: float = 0.1,
) -> Scalar:
    """Intrinsic dimension from the ratio of the distances to the two nearest neighbours.

    ``mu = r_2 / r_1`` is Pareto with the dimension d as its exponent. The paper's ``"regression"``
    fits the line ``-log(1 - F(mu)) = d log(mu)`` through the origin, F the empirical distribution,
    without the largest ``discard`` share; ``"maximum_likelihood"`` is ``n / sum log(mu)`` and uses
    all. Points with a duplicate (``r_1 = 0``) have no ratio and are left out; NaN if none remains.

    Facco et al. 2017 (Estimating the intrinsic dimension by a minimal neighborhood information).

    Raises:
        UserError: an unknown estimator.
        ValueError: a share outside [0, 1).
    """
    regression = lookup(ESTIMATORS, estimator, kind="estimator")
    if not 0.0 <= discard < 1.0:
        raise ValueError(f"discard = {discard} is not in [0, 1).")
    distances = neighbors.top_k(features, features, k=2, metric="euclidean", exclude_self=True)
    first, second = distances.values[:, 0], distances.values[:, 1]
    distinct = first > 0
    count = jnp.sum(distinct)
    log_ratios = jnp.log(jnp.where(distinct, second / jnp.where(distinct, first, 1.0), jnp.inf))
    if not regression:
        return count / jnp.sum(jnp.where(distinct, log_ratios, 0.0))
    log_ratios = jnp.sort(log_ratios)  # the points without a ratio come last
    ranks = jnp.arange(1, features.shape[0] + 1)
    kept = ranks <= jnp.floor(count * (1.0 - discard))
    # F(mu_i) = i / count; the last point, where F = 1, would need an infinite value.
    kept = kept & (ranks < count)
    log_ratios = jnp.where(kept, log_ratios, 0.0)
    survival = jnp.where(kept, -jnp.log1p(-ranks / count), 0.0)
    return jnp.sum(log_ratios * survival) / jnp.sum(jnp.square(log_ratios))


@jax.jit
def isotropy(features: Num[Array, "batch dim"]) -> Scalar:
    """``min_c Z(c) / max_c Z(c)`` with ``Z(c) = sum_i exp(<c, x_i>)``; in [0, 1], 1 is isotropic.

    c runs over the unit eigenvectors of ``X'X``. Their sign is not defined; both are taken, so that
    the value is. Mu and Viswanath 2018 (All-but-the-Top).
    """
    features = numerics.as_float(features)
    directions = jnp.linalg.eigh(numerics.inner_products(features.T, features.T))[1]
    projections = numerics.inner_products(features, directions.T)
    log_partition = jnp.concatenate([_log_sum_exp(projections), _log_sum_exp(-projections)])
    return jnp.exp(jnp.min(log_partition) - jnp.max(log_partition))


def _log_sum_exp(x: Float[Array, "batch dim"]) -> Float[Array, " dim"]:
    largest = jnp.max(x, axis=0)
    return largest + jnp.log(jnp.sum(jnp.exp(x - largest), axis=0))


@jax.jit
def average_cosine(features: Num[Array, "batch dim"]) -> Scalar:
    """Mean cosine over all pairs of different examples; 0 when isotropic, 1 when collapsed.

    From ``|sum_i x_i|^2``, in O(batch * dim). Ethayarajh 2019 (How Contextual are Contextualized
    Word Representations), Section 3.3, takes a sample of pairs.
    """
    unit = numerics.l2_normalize(features)
    count = unit.shape[0]
    all_pairs = jnp.sum(jnp.square(jnp.sum(unit, axis=0)))
    return (all_pairs - jnp.sum(jnp.square(unit))) / (count * (count - 1))


@jax.jit
def modality_gap(a: Num[Array, "batch_a dim"], b: Num[Array, "batch_b dim"]) -> Scalar:
    """``|mean of a/|a| - mean of b/|b||``, in [0, 2].

    Liang et al. 2022 (Mind the Gap).
    """
    gap = jnp.mean(numerics.l2_normalize(a), axis=0) - jnp.mean(numerics.l2_normalize(b), axis=0)
    return jnp.linalg.norm(gap)
