"""Soft assignment on a GPU: the normalizer in a Mosaic GPU kernel, the rest in chunks.

The mean code and the gradients are products with the softmax, which follow in plain XLA from the
normalizer (``xla.mean_code``, ``xla.soft_assignment_backward``): nothing there needs a running
maximum, and XLA's matrix products serve them well.
"""

import jax
import jax.numpy as jnp

from repalign.kernels.codebook import pallas_gpu, xla
from repalign.kernels.codebook.operands import EXCLUDED, Scored


@jax.custom_vjp
def soft_assignment(
    z: jax.Array, codebook: jax.Array, log_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``repalign.kernels.codebook.api.soft_assignment`` (temperature 1, no shift)."""
    # log w - |z - c|^2 = -|z|^2 - 2 ((|c|^2 - log w) / 2 - <z, c>)
    bias = 0.5 * (jnp.sum(jnp.square(codebook), axis=1) - log_weights)
    bias = jnp.minimum(bias, EXCLUDED)
    operands = Scored(z, codebook, bias, jnp.ones(z.shape[:1], bool))
    log_normalizer = pallas_gpu.log_normalizer(operands) - jnp.sum(jnp.square(z), axis=1)
    return log_normalizer, xla.mean_code(z, codebook, log_weights, log_normalizer)


def _forward(z, codebook, log_weights):
    log_normalizer, mean = soft_assignment(z, codebook, log_weights)
    return (log_normalizer, mean), (z, codebook, log_weights, log_normalizer, mean)


soft_assignment.defvjp(_forward, xla.soft_assignment_backward)
