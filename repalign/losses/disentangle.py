"""Penalties on a VAE's aggregate posterior that make its latent dimensions independent."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import covariance, keep, zero_masked
from repalign.losses.generative import gaussian_log_density
from repalign.numerics import as_float, map_row_blocks
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Key, Num, Scalar


class KLDecomposition(NamedTuple):
    """Per-example estimates whose sum is that of KL(q(z|x) || p(z)), in nats."""

    index_code_mutual_information: Float[Array, "batch"]
    total_correlation: Float[Array, "batch"]
    dimension_wise_kl: Float[Array, "batch"]


def _log_importance_weights(
    rows: Integer[Array, "rows"], batch: int, dataset_size: int, sampling: str
) -> Float[Array, "rows batch"]:
    """Returns the log weight of posterior i in the estimate of q(z_j), [j, i], for some j."""
    if not lookup({"weighted": False, "stratified": True}, sampling, kind="sampling"):
        return jnp.full((rows.shape[0], batch), -math.log(batch * dataset_size))
    if not 1 < batch <= dataset_size:
        raise ValueError(
            f"stratified sampling needs 2 <= batch <= dataset_size, got {batch} and {dataset_size}."
        )
    rest = batch - 1
    stratum = (dataset_size - rest) / (dataset_size * rest)
    ahead = (jnp.arange(batch) - rows[:, None]) % batch
    weights = jnp.where(ahead == 0, 1.0 / dataset_size, 1.0 / rest)
    # One other example of each row stands for all those outside the batch.
    return jnp.log(jnp.where(ahead == 1, stratum, weights))


def decompose_kl(
    z: Num[Array, "batch dim"],
    mean: Num[Array, "batch dim"],
    log_variance: Num[Array, "batch dim"],
    *,
    dataset_size: int,
    sampling: str = "weighted",
) -> KLDecomposition:
    """beta-TCVAE: splits the KL term into mutual information, total correlation and marginals.

    With ``z_j ~ q(z|x_j)`` and ``log q(z_j) ~ log sum_i w_ji q(z_j|x_i)`` over the batch:
    ``log q(z|x) - log q(z)``, ``log q(z) - sum_d log q(z_d)``, ``sum_d log q(z_d) - log p(z_d)``.
    The loss is ``-log p(x|z) + mi + beta tc + kl``. One latent dimension at a time: no
    [batch, batch, dim] array, and large batches by blocks of rows (`numerics.map_row_blocks`).

    Args:
        dataset_size: number of training examples N.
        sampling: ``weighted`` uses ``w = 1 / (N M)`` for a batch of M; ``stratified`` gives the
            own posterior 1/N, one other the mass of the examples outside the batch, and the rest
            1/(M - 1).

    Raises:
        UserError: another ``sampling``.
        ValueError: a batch that stratified weights are not defined for.

    Source: Chen et al. (arXiv:1802.04942), eq. 2-4 and appendix C; rtqichen/beta-tcvae@1a3577d:
    vae_quant.py:194-258. Deviation: the released stratified weights walk the flattened matrix with
    a stride that lands in columns 0 and 1 of every row; here, as the appendix defines them, they
    are at the own posterior j and at (j + 1) mod M.
    """
    z, mean, log_variance = as_float(z), as_float(mean), as_float(log_variance)
    batch = z.shape[0]

    def of_rows(rows):
        some, numbers = rows
        log_weights = _log_importance_weights(numbers, batch, dataset_size, sampling)

        @jax.checkpoint
        def add_dimension(joint, dimension):
            samples, means, log_variances = dimension
            pairs = gaussian_log_density(
                jnp.broadcast_to(samples[:, None], joint.shape),
                jnp.broadcast_to(means[None, :], joint.shape),
                jnp.broadcast_to(log_variances[None, :], joint.shape),
            )
            return joint + pairs, jax.nn.logsumexp(log_weights + pairs, axis=1)

        joint, log_marginals = lax.scan(
            add_dimension, jnp.zeros_like(log_weights), (some.T, mean.T, log_variance.T)
        )
        return jax.nn.logsumexp(log_weights + joint, axis=1), jnp.sum(log_marginals, axis=0)

    # The backward pass of the scan holds a joint matrix for every dimension.
    log_qz, log_qz_product = map_row_blocks(
        of_rows, (z, jnp.arange(batch)), columns=batch * z.shape[1]
    )
    log_qz_given_x = jnp.sum(gaussian_log_density(z, mean, log_variance), axis=1)
    zeros = jnp.zeros_like(z)
    log_prior = jnp.sum(gaussian_log_density(z, zeros, zeros), axis=1)
    return KLDecomposition(
        log_qz_given_x - log_qz, log_qz - log_qz_product, log_qz_product - log_prior
    )


def dip(
    mean: Num[Array, "batch dim"],
    log_variance: Num[Array, "batch dim"],
    *,
    off_diagonal: ArrayLike,
    diagonal: ArrayLike,
    variant: str = "i",
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """DIP-VAE: ``l_od sum_{d != e} C_de^2 + l_d sum_d (C_dd - 1)^2``, a batch statistic.

    ``C`` is the (biased) covariance of the posterior means (variant ``i``), plus the mean
    posterior variances on the diagonal (``ii``).

    Raises:
        UserError: another variant.

    Source: Kumar et al. (arXiv:1711.00848), eq. 6-7; google-research/disentanglement_lib@86a644d:
    disentanglement_lib/methods/unsupervised/vae.py:308-371.
    """
    with_posterior_variances = lookup({"i": False, "ii": True}, variant, kind="variant")
    matrix = covariance(mean, where, ddof=0)
    variances = jnp.diagonal(matrix)
    squared_off_diagonal = jnp.sum(jnp.square(matrix)) - jnp.sum(jnp.square(variances))
    if with_posterior_variances:
        posterior_variances, count = keep(
            jnp.exp(zero_masked(as_float(log_variance), where)), where
        )
        variances += jnp.sum(posterior_variances, axis=0) / jnp.maximum(count, 1.0)
    return off_diagonal * squared_off_diagonal + diagonal * jnp.sum(jnp.square(variances - 1.0))


def permute_dimensions(key: Key[Array, ""], z: Num[Array, "batch dim"]) -> Num[Array, "batch dim"]:
    """Shuffles every latent dimension over the batch on its own: samples of ``prod_d q(z_d)``.

    Source: Kim & Mnih, FactorVAE (arXiv:1802.05983), algorithm 1.
    """
    return jax.random.permutation(key, z, axis=0, independent=True)


def factor_total_correlation(logits: Num[Array, "batch 2"]) -> Float[Array, "batch"]:
    """FactorVAE's penalty: ``D_0 - D_1``, the discriminator's log odds that z is not permuted.

    The encoder is trained through ``logits``; its mean estimates the total correlation in nats.
    Source: Kim & Mnih (arXiv:1802.05983), eq. 2-3; google-research/disentanglement_lib@86a644d:
    disentanglement_lib/methods/unsupervised/vae.py:236-246.
    """
    logits = as_float(logits)
    return logits[:, 0] - logits[:, 1]


def factor_discriminator(
    logits: Num[Array, "batch 2"], permuted_logits: Num[Array, "batch 2"]
) -> Float[Array, "batch"]:
    """Cross-entropy of the discriminator: class 0 for codes, class 1 for permuted codes, halved.

    Feed it codes without gradient to the encoder. Source: as ``factor_total_correlation``.
    """
    real = jax.nn.log_softmax(as_float(logits), axis=-1)[:, 0]
    permuted = jax.nn.log_softmax(as_float(permuted_logits), axis=-1)[:, 1]
    return -0.5 * (real + permuted)
