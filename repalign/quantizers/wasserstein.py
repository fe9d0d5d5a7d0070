"""The Wasserstein codebook term of VQ-WAE: it moves the codes nobody chose, too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels import codebook as kernel
from repalign.numerics import as_float
from repalign.typing import Array, Float, Scalar


class WassersteinTerm(NamedTuple):
    """What ``wasserstein_codebook`` returns.

    Attributes:
        loss: [vectors], its mean is the entropic transport cost from the vectors to the codes.
        kl: scalar, ``KL(weights | uniform)`` in nats.
        potential: [codes], the dual potential, for a warm start of the next step.
    """

    loss: Float[Array, " vectors"]
    kl: Scalar
    potential: Float[Array, " codes"]


def wasserstein_codebook(
    z: Float[Array, "vectors dim"],
    codebook: Float[Array, "codes code_dim"],
    logits: Float[Array, " codes"],
    *,
    epsilon: float,
    iterations: int,
    potential: Float[Array, " codes"] | None = None,
) -> WassersteinTerm:
    """Entropic optimal transport between the batch and the weighted codebook, by its semi-dual.

    ``max_phi E_{y ~ pi} phi(y) - epsilon E_z log E_{y ~ pi} exp((phi(y) - |z - y|^2) / epsilon)``,
    with ``pi = softmax(logits)``. The maximum is approached by ``iterations`` of Sinkhorn on the
    dual, in chunks: no array of vectors times codes. ``phi`` is then held constant (envelope
    theorem) and the loss is differentiable in z, the codebook and the logits. Unlike the VQ losses
    it moves every code.

    Deviations: the authors climb the semi-dual with a small network for ``phi`` (and add the
    mirrored semi-dual, with a network on the vectors), or solve exactly with an LP; Sinkhorn steps
    reach the same maximum without a second optimizer. Their KL is averaged over the codes, this one
    summed.

    Args:
        z: [vectors, dim], the whole batch (of one latent position, in the paper).
        codebook: [codes, dim].
        logits: [codes], of the codes' weights pi; zeros for uniform.
        epsilon: entropic regularization, in units of a squared distance.
        iterations: Sinkhorn steps; the smaller epsilon, the more it takes (until then the loss is
            below the transport cost).
        potential: the last step's, or zeros.

    Raises:
        ValueError: dimensions that differ, epsilon not positive.

    Source: Vuong et al. 2023 (VQ-WAE, arXiv 2302.05917); VuongLong/VQ-WAE@f0d7890: quantizer.py,
    ``compute_OT_loss``; Genevay et al. 2016 (arXiv 1605.08527) for the semi-dual.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon} must be positive.")
    z, codebook = as_float(z), as_float(codebook)
    log_weights = jax.nn.log_softmax(as_float(logits))
    if potential is None:
        potential = jnp.zeros_like(log_weights)

    def row_potential(phi, z, codebook, log_weights):
        assignment = kernel.soft_assignment(
            z, codebook, temperature=epsilon, log_weights=log_weights + phi / epsilon
        )
        return -epsilon * assignment.log_normalizer

    def sinkhorn_step(phi, _):
        rows = row_potential(phi, *fixed)
        uniform = jnp.full(z.shape[:1], -jnp.log(z.shape[0]))
        return row_potential(rows, fixed[1], fixed[0], uniform), None

    fixed = lax.stop_gradient((z, codebook, log_weights))
    potential, _ = lax.scan(sinkhorn_step, lax.stop_gradient(potential), length=iterations)
    weights = jnp.exp(log_weights)
    loss = jnp.sum(weights * potential) + row_potential(potential, z, codebook, log_weights)
    kl = jnp.sum(weights * log_weights) + jnp.log(weights.shape[0])
    return WassersteinTerm(loss, kl, potential)
