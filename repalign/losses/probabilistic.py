"""Contrastive learning of distributions on the sphere: a vMF sampler and MCInfoNCE."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, l2_normalize
from repalign.typing import Array, ArrayLike, Float, Key


def sample_von_mises_fisher(
    key: Key[Array, ""],
    mean: Float[Array, "batch dim"],
    concentration: Float[Array, "batch"],
    *,
    samples: int,
) -> Float[Array, "samples batch dim"]:
    """Draws unit vectors with density proportional to ``exp(concentration <mean, z>)``.

    Wood's rejection sampler for the cosine to the mean, a uniform tangent direction, and a
    reflection of the first axis onto the mean. Reparameterised: gradients reach ``mean`` (exactly)
    and ``concentration`` through the accepted proposal; the correction for the acceptance
    probability is left out, as in Davidson et al. 2018's code.

    Args:
        key: randomness.
        mean: [N, D] with D >= 2, normalised inside.
        concentration: [N], at least 0 and clipped at 1e5; larger is narrower.
        samples: S, draws per row.

    Returns:
        [S, N, D], unit vectors.

    Source: Wood 1994; Davidson et al. 2018, algorithm 1.
    """
    mean, concentration = l2_normalize(mean), jnp.clip(as_float(concentration), 0.0, 1e5)
    batch, dim = mean.shape
    shape = (samples, batch)
    # (sqrt(4 k^2 + (d-1)^2) - 2 k) / (d-1) without the cancellation at large k.
    b = (dim - 1) / (2.0 * concentration + jnp.hypot(2.0 * concentration, dim - 1.0))

    def cosine(proposal: Array, b: Array) -> Array:
        return (1.0 - (1.0 + b) * proposal) / (1.0 - (1.0 - b) * proposal)

    def accepted(key: Array, b: Array, concentration: Array) -> Array:
        x0 = (1.0 - b) / (1.0 + b)
        level = concentration * x0 + (dim - 1) * (jnp.log(4.0 * b) - 2.0 * jnp.log1p(b))

        def propose(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            key, kept, done, rounds = state
            key, proposal_key, uniform_key = jax.random.split(key, 3)
            # Beta((d-1)/2, (d-1)/2) as a ratio of chi-squares.
            normal = jax.random.normal(proposal_key, (2, *shape, dim - 1))
            first, second = jnp.sum(jnp.square(normal), axis=-1)
            proposal = first / (first + second)
            w = cosine(proposal, b)
            ratio = concentration * w + (dim - 1) * jnp.log1p(-x0 * w) - level
            accept = ratio >= jnp.log(jax.random.uniform(uniform_key, shape))
            return key, jnp.where(done, kept, proposal), done | accept, rounds + 1

        # A round accepts about two in three; the bound is for a NaN, which never would be.
        start = (key, jnp.zeros(shape), jnp.zeros(shape, bool), jnp.zeros((), jnp.int32))

        def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
            return ~jnp.all(state[2]) & (state[3] < 100)

        return lax.while_loop(unfinished, propose, start)[1]

    radial_key, tangent_key = jax.random.split(key)
    proposal = accepted(radial_key, *lax.stop_gradient((b, concentration)))
    w = cosine(proposal, b)
    # sqrt(1 - w^2) in closed form: the difference has no digits left at a large concentration.
    rest = b * proposal * (1.0 - proposal)
    inside = rest > 0
    sine = jnp.where(inside, jnp.sqrt(jnp.where(inside, rest, 1.0)), 0.0)
    sine = 2.0 * sine / (1.0 - (1.0 - b) * proposal)
    tangent = l2_normalize(jax.random.normal(tangent_key, (*shape, dim - 1)))
    upright = jnp.concatenate([w[..., None], sine[..., None] * tangent], axis=-1)
    axis = l2_normalize(jnp.zeros(dim).at[0].set(1.0) - mean)
    return upright - 2.0 * jnp.sum(upright * axis, axis=-1, keepdims=True) * axis


def mc_info_nce(
    mean_a: Float[Array, "batch dim"],
    concentration_a: Float[Array, "batch"],
    mean_b: Float[Array, "batch dim"],
    concentration_b: Float[Array, "batch"],
    *,
    key: Key[Array, ""],
    kappa: ArrayLike,
    samples: int = 16,
    negatives: int = 1,
) -> Float[Array, "batch"]:
    """MCInfoNCE: InfoNCE's likelihood, averaged over draws from the encoders' vMF distributions.

    ``-log mean_s( e^{k z.z+} / (e^{k z.z+} + 1/M sum_m e^{k z.z_m}) )`` with z ~ vMF(a_i),
    z+ ~ vMF(b_i) and the negatives z_m the draws of z+ for the M examples that precede i in the
    batch (cyclically); the official code without explicit negatives is M = 1. At least 0.

    Args:
        mean_a: [N, D], normalised inside.
        concentration_a: [N], positive.
        mean_b: [N, D].
        concentration_b: [N].
        key: randomness.
        kappa: positive scalar, the inverse temperature (learned from 20 in the official code).
        samples: S, Monte Carlo draws.
        negatives: M, between 1 and N - 1 (a negative of N = 1 is the positive itself).

    Returns:
        [N].

    Raises:
        ValueError: ``negatives`` out of range: further ones would be positives.

    Source: Kirchhof et al. 2023; mkirchhof/Probabilistic_Contrastive_Learning@31a8ae2
    utils/losses.py (MCInfoNCE), where the positive stands in the denominator with weight 1.
    """
    if len(mean_a) > 1 and not 1 <= negatives < len(mean_a):
        raise ValueError(f"`negatives` is {negatives}; the batch holds {len(mean_a)} examples.")
    a_key, b_key = jax.random.split(key)
    a = sample_von_mises_fisher(a_key, mean_a, concentration_a, samples=samples)
    b = sample_von_mises_fisher(b_key, mean_b, concentration_b, samples=samples)
    positive = kappa * jnp.sum(a * b, axis=-1)
    others = lax.map(
        lambda shift: kappa * jnp.sum(a * jnp.roll(b, shift, axis=1), axis=-1),
        jnp.arange(1, negatives + 1),
    )
    negative = jax.nn.logsumexp(others, axis=0) - jnp.log(negatives)
    log_likelihood = positive - jnp.logaddexp(positive, negative)
    return jnp.log(samples) - jax.nn.logsumexp(log_likelihood, axis=0)
