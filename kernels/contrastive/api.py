"""Reductions over all pairs: the public functions and the choice of an implementation."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from repalign.kernels.contrastive import reference, xla
from repalign.kernels.contrastive.reference import Ids

IMPLEMENTATIONS = {"reference": reference, "xla": xla}

DENSE_ENTRIES = 8192 * 8192
"""The largest matrix of logits that is held in memory: 256 MiB of float32."""


def choose(rows: int, columns: int) -> str:
    """Returns the implementation that ``implementation=None`` stands for at these static shapes."""
    return "reference" if rows * columns <= DENSE_ENTRIES else "xla"


def log_sum_exp(
    a: Array,
    b: Array,
    *,
    scale: ArrayLike,
    exclude: Ids | None = None,
    include: Ids | None = None,
    where: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Returns ``log sum_j exp(scale <a_i, b_j>)`` for every row i.

    The sum runs over the counted columns: ``where[j]`` holds, ``exclude[0][i] != exclude[1][j]``
    and ``include[0][i] == include[1][j]``. A row with none gets -inf and a zero gradient.

    Args:
        a: rows ``[M, D]``. Computed in float32 (float64 stays float64).
        b: columns ``[N, D]``.
        scale: a scalar, differentiable (an inverse temperature).
        exclude: integers ``([M], [N])``; equal ids take an entry out, e.g. a row's own column.
        include: integers ``([M], [N])``; only entries with equal ids count, e.g. cluster members.
        where: bool ``[N]``; columns to count.
        implementation: ``"reference"`` (the whole matrix), ``"xla"`` (blocks; linear memory, first
            derivatives in reverse mode only) or None, which is ``choose(M, N)``.

    Returns:
        ``[M]``.

    Raises:
        ValueError: wrong shapes or an unknown implementation.
    """
    a, b, chosen = _check(a, b, where, implementation)
    exclude, include = _replicate_columns(exclude), _replicate_columns(include)
    return chosen.log_sum_exp(a, b, jnp.asarray(scale, a.dtype), exclude, include, where)


def sigmoid_loss(
    a: Array,
    b: Array,
    *,
    scale: ArrayLike,
    bias: ArrayLike,
    positive: Ids,
    where: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Returns ``sum_j softplus(-y_ij (scale <a_i, b_j> + bias))`` for every row i.

    ``y_ij`` is +1 where ``positive[0][i] == positive[1][j]`` and -1 elsewhere; the other arguments
    are those of ``log_sum_exp``, ``bias`` being a differentiable scalar.

    Raises:
        ValueError: wrong shapes or an unknown implementation.
    """
    a, b, chosen = _check(a, b, where, implementation)
    scale, bias = jnp.asarray(scale, a.dtype), jnp.asarray(bias, a.dtype)
    return chosen.sigmoid_loss(a, b, scale, bias, _replicate_columns(positive), where)


def _replicate_columns(ids: Ids | None) -> Ids | None:
    """Has every device compute the column ids, which the partitioner would otherwise gather."""
    return None if ids is None else (ids[0], xla.replicate(ids[1]))


def _check(a: Array, b: Array, where: Array | None, implementation: str | None):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected [rows, dim] and [columns, dim], got {a.shape} and {b.shape}.")
    if where is not None and where.shape != b.shape[:1]:
        raise ValueError(f"`where` masks the {len(b)} columns, but has shape {where.shape}.")
    name = choose(len(a), len(b)) if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; valid: {', '.join(IMPLEMENTATIONS)}.")
    dtype = jnp.float64 if jnp.float64 in (a.dtype, b.dtype) else jnp.float32
    return a.astype(dtype), b.astype(dtype), IMPLEMENTATIONS[name]
