"""Codebook search: the public functions and the choice of an implementation.

Every function takes vectors ``z [vectors, dim]`` and a ``codebook [codes, dim]``, decides in
float32 (float64 stays float64), and never holds an array of vectors times codes. Vectors may be
sharded over devices; the codebook is replicated.
"""

from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels.codebook import reference, xla

IMPLEMENTATIONS = MappingProxyType({"reference": reference, "xla": xla})
"""What ``implementation=`` can name."""


class Assignment(NamedTuple):
    """What ``soft_assignment`` returns.

    Attributes:
        log_normalizer: [vectors], ``log sum_k w_k exp(-|z - c_k|^2 / temperature)``.
        mean_code: [vectors, dim], the codes' mean under the normalized weights.
    """

    log_normalizer: jax.Array
    mean_code: jax.Array


class CodeStatistics(NamedTuple):
    """What ``code_statistics`` returns.

    Attributes:
        counts: [codes], how many vectors chose each code.
        sums: [codes, dim], the sum of those vectors.
    """

    counts: jax.Array
    sums: jax.Array


def _operands(z: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    if z.ndim != 2 or codebook.ndim != 2:
        raise ValueError(
            f"z and codebook must be [vectors, dim] and [codes, dim], got {z.shape} and "
            f"{codebook.shape}: flatten the leading axes of z."
        )
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"z has {z.shape[1]} dimensions and the codebook {codebook.shape[1]}: project z first."
        )
    if codebook.shape[0] == 0:
        raise ValueError("the codebook is empty: it needs at least one code.")
    dtype = jnp.promote_types(jnp.promote_types(z.dtype, codebook.dtype), jnp.float32)
    return z.astype(dtype), codebook.astype(dtype)


def _normalize(x: jax.Array) -> jax.Array:
    squared_norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    nonzero = squared_norm > jnp.finfo(x.dtype).tiny
    return jnp.where(nonzero, x * lax.rsqrt(jnp.where(nonzero, squared_norm, 1.0)), 0.0)


def _comparable(z: jax.Array, codebook: jax.Array, distance: str) -> tuple[jax.Array, jax.Array]:
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"unknown distance {distance!r}: 'euclidean' or 'cosine'.")
    z, codebook = lax.stop_gradient(_operands(z, codebook))
    return (_normalize(z), _normalize(codebook)) if distance == "cosine" else (z, codebook)


def _module(implementation: str | None):
    if implementation is None:
        return xla
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}: {', '.join(IMPLEMENTATIONS)} or None."
        )
    return IMPLEMENTATIONS[implementation]


