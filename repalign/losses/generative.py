"""Terms of latent-variable models: Gaussian densities and divergences, ELBO and IWAE bounds.

Everything is in nats and per example; bounds are returned negated, as losses.
"""

import math

import jax
import jax.numpy as jnp

from repalign.numerics import as_float
from repalign.typing import Array, ArrayLike, Bool, Float, Num


def gaussian_log_density(
    x: Num[Array, "*shape"], mean: Num[Array, "*shape"], log_variance: Num[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns ``log N(x; mean, exp(log_variance))`` element by element (sum over dimensions)."""
    x, mean, log_variance = as_float(x), as_float(mean), as_float(log_variance)
    squared = jnp.square(x - mean) * jnp.exp(-log_variance)
    return -0.5 * (squared + log_variance + math.log(2.0 * math.pi))


def bernoulli_log_likelihood(
    logits: Num[Array, "batch *event"], x: Num[Array, "batch *event"] | Bool[Array, "batch *event"]
) -> Float[Array, "batch"]:
    """Returns ``sum_k x_k log s(l_k) + (1 - x_k) log(1 - s(l_k))`` with s the logistic function.

    ``x`` is binary or in [0, 1]. Summed, not averaged, over the event's dimensions.
    """
    logits, x = as_float(logits), as_float(x)
    values = x * logits - jax.nn.softplus(logits)
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def gaussian_kl(
    mean: Num[Array, "batch *event"], log_variance: Num[Array, "batch *event"]
) -> Float[Array, "batch"]:
    """``KL(N(mean, exp(log_variance)) || N(0, I))`` summed over the event, >= 0.

    Source: Kingma & Welling (arXiv:1312.6114), appendix B.
    """
    mean, log_variance = as_float(mean), as_float(log_variance)
    values = 0.5 * (jnp.square(mean) + jnp.expm1(log_variance) - log_variance)
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def gaussian_kl_between(
    mean: Num[Array, "batch *event"],
    log_variance: Num[Array, "batch *event"],
    other_mean: Num[Array, "batch *event"],
    other_log_variance: Num[Array, "batch *event"],
) -> Float[Array, "batch"]:
    """``KL(N(mean, exp(lv)) || N(other_mean, exp(other_lv)))`` summed over the event, >= 0."""
    mean, log_variance = as_float(mean), as_float(log_variance)
    other_mean, other_log_variance = as_float(other_mean), as_float(other_log_variance)
    difference = log_variance - other_log_variance
    squared = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    values = 0.5 * (squared + jnp.expm1(difference) - difference)
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def negative_elbo(
    log_likelihood: Num[Array, "batch"], divergence: Num[Array, "batch"], *, beta: ArrayLike = 1.0
) -> Float[Array, "batch"]:
    """``-log p(x|z) + beta KL(q(z|x) || p(z))`` per example: the beta-VAE loss, VAE's at beta 1.

    Source: Higgins et al. (ICLR 2017), eq. 4; Kingma & Welling (arXiv:1312.6114).
    """
    return as_float(divergence) * beta - as_float(log_likelihood)


def negative_iwae(log_weights: Num[Array, "samples batch"]) -> Float[Array, "batch"]:
    """``-log (1/K) sum_k w_k`` per example, ``w_k = p(x, z_k) / q(z_k|x)`` given as logarithms.

    One sample gives the ELBO; the bound tightens with K. Source: Burda et al.
    (arXiv:1509.00519), L_k.
    """
    log_weights = as_float(log_weights)
    return math.log(log_weights.shape[0]) - jax.nn.logsumexp(log_weights, axis=0)
