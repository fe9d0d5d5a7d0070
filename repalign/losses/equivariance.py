"""Losses that keep what a transformation of the input changes.

Predicting which transformation was applied (four rotations, the permutation of a jigsaw's tiles) is
``joint_embedding.transform_prediction``.
"""

import jax
import jax.numpy as jnp

from repalign.losses.batch_statistics import covariance, zero_masked
from repalign.losses.joint_embedding import vicreg
from repalign.numerics import as_float, inner_products, map_row_blocks, masked_mean
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Bool, Float, Num, Scalar


def split_invariant_equivariant(
    invariant_a: Num[Array, "batch invariant_dim"],
    invariant_b: Num[Array, "batch invariant_dim"],
    equivariant_a: Num[Array, "batch equivariant_dim"],
    equivariant_b: Num[Array, "batch equivariant_dim"],
    predicted_b: Num[Array, "batch equivariant_dim"],
    *,
    sim: ArrayLike = 10.0,
    equivariance: ArrayLike = 4.5,
    var: ArrayLike = 10.0,
    cov: ArrayLike = 1.0,
    epsilon: ArrayLike = 1e-4,
    where: Bool[Array, "batch"] | None = None,
) -> Scalar:
    """SIE: one part of the embedding is the same in both views, the other follows the change.

    ``sim mean|i_a - i_b|^2 + equivariance sim mean|p_b - e_b|^2 + var (V(x_a) + V(x_b) + V(p_b)) /
    2 + cov (K(x_a) + K(x_b))`` with ``x = [i, e]`` whole, so that the parts share nothing, and V
    and K as in ``joint_embedding.vicreg``. A batch statistic, hence a scalar (>= 0); every input
    receives gradients. The coefficients are those of the released code.

    Args:
        invariant_a: the first view's invariant part, ``invariant_b`` the second's.
        equivariant_a: the first view's equivariant part, ``equivariant_b`` the second's.
        predicted_b: the prediction of ``equivariant_b`` from ``equivariant_a`` and the
            transformation between the views; in the paper ``rho(g) equivariant_a``, the matrix from
            a hypernetwork of g.

    Source: Garrido et al. (arXiv:2302.10283); facebookresearch/SIE@54541cf:src/models.py:332-434,
    main.py:79-82.
    """
    whole_a = jnp.concatenate([as_float(invariant_a), as_float(equivariant_a)], axis=1)
    whole_b = jnp.concatenate([as_float(invariant_b), as_float(equivariant_b)], axis=1)

    def mean_square(x: Array, y: Array) -> Scalar:
        difference = zero_masked(as_float(x), where) - zero_masked(as_float(y), where)
        return masked_mean(jnp.mean(jnp.square(difference), axis=1), where)

    deviation = jnp.sqrt(jnp.diagonal(covariance(predicted_b, where)) + epsilon)
    return (
        sim * mean_square(invariant_a, invariant_b)
        + equivariance * sim * mean_square(predicted_b, equivariant_b)
        + vicreg(whole_a, whole_b, sim=0.0, var=var, cov=cov, epsilon=epsilon, where=where)
        + 0.5 * var * jnp.mean(jax.nn.relu(1.0 - deviation))
    )


def orthogonal_equivariance(
    a: Num[Array, "batch dim"], b: Num[Array, "batch dim"]
) -> Float[Array, "batch"]:
    """CARE: ``mean_{j != i} (<a_i, a_j> - <b_i, b_j>)^2`` per example, in [0, 4] on unit vectors.

    Row i of ``a`` and of ``b`` are one image under two augmentations, each of them the same for
    the whole batch (or for each of several batches). Zero says that an orthogonal map takes a to b:
    the augmentation acts as a rotation. Inputs are taken as they are (the paper's have unit norm);
    both receive gradients. 0 for a single example. Large batches go by blocks of rows.

    The released loss is ``2 (N - 1)`` times the mean of this one, which is the paper's expectation;
    its weight of 0.01 belongs to that scale. It is added to InfoNCE.

    Source: Gupta et al. (arXiv:2306.13924), section 3; Sharut/CARE@7090100:
    imagenet100/model/loss.py:48-63.
    """
    a, b = as_float(a), as_float(b)
    batch = a.shape[0]

    def rows(index: Array) -> Array:
        difference = jnp.square(inner_products(a[index], a) - inner_products(b[index], b))
        others = index[:, None] != jnp.arange(batch)
        return jnp.sum(jnp.where(others, difference, 0.0), axis=1) / max(batch - 1, 1)

    return map_row_blocks(rows, jnp.arange(batch), columns=batch)


_HINGES = {
    "vector": lambda squared, margin: jax.nn.relu(margin - jnp.sum(squared, axis=1)),
    "element": lambda squared, margin: jnp.mean(jax.nn.relu(margin - squared), axis=1),
}


def counting(
    whole: Num[Array, "batch dim"],
    tiles: Num[Array, "batch tiles dim"],
    other: Num[Array, "batch dim"],
    *,
    margin: ArrayLike = 10.0,
    hinge: str = "vector",
) -> Float[Array, "batch"]:
    """Learning to count: what the tiles of an image contain adds up to what the image contains.

    ``||c(x) - sum_j c(T_j x)||^2 + max(0, margin - ||c(y) - sum_j c(T_j x)||^2)`` per example. The
    second part, against another image, forbids that everything counts zero. Every input receives
    gradients.

    Args:
        whole: features of the image, downsampled to the size of a tile.
        tiles: features of its tiles (four in the paper).
        other: features of another image, downsampled.
        hinge: ``vector`` as in the paper; ``element`` takes the margin of every dimension on its
            own, and means over dimensions in place of sums (the public reimplementation).

    Raises:
        UserError: another name for ``hinge``.

    Source: Noroozi et al. (arXiv:1708.06734); clvrai/Representation-Learning-by-Learning-to-
    Count@2e86dfe:model.py:61-72.
    """
    cost = lookup(_HINGES, hinge, kind="hinge")
    total = jnp.sum(as_float(tiles), axis=1)
    matched = jnp.square(as_float(whole) - total)
    reduce = jnp.sum if hinge == "vector" else jnp.mean
    return reduce(matched, axis=1) + cost(jnp.square(as_float(other) - total), margin)
