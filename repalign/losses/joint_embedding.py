"""Losses between the embeddings of two or more views of the same examples, without negatives."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from repalign.losses.batch_statistics import (
    centered,
    covariance,
    keep,
    smaller_gram,
    zero_masked,
)
from repalign.losses.regularizers import sigreg, total_coding_rate
from repalign.numerics import as_float, cosine_similarity, inner_products, l2_normalize, masked_mean
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Key, Num, Scalar


def _off_diagonal(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """Returns the matrix with zeros on its diagonal."""
    return jnp.where(jnp.eye(matrix.shape[0], dtype=bool), 0.0, matrix)


def negative_cosine(
    a: Num[Array, "batch dim"], b: Num[Array, "batch dim"]
) -> Float[Array, "batch"]:
    """Returns ``-cos(a_i, b_i)`` per example, in [-1, 1]; both sides receive gradients.

    A zero vector has similarity 0 and gradient 0. Source: the loss of SimSiam without its
    stop-gradient, lightly-ai/lightly@e8d317f:lightly/loss/negative_cosine_similarity.py.
    """
    return -cosine_similarity(a, b)


def byol(
    prediction_a: Num[Array, "batch dim"],
    prediction_b: Num[Array, "batch dim"],
    target_a: Num[Array, "batch dim"],
    target_b: Num[Array, "batch dim"],
) -> Float[Array, "batch"]:
    """BYOL: ``(2 - 2 cos(p_a, sg t_b)) + (2 - 2 cos(p_b, sg t_a))`` per example, in [0, 8].

    Args:
        prediction_a: the online network's predictions for the first view; ``prediction_b`` for the
            second.
        target_a: the EMA network's projections of the first view; ``target_b`` of the second. They
            receive no gradient.

    Source: Grill et al. (arXiv:2006.07733), eq. 2 and its symmetrised form;
    htdt/self-supervised@d9662c8:methods/byol.py:38-48.
    """
    forward = cosine_similarity(prediction_a, lax.stop_gradient(target_b))
    backward = cosine_similarity(prediction_b, lax.stop_gradient(target_a))
    return (2.0 - 2.0 * forward) + (2.0 - 2.0 * backward)


def simsiam(
    prediction_a: Num[Array, "batch dim"],
    prediction_b: Num[Array, "batch dim"],
    projection_a: Num[Array, "batch dim"],
    projection_b: Num[Array, "batch dim"],
) -> Float[Array, "batch"]:
    """SimSiam: ``-(cos(p_a, sg z_b) + cos(p_b, sg z_a)) / 2`` per example, in [-1, 1].

    The projections receive no gradient. Source: Chen & He (arXiv:2011.10566), eq. 4.
    """
    forward = negative_cosine(prediction_a, lax.stop_gradient(projection_b))
    backward = negative_cosine(prediction_b, lax.stop_gradient(projection_a))
    return 0.5 * (forward + backward)


def barlow_twins(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    lambda_param: ArrayLike = 5e-3,
    epsilon: ArrayLike = 1e-5,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """Barlow Twins: ``sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2``.

    ``C`` is the cross-correlation of the two views over the batch, each dimension standardised
    with its biased variance plus ``epsilon``. A batch statistic, hence a scalar (>= 0); every
    input receives gradients.

    Source: Zbontar et al. (arXiv:2103.03230), eq. 1-2; lightly-ai/lightly@e8d317f:
    lightly/loss/barlow_twins_loss.py (batch norm without affine parameters, summed as here).
    """
    a, count = centered(a, where)
    b, _ = centered(b, where)
    count = jnp.maximum(count, 1.0)
    a = a * lax.rsqrt(jnp.sum(jnp.square(a), axis=0) / count + epsilon)
    b = b * lax.rsqrt(jnp.sum(jnp.square(b), axis=0) / count + epsilon)
    correlation = inner_products(a.T, b.T) / count
    invariance = jnp.sum(jnp.square(jnp.diagonal(correlation) - 1.0))
    return invariance + lambda_param * jnp.sum(jnp.square(_off_diagonal(correlation)))


def vicreg(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    sim: ArrayLike = 25.0,
    var: ArrayLike = 25.0,
    cov: ArrayLike = 1.0,
    epsilon: ArrayLike = 1e-4,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """VICReg: ``sim mean|a - b|^2 + var (V(a) + V(b)) / 2 + cov (K(a) + K(b))``.

    ``V(x) = mean_d max(0, 1 - sqrt(Var(x_d) + epsilon))`` with the unbiased variance and
    ``K(x) = (1/D) sum_{i != j} Cov(x)_ij^2``. A batch statistic, hence a scalar (>= 0). The
    variance of a single example counts as 0.

    Source: Bardes et al. (arXiv:2105.04906), eq. 1-6; lightly-ai/lightly@e8d317f:
    lightly/loss/vicreg_loss.py (the halved variance term is in the official code too).
    """
    a, b = zero_masked(as_float(a), where), zero_masked(as_float(b), where)
    invariance = masked_mean(jnp.mean(jnp.square(a - b), axis=1), where)
    variance_loss, covariance_loss = 0.0, 0.0
    for x in (a, b):
        matrix = covariance(x, where)
        deviation = jnp.sqrt(jnp.diagonal(matrix) + epsilon)
        variance_loss += 0.5 * jnp.mean(jax.nn.relu(1.0 - deviation))
        covariance_loss += jnp.sum(jnp.square(_off_diagonal(matrix))) / matrix.shape[0]
    return sim * invariance + var * variance_loss + cov * covariance_loss


def tico(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    covariance: Float[Array, "dim dim"],
    *,
    beta: ArrayLike = 0.9,
    rho: ArrayLike = 8.0,
    detach: bool = True,
    where: Bool[Array, "batch"] | None = None,
) -> tuple[Scalar, Float[Array, "dim dim"]]:
    """TiCo: ``1 - mean cos(a_i, b_i) + rho mean a_i^T C a_i`` on unit-norm embeddings.

    ``C = beta C_previous + (1 - beta) mean a_i a_i^T`` is the running uncentred covariance.

    Args:
        a: the online network's embeddings; ``b``: the EMA network's (stop its gradient outside).
        covariance: the state; zero at the first step.
        detach: True stops the gradient of this batch's second moment (lightly); False lets it
            through, as the paper's algorithm reads.

    Returns:
        The loss and the new covariance, which carries no gradient.

    Source: Zhu et al. (arXiv:2206.10698); lightly-ai/lightly@e8d317f:
    lightly/loss/tico_loss.py:119-140.
    """
    a, count = keep(a, where)
    a, b = l2_normalize(a), l2_normalize(zero_masked(b, where))
    count = jnp.maximum(count, 1.0)
    second_moment = inner_products(a.T, a.T) / count
    if detach:
        second_moment = lax.stop_gradient(second_moment)
    new_covariance = beta * covariance + (1.0 - beta) * second_moment
    invariance = 1.0 - jnp.sum(a * b) / count
    contrast = jnp.sum(inner_products(a, new_covariance.T) * a) / count
    return invariance + rho * contrast, lax.stop_gradient(new_covariance)


def mmcr(
    online: Num[Array, "batch views dim"],
    momentum: Num[Array, "batch views dim"],
    *,
    lmda: ArrayLike = 5e-3,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """MMCR: ``-||C||_* + (lmda / N) sum_i ||Z_i||_*`` (nuclear norms).

    ``Z_i`` stacks every view of example i from both networks, row ``C_i`` is their mean. The
    inputs are taken as they are: normalise them to the unit sphere before. A batch statistic,
    hence a scalar. At a rank-deficient matrix the gradient is one of the subgradients.

    Source: Yerxa et al. (arXiv:2303.03307); lightly-ai/lightly@e8d317f:
    lightly/loss/mmcr_loss.py:62-75.
    """
    views, count = keep(jnp.concatenate([as_float(online), as_float(momentum)], axis=1), where)
    of_centroids = jnp.sum(jnp.linalg.svd(jnp.mean(views, axis=1), compute_uv=False))
    of_examples = jnp.sum(jnp.linalg.svd(views, compute_uv=False)) / jnp.maximum(count, 1.0)
    return lmda * of_examples - of_centroids


def frossl(
    a: Num[Array, "batch dim"],
    b: Num[Array, "batch dim"],
    *,
    invariance_weight: ArrayLike = 1.0,
    epsilon: ArrayLike = 1e-12,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """FroSSL: ``w mean|a - b|^2 + log ||K_a||_F^2 + log ||K_b||_F^2``, a scalar.

    Each dimension is centred, scaled to unit norm over the batch and multiplied by sqrt(D); ``K``
    is the Gram matrix divided by its trace, so the last two terms are minus the Renyi entropies
    (order 2) of the two spectra. ``epsilon`` is added to squared column norms, traces and squared
    Frobenius norms.

    Source: Skean et al. (arXiv:2310.02903); OFSkean/FroSSL@e841c57:
    solo/losses/frossl.py:28-66 (two views). Deviation: the epsilon, without which a constant
    dimension gives NaN.
    """

    def standardise(x):
        x, _ = centered(x, where)
        return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=0) + epsilon) * x.shape[1] ** 0.5

    def entropy(x):
        gram = smaller_gram(x)
        squared_norm = jnp.sum(jnp.square(gram / (jnp.trace(gram) + epsilon)))
        return -jnp.log(squared_norm + epsilon)

    a, b = standardise(a), standardise(b)
    invariance = masked_mean(jnp.mean(jnp.square(a - b), axis=1), where)
    return invariance_weight * invariance - entropy(a) - entropy(b)


def emp_ssl(
    views: Num[Array, "views batch dim"],
    *,
    invariance_weight: ArrayLike = 200.0,
    epsilon: ArrayLike = 0.2,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """EMP-SSL: ``-w mean_v mean_i cos(z_vi, mean_v z_vi) - mean_v R(Z_v)``, a scalar.

    ``R`` is ``regularizers.total_coding_rate`` with ``epsilon``; every view is a crop of the same
    examples. Rows should have unit norm, as in the official projector. The mean view receives
    gradients.

    Source: Tong et al. (arXiv:2304.03977); tsb0601/EMP-SSL@8fc3758:main.py:76-104,156-164
    and loss.py:76-90.
    """
    views = jax.vmap(lambda view: zero_masked(as_float(view), where))(views)
    agreement = cosine_similarity(views, jnp.broadcast_to(jnp.mean(views, axis=0), views.shape))
    rates = [total_coding_rate(view, epsilon=epsilon, where=where) for view in views]
    invariance = masked_mean(jnp.mean(agreement, axis=0), where)
    return -invariance_weight * invariance - sum(rates) / len(rates)


def lejepa(
    views: Num[Array, "views batch dim"],
    key: Key[Array, ""],
    *,
    weight: ArrayLike = 0.02,
    num_slices: int = 256,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """LeJEPA: ``(1 - weight) mean|z_vi - mean_v z_vi|^2 + weight mean_v SIGReg(Z_v)``, a scalar.

    Nothing is stop-gradiented and there is no teacher; ``regularizers.sigreg`` keeps the
    embeddings isotropic Gaussian. All views share the random directions drawn from ``key``.

    Source: Balestriero & LeCun (arXiv:2511.08544); rbalestr-lab/lejepa@eddffdd:
    MINIMAL.md:57-75,172-174.
    """
    views = jax.vmap(lambda view: zero_masked(as_float(view), where))(views)
    deviation = jnp.square(views - jnp.mean(views, axis=0))
    invariance = masked_mean(jnp.mean(deviation, axis=(0, 2)), where)
    gaussianity = jnp.mean(
        jnp.stack([sigreg(view, key, num_slices=num_slices, where=where) for view in views])
    )
    return (1.0 - weight) * invariance + weight * gaussianity


def transform_prediction(
    logits: Num[Array, "batch transforms"], labels: Integer[Array, "batch"]
) -> Float[Array, "batch"]:
    """Cross-entropy of predicting which transformation was applied to an input, per example.

    Equivariant SSL adds it to an invariance loss; with four rotations it is RotNet's objective.
    Source: Dangovski et al. (arXiv:2111.00899); rdangovs/essl@70b2cd0:
    cifar10/main.py:292-297; Gidaris et al. (arXiv:1803.07728).
    """
    return optax.softmax_cross_entropy_with_integer_labels(as_float(logits), labels)
