"""Codebook search over a mesh: vectors split over one axis, the codebook's rows over another.

Each device searches its slice of the codebook for its vectors; then pairs (score, index) are
reduced, and equal scores go to the lowest index of the whole codebook, as on one device. These
functions are how kernels run on several devices: XLA cannot split a kernel by itself.

``mesh`` has the axes that are named; ``vectors_axis`` or ``codes_axis`` may be several axes, or
None (not split).
Counts that the axes do not divide are a ValueError. Everything else is as in the function of the
same name in ``api``, and so is the result up to the rounding of the codebook's mean, whose parts
are added in another order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from repalign.kernels.codebook import api
from repalign.kernels.codebook.api import Assignment, CodeStatistics
from repalign.kernels.codebook.operands import center_sums, scored

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Axis = str | tuple[str, ...] | None

_LAST = jnp.iinfo(jnp.int32).max


def _check_divides(mesh: Mesh, axis: Axis, count: int, what: str) -> None:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    devices = math.prod(mesh.shape[name] for name in axes)
    if count % devices:
        raise ValueError(
            f"{count} {what} do not divide over the {devices} devices of axis {axis!r}."
        )


def _mapped(
    function: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[P, ...],
    out_specs: Any,
) -> Callable[..., Any]:
    # check_vma=False, because a Pallas call does not say over which axes its result varies.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _sum(x: Any, axis: Axis) -> Any:
    return x if axis is None else lax.psum(x, axis)


def _offset(axis: Axis, codes: int) -> jax.Array | int:
    return 0 if axis is None else lax.axis_index(axis) * codes


def _slice_search(z, codebook, k, codes_axis, distance, precision, implementation):
    """Returns scores, indices in the whole codebook, and which vectors are finite."""
    z, codebook = api.comparable(z, codebook, distance)
    implementation = api.resolved(implementation, z.dtype)
    api.check_precision(precision, implementation)
    operands = scored(z, codebook, distance, _sum(center_sums(codebook), codes_axis))
    scores, indices = api.search(operands, k=k, precision=precision, implementation=implementation)
    return scores, indices + _offset(codes_axis, codebook.shape[0]), operands.finite


@partial(
    jax.jit,
    static_argnames=(
        "mesh",
        "vectors_axis",
        "codes_axis",
        "distance",
        "precision",
        "implementation",
    ),
)
def nearest_codes(
    z: jax.Array,
    codebook: jax.Array,
    *,
    mesh: Mesh,
    vectors_axis: Axis = None,
    codes_axis: Axis = None,
    distance: str = "euclidean",
    precision: str = "float32",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the index of the nearest code of every vector, [vectors] split over vectors_axis."""
    _check_divides(mesh, vectors_axis, z.shape[0], "vectors")
    _check_divides(mesh, codes_axis, codebook.shape[0], "codes")

    def local(z: jax.Array, codebook: jax.Array) -> jax.Array:
        scores, indices, finite = _slice_search(
            z, codebook, None, codes_axis, distance, precision, implementation
        )
        if codes_axis is not None:
            reached = scores == lax.pmin(scores, codes_axis)
            indices = lax.pmin(jnp.where(reached, indices, _LAST), codes_axis)
        return jnp.where(finite, indices, 0)

    specs = (P(vectors_axis, None), P(codes_axis, None))
    return _mapped(local, mesh, specs, P(vectors_axis))(z, codebook)


