"""Attention in XLA: ``dense`` holds the matrix of weights, ``attention`` only a block of it.

The chunked form keeps a running maximum and sum per query (online softmax: Milakov and Gimelshein
2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682) and recomputes the weights in the
backward pass from the saved log-sum-exp. Memory is linear in queries and in keys.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from repalign.kernels import tuning
from repalign.kernels.attention.reference import Masks, visible

HEURISTIC = {"query_block": 128, "key_block": 128}
"""Blocks of logits that stay in a CPU's cache, one head at a time."""


def _precision(dtype: Any) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype in (jnp.float32, jnp.float64) else lax.Precision.DEFAULT


def dense(q: Array, k: Array, v: Array, masks: Masks, *, scale: float, causal: bool) -> Array:
    """``reference.attention`` with products in the inputs' dtype, summed in float32.

    Keeps the [batch, heads, queries, keys] weights for the backward pass.
    """
    wide, precision = jnp.promote_types(q.dtype, jnp.float32), _precision(q.dtype)
    logits = scale * jnp.einsum(
        "bqhd,bkhd->bhqk", q, k, precision=precision, preferred_element_type=wide
    )
    kept = visible(masks, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), causal=causal)
    if kept is not None:
        logits = jnp.where(kept, logits, -math.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if kept is not None:
        top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    # Divided after the product with the values: fewer divisions and a shorter backward pass.
    total = jnp.sum(weights, axis=-1).transpose(0, 2, 1)[..., None]
    if kept is not None:
        total = jnp.where(total > 0.0, total, 1.0)
    out = jnp.einsum(
        "bhqk,bkhd->bqhd",
        weights.astype(v.dtype),
        v,
        precision=precision,
        preferred_element_type=wide,
    )
    return (out / total).astype(q.dtype)


def _blocks(x: Array, axis: int, size: int) -> Array:
    """Pads ``axis`` with zeros to whole blocks and puts the blocks first: [blocks, ..., size]."""
    count = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """The inverse of ``_blocks``."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _even(length: int, largest: int) -> int:
    """The block size that cuts ``length`` into equal blocks of at most ``largest``."""
    return -(-length // -(-length // largest))


def _query_side(masks: Masks, size: int) -> dict[str, Array]:
    """What every block of queries knows of the masks; mask rows become [blocks, ..., size, k]."""
    side = {}
    if masks.mask is not None:
        side["mask"] = _blocks(masks.mask, 2, size)
    if masks.query_segments is not None:
        side["segments"] = _blocks(masks.query_segments, 1, size)
    return side


class _Cut:
    """The blocks of one call, and which entries of the block of (queries, keys) count."""

    def __init__(self, q: Array, k: Array, masks: Masks, causal: bool, blocks: tuple[int, int]):
        self.queries, self.keys = q.shape[2], k.shape[2]
        self.query_size = _even(self.queries, blocks[0])
        self.key_size = _even(self.keys, blocks[1])
        self.masks, self.causal = masks, causal
        self.query_starts = jnp.arange(0, self.queries, self.query_size)
        self.key_starts = jnp.arange(0, self.keys, self.key_size)
        self.query_side = _query_side(masks, self.query_size)

    def of_queries(self, x: Array) -> Array:
        return _blocks(x, 2, self.query_size)

    def of_keys(self, x: Array) -> Array:
        return _blocks(x, 2, self.key_size)

    def needed(self, query_start: Array, key_start: Array) -> Array | bool:
        """Whether causality leaves anything of the block."""
        return key_start < query_start + self.query_size if self.causal else True

    def kept(self, query_start: Array, side: dict[str, Array], key_start: Array) -> Array | None:
        keys = key_start + jnp.arange(self.key_size)
        part = Masks()
        # A slice past the end would be moved back: padded keys are read from inside and masked.
        index = jnp.minimum(keys, self.keys - 1)
        if "mask" in side:
            part = part._replace(mask=jnp.take(side["mask"], index, axis=3))
        if "segments" in side:
            part = part._replace(
                query_segments=side["segments"],
                key_segments=jnp.take(self.masks.key_segments, index, axis=1),
            )
        queries = query_start + jnp.arange(self.query_size)
        kept = visible(part, queries, keys, causal=self.causal)
        if self.keys % self.key_size:
            real = (keys < self.keys)[None, None, None, :]
            kept = real if kept is None else kept & real
        return kept


def _logits(q: Array, k: Array, scale: float, kept: Array | None) -> Array:
    logits = scale * _dot("bhqd,bhkd->bhqk", q, k)
    return logits if kept is None else jnp.where(kept, logits, -math.inf)


def _dot(equation: str, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, precision=_precision(b.dtype), preferred_element_type=wide)


def _forward(
    q: Array, k: Array, v: Array, masks: Masks, scale: float, causal: bool, blocks: tuple[int, int]
) -> tuple[Array, Array]:
    """Returns the output and, per query, its log-sum-exp (+inf where it sees no key)."""
    cut = _Cut(q, k, masks, causal, blocks)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    keys = (cut.of_keys(k), cut.of_keys(v), cut.key_starts)

    def of_queries(block: tuple[Array, dict[str, Array], Array]) -> tuple[Array, Array]:
        q, side, query_start = block
        start = (
            jnp.full(q.shape[:3], -math.inf, wide),
            jnp.zeros(q.shape[:3], wide),
            jnp.zeros(q.shape, wide),
        )

        def add(carry: Any, block: tuple[Array, Array, Array]) -> Any:
            (top, total, sums), (k, v, key_start) = carry, block
            logits = _logits(q, k, scale, cut.kept(query_start, side, key_start))
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            # Nothing seen yet: no finite maximum to subtract.
            shift = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            weights = jnp.exp(logits - shift[..., None])
            rescale = jnp.exp(top - shift)
            total = total * rescale + jnp.sum(weights, axis=-1)
            product = _dot("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
            return new_top, total, sums * rescale[..., None] + product

        def step(carry: Any, block: tuple[Array, Array, Array]) -> tuple[Any, None]:
            if not causal:
                return add(carry, block), None
            needed = cut.needed(query_start, block[2])
            return lax.cond(needed, add, lambda carry, _: carry, carry, block), None

        (top, total, sums), _ = lax.scan(step, start, keys)
        seen = total > 0.0
        out = sums / jnp.where(seen, total, 1.0)[..., None]
        log_sum = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), math.inf)
        return out.astype(q.dtype), log_sum

    out, log_sum = lax.map(of_queries, (cut.of_queries(q), cut.query_side, cut.query_starts))
    return _join(out, 2, cut.queries), _join(log_sum, 2, cut.queries)


def _backward(
    scale: float, causal: bool, blocks: tuple[int, int], residuals: Any, cotangent: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, masks, out, log_sum = residuals
    cut = _Cut(q, k, masks, causal, blocks)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mean = jnp.sum(out.astype(wide) * cotangent.astype(wide), axis=-1)
    rows = (
        *(cut.of_queries(x) for x in (q, cotangent, log_sum, mean)),
        cut.query_side,
        cut.query_starts,
    )

    def of_keys(dq: Array, block: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, v, key_start = block

        def add(carry: Any, row: Any) -> Any:
            (dk, dv), (dq, (q, cotangent, log_sum, mean, side, query_start)) = carry, row
            logits = _logits(q, k, scale, cut.kept(query_start, side, key_start))
            weights = jnp.exp(logits - log_sum[..., None])
            dv += _dot("bhqk,bhqd->bhkd", weights.astype(v.dtype), cotangent)
            slopes = weights * (_dot("bhqd,bhkd->bhqk", cotangent, v) - mean[..., None])
            slopes = (scale * slopes).astype(q.dtype)
            dk += _dot("bhqk,bhqd->bhkd", slopes, q)
            return (dk, dv), dq + _dot("bhqk,bhkd->bhqd", slopes, k)

        def step(carry: Any, row: Any) -> Any:
            if not causal:
                return add(carry, row)
            needed = cut.needed(row[1][-1], key_start)
            return lax.cond(needed, add, lambda carry, row: (carry, row[0]), carry, row)

        zeros = jnp.zeros(k.shape, wide)
        (dk, dv), dq = lax.scan(step, (zeros, zeros), (dq, rows))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(
        of_keys,
        jnp.zeros(rows[0].shape, wide),
        (cut.of_keys(k), cut.of_keys(v), cut.key_starts),
    )
    dq = _join(dq, 2, cut.queries).astype(q.dtype)
    return dq, _join(dk, 2, cut.keys), _join(dv, 2, cut.keys), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(q, k, v, masks, scale, causal, blocks):
    return _forward(q, k, v, masks, scale, causal, blocks)[0]


def _chunked_forward(q, k, v, masks, scale, causal, blocks):
    out, log_sum = _forward(q, k, v, masks, scale, causal, blocks)
    return out, (q, k, v, masks, out, log_sum)


_chunked.defvjp(_chunked_forward, _backward)


def attention(
    q: Array,
    k: Array,
    v: Array,
    masks: Masks,
    *,
    scale: float,
    causal: bool,
    query_block: int | None = None,
    key_block: int | None = None,
) -> Array:
    """``reference.attention`` in blocks of at most ``query_block`` by ``key_block`` entries.

    A block that is not given is looked up (``kernels.tuning``).
    """
    found = tuning.lookup(
        "attention/xla",
        {"queries": q.shape[1], "keys": k.shape[1], "heads": q.shape[2], "dim": q.shape[3]},
        q.dtype,
        heuristic=HEURISTIC,
    )
    query_block = found["query_block"] if query_block is None else query_block
    key_block = found["key_block"] if key_block is None else key_block
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = _chunked(*heads_first, masks, scale, causal, (query_block, key_block))
    return jnp.swapaxes(out, 1, 2)
