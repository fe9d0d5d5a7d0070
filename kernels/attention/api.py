"""Scaled dot-product attention: the public function and the choice of an implementation."""

import functools
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from repalign.kernels.attention import library, pallas_gpu, pallas_tpu, reference, xla
from repalign.kernels.attention.reference import Masks
from repalign.kernels.choice import Choice, check, is_hopper, present_device

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.attention,
        "dense": xla.dense,
        "xla": xla.attention,
        "pallas_tpu": pallas_tpu.attention,
        "pallas_gpu": pallas_gpu.attention,
        "jax_nn": library.jax_nn,
        "jax_cudnn": library.jax_cudnn,
        "jax_flash_tpu": library.jax_flash_tpu,
    }
)
"""What ``implementation=`` can name."""

SHORT = 512
"""Keys up to which the matrix of weights is held rather than cut into blocks."""


class QKNorm(NamedTuple):
    """How every head's queries and keys are normalised before their product.

    Attributes:
        query_scale: [dim].
        key_scale: [dim].
        query_bias: [dim] or None.
        key_bias: [dim] or None.
        kind: ``"layer_norm"``, or ``"rms_norm"``, which takes no bias.
        epsilon: added to the variance, or to the mean square.
    """

    query_scale: Array
    key_scale: Array
    query_bias: Array | None = None
    key_bias: Array | None = None
    kind: str = "layer_norm"
    epsilon: float = 1e-6


