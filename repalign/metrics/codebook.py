"""How a quantizer uses its codebook. Counts of batches add up, so every metric starts from them."""

import jax.numpy as jnp
from jax.scipy.special import entr

from repalign.typing import Array, Bool, Float, Int, Num, Scalar


def counts(
    indices: Int[Array, "*shape"],
    *,
    size: int,
    where: Bool[Array, "*shape"] | None = None,
) -> Float[Array, " size"]:
    """Returns how often each of ``size`` codes occurs; float32, exact up to 2^24 per code.

    Indices outside ``[0, size)`` and those outside the mask are not counted.
    """
    indices = indices.reshape(-1)
    counted = (indices >= 0) & (indices < size)
    if where is not None:
        counted = counted & where.reshape(-1)
    return jnp.zeros(size).at[jnp.where(counted, indices, 0)].add(counted.astype(jnp.float32))


def usage(counts: Num[Array, " size"]) -> Scalar:
    """Share of codes that occur at all, in [0, 1]."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def entropy(counts: Num[Array, " size"]) -> Scalar:
    """Entropy of the code distribution in nats, in [0, log(size)]; 0 if nothing was counted."""
    total = jnp.sum(counts)
    return jnp.sum(entr(counts / jnp.where(total > 0, total, 1.0)))


def perplexity(counts: Num[Array, " size"]) -> Scalar:
    """``exp(entropy)``: the number of equally used codes with the same entropy, in [1, size]."""
    return jnp.exp(entropy(counts))