@partial(jax.jit, static_argnames=("distance", "implementation"))
def nearest_codes(
    z: jax.Array,
    codebook: jax.Array,
    *,
    distance: str = "euclidean",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the index of the nearest code of every vector: ``argmin_k |z_n - c_k|^2``.

    Exact up to the rounding of the float32 score ``|c|^2 / 2 - <z, c>`` about the codebook's mean:
    a code is only ever preferred to one that is nearer by no more than that. Equal scores go to the
    lowest index, so of identical codes the first is chosen. No gradient.

    A code that holds a NaN or an infinity is never chosen. A vector that holds one, and every
    vector if no code is usable, gets index 0 (and a non-finite ``code_distances``).

    Args:
        z: [vectors, dim]; vectors may be 0.
        codebook: [codes, dim], at least one code.
        distance: ``euclidean``, or ``cosine`` (both sides normalized; zero vectors stay zero).
        implementation: ``reference``, ``xla``, or None for the fastest one that works here (today
            ``xla``). A named one never falls back to another.

    Returns:
        [vectors] int32.

    Raises:
        ValueError: dimensions that differ, an empty codebook, an unknown name.
    """
    z, codebook = _comparable(z, codebook, distance)
    module = _module(implementation)
    if z.shape[0] == 0:
        return jnp.zeros((0,), jnp.int32)
    return module.nearest_codes(z, codebook, distance=distance)


@partial(jax.jit, static_argnames=("k", "distance", "implementation"))
def top_k_codes(
    z: jax.Array,
    codebook: jax.Array,
    *,
    k: int,
    distance: str = "euclidean",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the indices of the ``k`` nearest codes of every vector, nearest first.

    Ties, rounding and non-finite values as in ``nearest_codes``; a non-finite vector gets
    ``0 ... k - 1``, and where fewer than ``k`` codes are finite the last places are unspecified.

    Returns:
        [vectors, k] int32.

    Raises:
        ValueError: ``k`` not in 1 ... codes, or as in ``nearest_codes``.
    """
    z, codebook = _comparable(z, codebook, distance)
    module = _module(implementation)
    if not 1 <= k <= codebook.shape[0]:
        raise ValueError(f"k={k} must lie between 1 and the number of codes, {codebook.shape[0]}.")
    if z.shape[0] == 0:
        return jnp.zeros((0, k), jnp.int32)
    return module.top_k_codes(z, codebook, k=k, distance=distance)


@partial(jax.jit, static_argnames=("distance",))
def code_distances(
    z: jax.Array, codebook: jax.Array, indices: jax.Array, *, distance: str = "euclidean"
) -> jax.Array:
    """Returns the distance of every vector to its code, in the difference form.

    ``|z_n - c_{i_n}|^2``, or ``1 - cos(z_n, c_{i_n})`` for cosine. Differentiable in both.

    Returns:
        [vectors] float32.
    """
    z, codebook = _operands(z, codebook)
    codes = codebook[indices]
    if distance == "cosine":
        return 1.0 - jnp.sum(_normalize(z) * _normalize(codes), axis=-1)
    return jnp.sum(jnp.square(z - codes), axis=-1)


@partial(jax.jit, static_argnames=("implementation",))
def soft_assignment(
    z: jax.Array,
    codebook: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    log_weights: jax.Array | None = None,
    implementation: str | None = None,
) -> Assignment:
    """Softmax over codes of ``log w_k - |z - c_k|^2 / temperature``, in chunks.

    Differentiable in ``z``, ``codebook``, ``temperature`` and ``log_weights``; the gradient is
    computed in chunks too. A non-finite input gives non-finite results.

    Args:
        z: [vectors, dim].
        codebook: [codes, dim].
        temperature: positive, in units of a squared distance.
        log_weights: [codes], 0 by default; -inf leaves a code out. Not all may be -inf.

    Raises:
        ValueError: as in ``nearest_codes``.
    """
    z, codebook = _operands(z, codebook)
    module = _module(implementation)
    if log_weights is None:
        log_weights = jnp.zeros(codebook.shape[:1], codebook.dtype)
    if log_weights.shape != codebook.shape[:1]:
        raise ValueError(f"log_weights is {log_weights.shape} for {codebook.shape[0]} codes.")
    if z.shape[0] == 0:
        return Assignment(jnp.zeros((0,), z.dtype), z)
    center = lax.stop_gradient(jnp.mean(codebook, axis=0))
    scale = jnp.sqrt(jnp.asarray(temperature, z.dtype))
    log_normalizer, mean = module.soft_assignment(
        (z - center) / scale, (codebook - center) / scale, log_weights.astype(z.dtype)
    )
    return Assignment(log_normalizer, mean * scale + center)


@partial(jax.jit, static_argnames=("num_codes",))
def code_statistics(
    z: jax.Array, indices: jax.Array, num_codes: int, *, where: jax.Array | None = None
) -> CodeStatistics:
    """Counts and sums of the vectors of every code, as a segment sum in float32.

    The same inputs give the same bits on CPU and TPU; on a GPU only with
    ``--xla_gpu_deterministic_ops``. With vectors sharded over devices each device adds up its own
    and one all-reduce follows. Indices outside ``[0, num_codes)``, such as the -1 of a masked
    token, are left out. No gradient.

    Args:
        z: [vectors, dim].
        indices: [vectors].
        num_codes: codes in the codebook.
        where: [vectors], the vectors that count; values outside it may be NaN.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if z.ndim != 2 or indices.shape != z.shape[:1]:
        raise ValueError(
            f"z {z.shape} and indices {indices.shape} must be [vectors, dim], [vectors]."
        )
    z = lax.stop_gradient(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
    valid = (indices >= 0) & (indices < num_codes)
    if where is not None:
        valid &= where
    segments = jnp.where(valid, indices, num_codes)
    vectors = jnp.where(valid[:, None], z, 0.0)
    return CodeStatistics(
        counts=jax.ops.segment_sum(valid.astype(z.dtype), segments, num_codes),
        sums=jax.ops.segment_sum(vectors, segments, num_codes),
    )
