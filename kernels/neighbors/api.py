"""Exact nearest neighbours: the public function and the choice of an implementation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from repalign.kernels.neighbors import reference, xla

METRICS = ("inner_product", "euclidean")
IMPLEMENTATIONS = {"reference": reference.top_k, "xla": xla.top_k}


class Neighbors(NamedTuple):
    """The k nearest database points of each query, nearest first.

    Attributes:
        values: ``[queries, k]`` inner products (descending) or Euclidean distances (ascending).
        indices: ``[queries, k]`` int32 rows of the database.
    """

    values: Array
    indices: Array


def top_k(
    queries: Array,
    database: Array,
    *,
    k: int,
    metric: str = "inner_product",
    exclude_self: bool = False,
    implementation: str | None = None,
) -> Neighbors:
    """Finds the k nearest database points of every query, exactly.

    Args:
        queries: ``[queries, dim]``, finite. Compared in float32 (float64 stays float64).
        database: ``[database, dim]``, finite.
        k: the number of neighbours, at most the database size (one less with ``exclude_self``).
        metric: ``"inner_product"`` or ``"euclidean"``. For cosine, normalise first.
        exclude_self: query i may not return database point i (for a search of a set in itself).
        implementation: ``"reference"`` (all scores at once, a stable sort), ``"xla"`` (bounded
            memory) or None, which chooses ``"xla"``.

    Returns:
        ``Neighbors(values, indices)``. Points with equal scores come in the order of their index.

    Raises:
        ValueError: wrong shapes, k out of range, or an unknown metric or implementation.
    """
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(
            "expected [queries, dim] and [database, dim], "
            f"got {queries.shape} and {database.shape}."
        )
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; valid: {', '.join(METRICS)}.")
    if exclude_self and queries.shape[0] != database.shape[0]:
        raise ValueError(
            f"exclude_self searches a set in itself, but there are {queries.shape[0]} queries and "
            f"{database.shape[0]} database points."
        )
    available = database.shape[0] - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k = {k} is not in [1, {available}], the number of neighbours there are.")
    chosen = "xla" if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        valid = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; valid: {valid}.")
    search = IMPLEMENTATIONS[chosen]
    dtype = jnp.promote_types(jnp.promote_types(queries.dtype, database.dtype), jnp.float32)
    scores, indices = search(
        queries.astype(dtype), database.astype(dtype), k=k, metric=metric, exclude_self=exclude_self
    )
    values = scores if metric == "inner_product" else jnp.sqrt(-scores)
    return Neighbors(values, indices)
