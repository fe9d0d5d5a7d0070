"""How many directions a representation uses: summaries of its singular-value spectrum."""

import functools

import jax
import jax.numpy as jnp

from repalign import numerics
from repalign.typing import Array, Float, Num, Scalar


def singular_values(
    features: Num[Array, "batch dim"], *, center: bool
) -> Float[Array, " directions"]:
    """Returns the ``min(batch, dim)`` singular values, descending, of the (centred) features."""
    features = numerics.as_float(features)
    if center:
        features = features - jnp.mean(features, axis=0)
    return jnp.linalg.svd(features, compute_uv=False)


@functools.partial(jax.jit, static_argnames=("center", "epsilon"))
def effective_rank(
    features: Num[Array, "batch dim"], *, center: bool = False, epsilon: float = 1e-7
) -> Scalar:
    """RankMe: ``exp(-sum_k p_k log p_k)`` with ``p_k = s_k / sum_j s_j + epsilon``.

    The exponential of the entropy of the normalised singular values; in [1, min(batch, dim)] up to
    epsilon. Garrido et al. 2023 (RankMe), after Roy and Vetterli 2007. RankMe does not
    centre the features, the default here.
    """
    values = singular_values(features, center=center)
    total = jnp.sum(values)
    shares = values / jnp.where(total > 0, total, 1.0) + epsilon
    return jnp.exp(-jnp.sum(shares * jnp.log(shares)))


@jax.jit
def participation_ratio(features: Num[Array, "batch dim"]) -> Scalar:
    """``(sum_k v_k)^2 / sum_k v_k^2`` over the eigenvalues v of the covariance; in [1, dim].

    Gao et al. 2017 (A theory of multineuronal dimensionality). 0 for constant features.
    """
    variances = jnp.square(singular_values(features, center=True))
    total = jnp.sum(variances)
    shares = variances / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, 1.0 / jnp.maximum(jnp.sum(jnp.square(shares)), 1e-30), 0.0)


@functools.partial(jax.jit, static_argnames=("first", "last"))
def power_law_exponent(
    features: Num[Array, "batch dim"], *, first: int = 4, last: int = 100
) -> Scalar:
    """alpha-ReQ: the exponent of the decay ``v_k ~ k^-alpha`` of the covariance's eigenvalues.

    Least squares of ``log v_k`` on ``-log k`` over the ranks ``first..last`` (from 1, inclusive),
    each weighted by 1/k. Near 1 for representations that generalise well; larger is a faster decay.

    Agrawal et al. 2022 (alpha-ReQ) states no range; ranks 4 to 100 and the
    weights are those of its code, whose fit is MouseLand/stringer-pachitariu-et-al-2018b@79850db:
    python/utils.py (get_powerlaw).

    Raises:
        ValueError: the ranks are not ``1 <= first < last <= min(batch - 1, dim)``; centred features
            have no further eigenvalue above 0.
    """
    limit = min(features.shape[0] - 1, features.shape[1])
    if not 1 <= first < last <= limit:
        raise ValueError(f"ranks {first} to {last} are not within 1 to {limit}.")
    variances = jnp.square(singular_values(features, center=True)[first - 1 : last])
    ranks = jnp.arange(first, last + 1, dtype=variances.dtype)
    weights = 1.0 / ranks / jnp.sum(1.0 / ranks)
    log_ranks, log_variances = jnp.log(ranks), jnp.log(variances)
    log_ranks = log_ranks - jnp.sum(weights * log_ranks)
    return -jnp.sum(weights * log_ranks * log_variances) / jnp.sum(weights * log_ranks**2)