@partial(
    jax.jit,
    static_argnames=(
        "mesh",
        "vectors_axis",
        "codes_axis",
        "k",
        "distance",
        "precision",
        "implementation",
    ),
)
def top_k_codes(
    z: jax.Array,
    codebook: jax.Array,
    *,
    k: int,
    mesh: Mesh,
    vectors_axis: Axis = None,
    codes_axis: Axis = None,
    distance: str = "euclidean",
    precision: str = "float32",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the ``k`` nearest codes of every vector, [vectors, k] split over vectors_axis."""
    _check_divides(mesh, vectors_axis, z.shape[0], "vectors")
    _check_divides(mesh, codes_axis, codebook.shape[0], "codes")
    if not 1 <= k <= codebook.shape[0]:
        raise ValueError(f"k={k} must lie between 1 and the number of codes, {codebook.shape[0]}.")

    def local(z: jax.Array, codebook: jax.Array) -> jax.Array:
        kept = min(k, codebook.shape[0])
        scores, indices, finite = _slice_search(
            z, codebook, kept, codes_axis, distance, precision, implementation
        )
        if codes_axis is not None:
            # Slices lie in the order of their codes, and top_k is stable.
            scores, indices = (
                lax.all_gather(x, codes_axis, axis=1, tiled=True) for x in (scores, indices)
            )
            order = lax.top_k(-scores, k)[1]
            indices = jnp.take_along_axis(indices, order, axis=1)
        return jnp.where(finite[:, None], indices, jnp.arange(k, dtype=jnp.int32))

    specs = (P(vectors_axis, None), P(codes_axis, None))
    return _mapped(local, mesh, specs, P(vectors_axis, None))(z, codebook)


@partial(jax.jit, static_argnames=("mesh", "vectors_axis", "codes_axis", "implementation"))
def soft_assignment(
    z: jax.Array,
    codebook: jax.Array,
    *,
    mesh: Mesh,
    vectors_axis: Axis = None,
    codes_axis: Axis = None,
    temperature: float | jax.Array = 1.0,
    log_weights: jax.Array | None = None,
    implementation: str | None = None,
) -> Assignment:
    """Softmax over the codes of all slices; each slice needs a code of positive weight."""
    z, codebook = api.decision_operands(z, codebook)
    implementation = api.resolved(implementation, z.dtype)
    _check_divides(mesh, vectors_axis, z.shape[0], "vectors")
    _check_divides(mesh, codes_axis, codebook.shape[0], "codes")
    if log_weights is None:
        log_weights = jnp.zeros(codebook.shape[:1], codebook.dtype)

    def local(z, codebook, log_weights, temperature):
        center = lax.stop_gradient(jnp.sum(codebook, axis=0))
        center, count = _sum((center, codebook.shape[0]), codes_axis)
        log_normalizer, mean = api.assign_about(
            center / count, z, codebook, log_weights, temperature, implementation
        )
        if codes_axis is not None:
            highest = lax.pmax(lax.stop_gradient(log_normalizer), codes_axis)
            total = lax.psum(jnp.exp(log_normalizer - highest), codes_axis)
            share = jnp.exp(log_normalizer - highest) / total
            log_normalizer = highest + jnp.log(total)
            mean = lax.psum(share[:, None] * mean, codes_axis)
        return Assignment(log_normalizer, mean)

    rows = P(vectors_axis, None)
    specs = (rows, P(codes_axis, None), P(codes_axis), P())
    mapped = _mapped(local, mesh, specs, Assignment(P(vectors_axis), rows))
    return mapped(z, codebook, log_weights, jnp.asarray(temperature, z.dtype))


@partial(
    jax.jit, static_argnames=("mesh", "vectors_axis", "codes_axis", "num_codes", "implementation")
)
def code_statistics(
    z: jax.Array,
    indices: jax.Array,
    num_codes: int,
    *,
    mesh: Mesh,
    vectors_axis: Axis = None,
    codes_axis: Axis = None,
    where: jax.Array | None = None,
    implementation: str | None = None,
) -> CodeStatistics:
    """Counts and sums of all vectors of every code, split over codes_axis."""
    _check_divides(mesh, vectors_axis, z.shape[0], "vectors")
    _check_divides(mesh, codes_axis, num_codes, "codes")
    slices = 1 if codes_axis is None else mesh.shape[codes_axis]
    if where is None:
        where = jnp.ones(indices.shape, bool)

    def local(z, indices, where):
        codes = num_codes // slices
        statistics = api.code_statistics(
            z,
            # Codes of other slices lie outside this one, and are left out.
            indices - _offset(codes_axis, codes),
            codes,
            where=where,
            implementation=implementation,
        )
        return _sum(statistics, vectors_axis)

    specs = (P(vectors_axis, None), P(vectors_axis), P(vectors_axis))
    out = CodeStatistics(P(codes_axis), P(codes_axis, None))
    return _mapped(local, mesh, specs, out)(z, indices, where)
