"""Attention as the formula reads, in float32; every other implementation is compared with this."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Masks(NamedTuple):
    """Which keys a query sees, apart from causality; None where nothing is masked.

    Attributes:
        mask: [batch or 1, heads or 1, queries, keys] bool, True where a query sees a key.
        query_segments: [batch or 1, queries] int32; a query sees the keys of its own segment.
        key_segments: [batch or 1, keys] int32; given if and only if ``query_segments`` is.
    """

    mask: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None


def visible(masks: Masks, query_index: Array, key_index: Array, *, causal: bool) -> Array | None:
    """Returns [batch or 1, heads or 1, queries, keys], which pairs count; None if all do."""
    kept = masks.mask
    if masks.query_segments is not None:
        same = masks.query_segments[:, None, :, None] == masks.key_segments[:, None, None, :]
        kept = same if kept is None else kept & same
    if causal:
        past = (key_index[None, :] <= query_index[:, None])[None, None]
        kept = past if kept is None else kept & past
    return kept


def attention(q: Array, k: Array, v: Array, masks: Masks, *, scale: float, causal: bool) -> Array:
    """``softmax(scale q k^T) v`` over the visible keys; zeros for a query that sees none."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = scale * jnp.einsum(
        "bqhd,bkhd->bhqk", q.astype(wide), k.astype(wide), precision=lax.Precision.HIGHEST
    )
    kept = visible(masks, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), causal=causal)
    if kept is not None:
        logits = jnp.where(kept, logits, -math.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0.0, total, 1.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v.astype(wide), precision=lax.Precision.HIGHEST)
    return out.astype(q.dtype)


def layer_norm(x: Array, scale: Array, bias: Array | None, *, epsilon: float) -> Array:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias`` over the last axis, in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normal = centered * lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + epsilon)
    normal = normal * scale
    return (normal if bias is None else normal + bias).astype(x.dtype)


def rms_norm(x: Array, scale: Array, *, epsilon: float) -> Array:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis, in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normal = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normal * scale).astype(x.dtype)
