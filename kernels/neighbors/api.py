"""Exact nearest neighbours: the public function and the choice of an implementation."""

from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from repalign.kernels.choice import (
    Choice,
    check,
    is_hopper,
    is_partitioned,
    present_device,
)
from repalign.kernels.neighbors import pallas_gpu, pallas_tpu, reference, xla

METRICS = ("inner_product", "euclidean")
IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.top_k,
        "xla": xla.top_k,
        "pallas_tpu": pallas_tpu.top_k,
        "pallas_gpu": pallas_gpu.top_k,
    }
)
"""What ``implementation=`` can name."""


class Neighbors(NamedTuple):
    """The k nearest database points of each query, nearest first.

    Attributes:
        values: ``[queries, k]`` inner products (descending) or Euclidean distances (ascending).
        indices: ``[queries, k]`` int32 rows of the database.
    """

    values: Array
    indices: Array


def choose(*, k: int, dtype: jnp.dtype) -> Choice:
    """Returns what ``implementation=None`` stands for on the present device, and why.

    Args:
        k: the number of neighbours.
        dtype: what queries and database promote to.
    """
    device = present_device()
    kernels = {"tpu": ("pallas_tpu", pallas_tpu.MAX_K), "gpu": ("pallas_gpu", pallas_gpu.MAX_K)}
    if device.platform not in kernels:
        return Choice("xla", f"there is no kernel for {device.platform}.")
    name, most = kernels[device.platform]
    if device.platform == "gpu" and not is_hopper(device):
        return Choice("xla", f"{name} needs a Hopper GPU, and this is {device.device_kind}.")
    if is_partitioned():
        return Choice("xla", f"the mesh has several devices, and {name} runs on one (shard_map).")
    if dtype == jnp.float64:
        return Choice("xla", f"{name} compares in float32, not float64.")
    if k > most:
        return Choice("xla", f"{name} finds at most {most} neighbours, not {k}.")
    return Choice(name, f"{device.device_kind} runs it, and the scores never reach its memory.")


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
            memory), ``"pallas_tpu"``, ``"pallas_gpu"`` (Hopper) or None, which is what ``choose``
            says. A named one never falls back to another; the kernels run on one device, so over
            several they belong in ``jax.shard_map``.

    Returns:
        ``Neighbors(values, indices)``. Points with equal scores come in the order of their index.

    Raises:
        ValueError: wrong shapes, k out of range, an unknown metric or implementation, or a named
            implementation that does not support k or the dtype, or cannot run on this device.
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
    dtype = jnp.promote_types(queries.dtype, database.dtype)
    chosen = choose(k=k, dtype=dtype).implementation if implementation is None else implementation
    search = IMPLEMENTATIONS[check(chosen, IMPLEMENTATIONS)]
    if chosen in ("reference", "xla"):
        # The kernels multiply bfloat16 as it is: to float32 sums the products are the same.
        dtype = jnp.promote_types(dtype, jnp.float32)
    scores, indices = search(
        queries.astype(dtype), database.astype(dtype), k=k, metric=metric, exclude_self=exclude_self
    )
    values = scores if metric == "inner_product" else jnp.sqrt(-scores)
    return Neighbors(values, indices)