def choose(q: Any, k: Any, *, masked: bool = False, partitioned: bool = False) -> Choice:
    """Returns what ``implementation=None`` stands for, and why.

    Kernels of this package are chosen where nothing faster is known to do the job: none of them has
    been timed on a TPU or GPU yet.

    Args:
        q: [batch, queries, heads, dim], or its ``jax.ShapeDtypeStruct``.
        k: [batch, keys, heads, dim], likewise.
        masked: whether there is a mask or there are segment ids.
        partitioned: whether ``partition`` says how arrays are split over devices.
    """
    device = present_device()
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[3]
    short = keys <= SHORT
    in_xla = Choice("dense", f"{keys} keys: the weights are few enough to hold")
    if not short:
        in_xla = Choice("xla", f"{keys} keys: blocks of weights stay in cache, memory is linear")
    automatic = AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types
    split = automatic and jax.sharding.get_abstract_mesh().size > 1 and not partitioned
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if device.platform == "gpu" and half and is_hopper(device):
        if not masked and dim % 8 == 0 and dim <= 256:
            return Choice("jax_cudnn", "cuDNN's is the fastest known for unmasked 16-bit heads")
        if not split and masked and not short:
            return Choice("pallas_gpu", "cuDNN would need the mask as a matrix of biases")
    if device.platform == "tpu" and not short and not split:
        if not masked and library.fits_flash_tpu(queries, keys) and q.dtype != jnp.float64:
            return Choice("jax_flash_tpu", "JAX's kernel takes these lengths, ours is untimed")
        if q.dtype in (jnp.float32, jnp.bfloat16):
            return Choice("pallas_tpu", "JAX's kernel takes neither masks nor ragged lengths")
    if device.platform != "cpu" and split:
        return in_xla._replace(reason="automatic sharding cannot split a Pallas call")
    return in_xla


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    segment_ids: tuple[Array, Array] | None = None,
    qk_norm: QKNorm | None = None,
    partition: P | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Multi-head attention.

    .. math:: o_i = \sum_j \mathrm{softmax}_j(\mathrm{scale}\, q_i \cdot k_j)\, v_j

    over the keys j that query i sees; zeros, with zero gradients, where it sees none. Products take
    the inputs' dtype and are summed in float32; softmax and norms are float32. Differentiable in q,
    k, v and the norms' parameters; all but ``reference``, ``dense`` and ``jax_nn`` recompute the
    weights in the backward pass and take memory linear in the tokens.

    Reverse-mode gradients only. The same inputs give the same bits, except perhaps by cuDNN.
    float32 products are exact to float32; JAX's own kernels take XLA's default precision instead.

    Args:
        q: [batch, queries, heads, dim].
        k: [batch, keys, heads, dim].
        v: [batch, keys, heads, dim].
        scale: of the logits; ``dim ** -0.5`` by default.
        causal: query i sees keys 0 ... i only.
        mask: [batch or 1, heads or 1, queries or 1, keys] bool, True where a query sees a key. One
            that is the same for all heads and queries (padding) costs no matrix.
        segment_ids: integers of the queries and of the keys, each [batch or 1, tokens]; a query
            sees the keys of its own segment.
        qk_norm: normalises queries and keys of every head first.
        partition: how [batch, tokens, heads, dim] is split over the mesh in use, by batch and heads
            only: the call then runs under ``jax.shard_map``, which a Pallas kernel needs.
        implementation: a name in ``IMPLEMENTATIONS``, or None for what ``choose`` says. A named one
            never falls back to another.

    Returns:
        [batch, queries, heads, dim] in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not belong together, an unknown name, or an
            implementation that does not take these arguments (the message names the limit).
    """
    _check(q, k, v, mask, segment_ids, partition)
    if implementation is None:
        masked = mask is not None or segment_ids is not None
        chosen = choose(q, k, masked=masked, partitioned=partition is not None)
        implementation = chosen.implementation
    run = functools.partial(
        IMPLEMENTATIONS[check(implementation, IMPLEMENTATIONS)],
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        causal=causal,
    )
    if qk_norm is not None:
        q, k = _normalized(q, k, qk_norm)
    masks = _masks(mask, segment_ids, q.shape, k.shape)
    if partition is None:
        return run(q, k, v, masks)
    split = functools.partial(jax.shard_map, out_specs=partition, check_vma=False)
    return split(run, in_specs=(partition, partition, partition, _partitions(masks, partition)))(
        q, k, v, masks
    )


def _normalized(q: Array, k: Array, norm: QKNorm) -> tuple[Array, Array]:
    # In XLA, which fuses it into the copy that makes q and k, and not in the kernels, which would
    # normalise the keys once for every block of queries.
    if norm.kind == "rms_norm":
        if norm.query_bias is not None or norm.key_bias is not None:
            raise ValueError("rms_norm takes no bias: leave query_bias and key_bias None.")
        rms = functools.partial(reference.rms_norm, epsilon=norm.epsilon)
        return rms(q, norm.query_scale), rms(k, norm.key_scale)
    if norm.kind != "layer_norm":
        raise ValueError(f"unknown norm {norm.kind!r}: 'layer_norm' or 'rms_norm'.")
    layer = functools.partial(reference.layer_norm, epsilon=norm.epsilon)
    return layer(q, norm.query_scale, norm.query_bias), layer(k, norm.key_scale, norm.key_bias)


def _masks(
    mask: Array | None,
    segment_ids: tuple[Array, Array] | None,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
) -> Masks:
    """Brings masks into the form of ``Masks``; padding becomes a segment that no query is in."""
    if segment_ids is not None:
        segment_ids = tuple(ids.astype(jnp.int32) for ids in segment_ids)
    if mask is not None and mask.shape[1:3] == (1, 1):
        query, key = segment_ids or (
            jnp.zeros((1, queries[1]), jnp.int32),
            jnp.zeros((1, keys[1]), jnp.int32),
        )
        aside = jnp.minimum(jnp.min(query), jnp.min(key)) - 1
        return Masks(None, query, jnp.where(mask[:, 0, 0], key, aside))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries[1], keys[1]))
    return Masks(mask, *(segment_ids or (None, None)))


def _partitions(masks: Masks, partition: P) -> Masks:
    batch, _, heads, _ = partition

    def of(x: Array, *axes: Any) -> P:
        return P(*(axis if size > 1 else None for axis, size in zip(axes, x.shape, strict=True)))

    return Masks(
        None if masks.mask is None else of(masks.mask, batch, heads, None, None),
        *(None if x is None else of(x, batch, None) for x in masks[1:]),
    )


def _check(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    segment_ids: tuple[Array, Array] | None,
    partition: P | None,
) -> None:
    if (
        q.ndim != 4
        or k.shape != v.shape
        or q.shape[::2] + q.shape[3:] != k.shape[::2] + k.shape[3:]
    ):
        raise ValueError(
            f"expected [batch, queries, heads, dim] and twice [batch, keys, heads, dim], got "
            f"{q.shape}, {k.shape} and {v.shape}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if 0 in (*q.shape, k.shape[1]):
        raise ValueError(f"attention over nothing: q is {q.shape}, k is {k.shape}.")
    whole = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask is not None:
        fits = mask.ndim == 4 and all(
            size in (1, full) for size, full in zip(mask.shape, whole, strict=True)
        )
        if not fits or mask.shape[3] != k.shape[1] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask must be bool [batch or 1, heads or 1, queries or 1, keys] of {whole}, got "
                f"{mask.dtype} {mask.shape}."
            )
    if segment_ids is not None:
        query, key = segment_ids
        rows = (1, q.shape[0])
        if (
            query.ndim != 2
            or key.ndim != 2
            or query.shape[0] not in rows
            or key.shape[0] not in rows
            or query.shape[1] != q.shape[1]
            or key.shape[1] != k.shape[1]
        ):
            raise ValueError(
                f"segment_ids must be [batch or 1, queries] and [batch or 1, keys], got "
                f"{query.shape} and {key.shape}."
            )
    if partition is not None and (
        len(partition) != 4 or partition[1] is not None or partition[3] is not None
    ):
        raise ValueError(f"partition must be P(batch, None, heads, None), got {partition}.")
