"""Terms on one set of embeddings that spread them out or shape their distribution."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import keep, smaller_gram, zero_masked
from repalign.losses.uniformity import log_kernel_sums
from repalign.numerics import (
    as_float,
    inner_products,
    l2_normalize,
    masked_mean,
)
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Key, Num, Scalar

_NEIGHBOR_BLOCK = 8192
"""Largest number of examples whose similarities are held as one square matrix."""


def _nearest_other(
    x: Float[Array, "batch dim"], where: Bool[Array, "batch"] | None
) -> Integer[Array, "batch"]:
    """Returns the index of each row's most similar other row, in blocks of rows if many."""
    columns = jnp.arange(x.shape[0])

    def nearest(row, index):
        allowed = columns != index if where is None else (columns != index) & where
        return jnp.argmax(jnp.where(allowed, inner_products(row[None], x)[0], -2.0))

    if x.shape[0] <= _NEIGHBOR_BLOCK:
        return jax.vmap(nearest)(x, columns)
    return lax.map(lambda pair: nearest(*pair), (x, columns), batch_size=1024)


def koleo(
    x: Num[Array, "batch dim"],
    *,
    epsilon: ArrayLike = 1e-8,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """KoLeo: ``-mean_i log(||x_i - x_nn(i)|| + epsilon)`` on l2-normalised rows, a scalar.

    ``nn(i)`` is the nearest other row of the batch (lowest index among ties); both rows of a pair
    receive gradients, the choice of the neighbour none. Rows closer than 1e-6, which float32 cannot
    tell from duplicates, cost -log(epsilon) and pass no gradient (torch's distance offsets each
    coordinate by epsilon and passes one of about 1 / epsilon). Above 8192 rows the similarities
    are computed 1024 rows at a time.

    Source: Sablayrolles et al. (arXiv:1806.03198); facebookresearch/dinov2@b8931f7:
    dinov2/loss/koleo_loss.py:25-48; lightly-ai/lightly@e8d317f:lightly/loss/koleo_loss.py.
    """
    x = l2_normalize(zero_masked(x, where))
    neighbor = x[_nearest_other(lax.stop_gradient(x), where)]
    squared = jnp.sum(jnp.square(x - neighbor), axis=1)
    apart = squared > 1e-12
    # The inner where keeps the derivative of sqrt finite for duplicates.
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
    return masked_mean(-jnp.log(distance + epsilon), where)


def von_neumann_entropy(
    x: Num[Array, "batch dim"],
    *,
    epsilon: ArrayLike = 1e-7,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """Entropy ``-sum_j l_j log l_j`` of the spectrum of ``(1/N) sum_i x_i x_i^T``, x l2-normalised.

    In [0, log min(N, D)]; add it with a negative weight to a loss to spread the representation.
    Eigenvalues up to ``epsilon`` count as 0 and pass no gradient: at low rank the derivative of
    ``l log l`` is infinite (the official code drops NaN values, not NaN gradients).

    Source: Kim et al. (arXiv:2304.01434); jaeill/CVPR23-VNE@c63961b:vne/__init__.py:15-19.
    """
    x, count = keep(x, where)
    x = l2_normalize(x)
    eigenvalues = jnp.linalg.eigvalsh(smaller_gram(x) / jnp.maximum(count, 1.0))
    positive = eigenvalues > epsilon
    safe = jnp.where(positive, eigenvalues, 1.0)
    return -jnp.sum(safe * jnp.log(safe))


def total_coding_rate(
    x: Num[Array, "batch dim"],
    *,
    epsilon: ArrayLike = 0.2,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """Coding rate ``R(X) = 1/2 log det(I + D / (N epsilon) X^T X)`` in nats, a scalar >= 0.

    Rows are taken as they are (normalise them before). Computed on the smaller Gram matrix.
    ``epsilon`` is the squared distortion, as in tsb0601/EMP-SSL@8fc3758:loss.py:81-90.
    Source: Yu et al. (arXiv:2006.08558), the rate R.
    """
    x, count = keep(x, where)
    gram = smaller_gram(x) * (x.shape[1] / (jnp.maximum(count, 1.0) * epsilon))
    factor = jnp.linalg.cholesky(jnp.eye(gram.shape[0], dtype=gram.dtype) + gram)
    return jnp.sum(jnp.log(jnp.diagonal(factor)))


def sigreg(
    x: Num[Array, "batch dim"],
    key: Key[Array, ""],
    *,
    num_slices: int = 256,
    t_max: ArrayLike = 3.0,
    num_points: int = 17,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """SIGReg: mean Epps-Pulley statistic of the batch along random directions, a scalar >= 0.

    For unit directions ``u``: ``N int_{-t_max}^{t_max} |mean_i e^{i t <u, x_i>} - e^{-t^2/2}|^2
    e^{-t^2/2} dt``, by the trapezoidal rule on ``num_points`` points of [0, t_max]. It is small
    when the embeddings are an isotropic standard Gaussian. Linear memory in the batch.

    Source: Balestriero & LeCun (arXiv:2511.08544); rbalestr-lab/lejepa@eddffdd:
    lejepa/univariate/epps_pulley.py:62-99 and multivariate/slicing.py:119-153.
    """
    x, count = keep(x, where)
    directions = l2_normalize(jax.random.normal(key, (num_slices, x.shape[1])))
    projections = inner_products(x, directions)
    t = jnp.linspace(0.0, t_max, num_points)
    target = jnp.exp(-0.5 * jnp.square(t))
    step = t_max / (num_points - 1)
    # Both halves of the symmetric integrand at once: interior points count twice.
    weights = target * jnp.full(num_points, 2.0 * step).at[jnp.array([0, -1])].set(step)

    def squared_error(point_and_target):
        point, value = point_and_target
        real = keep(jnp.cos(point * projections), where)[0]
        imaginary = keep(jnp.sin(point * projections), where)[0]
        total = jnp.maximum(count, 1.0)
        return jnp.square(jnp.sum(real, axis=0) / total - value) + jnp.square(
            jnp.sum(imaginary, axis=0) / total
        )

    errors = lax.map(jax.checkpoint(squared_error), (t, target))
    return count * jnp.mean(weights @ errors)


def dispersive(
    x: Num[Array, "batch *features"],
    *,
    temperature: ArrayLike = 1.0,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """Dispersive loss: ``log mean_{i,j} exp(-||x_i - x_j||^2 / (D temperature))``, a scalar <= 0.

    Features are flattened to D numbers per example and the mean runs over all N^2 pairs with
    i = j, so the loss is at least -log N.

    The sum over pairs is streamed for large batches as in ``losses.contrastive``. Source: Wang &
    He, Diffuse and Disperse (arXiv:2506.09027), the l2 InfoNCE variant. The division by D is the
    released code's (raywang4/DispLoss, ``disp_loss``), which has no temperature; the paper's stands
    without that division.
    """
    x = as_float(x).reshape(x.shape[0], -1)
    others = log_kernel_sums(x, x, 1.0 / (x.shape[1] * temperature), where)
    sums = jnp.logaddexp(others, 0.0)  # with the pair i = j, whose kernel is 1
    used = jnp.ones(x.shape[0], bool) if where is None else where
    some = jnp.any(used)
    total = jax.nn.logsumexp(jnp.where(some, sums, 0.0), where=used | ~some)
    pairs = jnp.square(jnp.sum(used).astype(x.dtype))
    return jnp.where(some, total - jnp.log(jnp.where(some, pairs, 1.0)), 0.0)
