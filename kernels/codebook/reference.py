"""Nearest codes the obvious way: the difference form, one vector at a time."""

import jax
import jax.numpy as jnp
from jax import lax


def _distances(vector: jax.Array, codebook: jax.Array, distance: str) -> jax.Array:
    if distance == "cosine":
        return 1.0 - jnp.matmul(codebook, vector, precision=lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(codebook - vector), axis=1)


def _masked_distances(vector: jax.Array, codebook: jax.Array, distance: str) -> jax.Array:
    usable = jnp.all(jnp.isfinite(codebook), axis=1)
    distances = jnp.where(usable, _distances(vector, codebook, distance), jnp.inf)
    return jnp.where(jnp.all(jnp.isfinite(vector)), distances, 0.0)


def nearest_codes(z: jax.Array, codebook: jax.Array, *, distance: str) -> jax.Array:
    """See ``repalign.kernels.codebook.api.nearest_codes``; O(codes * dim) memory per vector."""
    return lax.map(
        lambda vector: jnp.argmin(_masked_distances(vector, codebook, distance)).astype(jnp.int32),
        z,
    )


def top_k_codes(z: jax.Array, codebook: jax.Array, *, k: int, distance: str) -> jax.Array:
    """See ``repalign.kernels.codebook.api.top_k_codes``."""
    return lax.map(
        lambda vector: lax.top_k(-_masked_distances(vector, codebook, distance), k)[1].astype(
            jnp.int32
        ),
        z,
    )


def soft_assignment(
    z: jax.Array, codebook: jax.Array, log_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``repalign.kernels.codebook.api.soft_assignment`` (temperature 1)."""

    def assign(vector):
        logits = log_weights - jnp.sum(jnp.square(codebook - vector), axis=1)
        weights = jax.nn.softmax(logits)
        return jax.nn.logsumexp(logits), jnp.matmul(
            weights, codebook, precision=lax.Precision.HIGHEST
        )

    return lax.map(assign, z)


def code_sums(z: jax.Array, segments: jax.Array, num_codes: int) -> jax.Array:
    """Returns the sum of the vectors of every code, [num_codes, dim]."""

    def of_code(code):
        return jnp.sum(jnp.where((segments == code)[:, None], z, 0.0), axis=0)

    return lax.map(of_code, jnp.arange(num_codes))
