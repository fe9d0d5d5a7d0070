"""The bodies of the TPU kernels: the forward pass, and two for the backward pass.

Logits are held as [keys, queries], a statistic per query as a row of lanes; exponentials are to
base 2. A body sees a block of queries and one of keys, with all the heads of its group.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from repalign.kernels.attention.reference import Masks

_LOG2_E = math.log2(math.e)
_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))  # a b
_SIDE_BY_SIDE = (((1,), (1,)), ((), ()))  # a b^T
_STACKED = (((0,), (0,)), ((), ()))  # a^T b


class Plan(NamedTuple):
    """The static sizes of one kernel call."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    group: int
    query_block: int
    key_block: int
    scale: float
    causal: bool

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.query_block)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.keys, self.key_block)

    @property
    def width(self) -> int:
        return self.group * self.dim

    @property
    def ragged_queries(self) -> bool:
        return self.queries % self.query_block != 0

    @property
    def ragged_keys(self) -> bool:
        return self.keys % self.key_block != 0

    def lanes(self, head: int) -> slice:
        return slice(head * self.dim, (head + 1) * self.dim)

    def cost(self, products: int, *, arrays: int, dtype: Any, masks: Masks) -> pl.CostEstimate:
        """The cost of ``products`` matrix products over all (or the past) pairs."""
        pairs = self.batch * self.heads * self.queries * self.keys // (2 if self.causal else 1)
        tokens = self.batch * self.heads * max(self.queries, self.keys)
        masked = sum(x.size * x.dtype.itemsize for x in masks if x is not None)
        return pl.CostEstimate(
            flops=2 * products * pairs * self.dim,
            transcendentals=pairs,
            bytes_accessed=arrays * tokens * self.dim * jnp.dtype(dtype).itemsize + masked,
        )


def _needed(plan: Plan, query_block: Array, key_block: Array) -> Array | bool:
    """Whether causality leaves anything of a block."""
    if not plan.causal:
        return True
    return key_block * plan.key_block < (query_block + 1) * plan.query_block


def _inside(start: Array, shape: tuple[int, int], axis: int, length: int) -> Array:
    return start + lax.broadcasted_iota(jnp.int32, shape, axis) < length


def _zero_beyond(x: Array, start: Array, length: int) -> Array:
    """Zeroes the rows past the end of the sequence, whose memory holds anything."""
    if length % x.shape[0] == 0:
        return x
    inside = _inside(start, x.shape, 0, length)
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _visible(plan: Plan, refs: Masks, query_start: Array, key_start: Array, queries: bool) -> Any:
    """Returns which of [keys, queries] count, by head: a function of the head, or None."""
    shape = (plan.key_block, plan.query_block)
    shared = []
    if plan.ragged_keys:
        shared.append(_inside(key_start, shape, 0, plan.keys))
    if queries and plan.ragged_queries:
        shared.append(_inside(query_start, shape, 1, plan.queries))
    if plan.causal:
        key = key_start + lax.broadcasted_iota(jnp.int32, shape, 0)
        query = query_start + lax.broadcasted_iota(jnp.int32, shape, 1)
        shared.append(key <= query)
    if refs.query_segments is not None:
        # Key segments come as a row of lanes, as queries do; here they run along sublanes.
        keys = jnp.broadcast_to(refs.key_segments[0], (8, plan.key_block)).T[:, :1]
        shared.append(keys == refs.query_segments[0])
    kept = functools.reduce(jnp.logical_and, shared) if shared else None
    if refs.mask is None:
        return None if kept is None else lambda head: kept

    def of_head(head: int) -> Array:
        index = head if refs.mask.shape[1] > 1 else 0
        seen = refs.mask[0, index].astype(jnp.int32) != 0
        return seen if kept is None else kept & seen

    return of_head


def _product(a: Array, b: Array, contraction: Any) -> Array:
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, contraction, precision=precision, preferred_element_type=jnp.float32
    )


def forward(
    q_ref, k_ref, v_ref, masks, out_ref, log_sum_ref, top_ref, total_ref, sums_ref, *, plan
):
    query_block, key_block = pl.program_id(2), pl.program_id(3)
    query_start, key_start = query_block * plan.query_block, key_block * plan.key_block

    @pl.when(key_block == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -math.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(_needed(plan, query_block, key_block))
    def _():
        visible = _visible(plan, masks, query_start, key_start, queries=False)
        values = _zero_beyond(v_ref[0], key_start, plan.keys)
        for head in range(plan.group):
            lanes = plan.lanes(head)
            logits = _product(k_ref[0, :, lanes], q_ref[0, :, lanes], _SIDE_BY_SIDE)
            logits = logits * (plan.scale * _LOG2_E)
            if visible is not None:
                logits = jnp.where(visible(head), logits, -math.inf)
            row = slice(head, head + 1)
            top = top_ref[row]
            new_top = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
            # A query that has seen no key yet has no finite maximum to subtract.
            shift = jnp.where(new_top == -math.inf, 0.0, new_top)
            weights = jnp.exp2(logits - shift)
            rescale = jnp.exp2(top - shift)
            top_ref[row] = new_top
            total_ref[row] = total_ref[row] * rescale + jnp.sum(weights, axis=0, keepdims=True)
            product = _product(values[:, lanes], weights.astype(values.dtype), _STACKED)
            sums_ref[lanes] = sums_ref[lanes] * rescale + product

    @pl.when(key_block == plan.key_blocks - 1)
    def _():
        total = total_ref[...]
        seen = total > 0.0
        total = jnp.where(seen, total, 1.0)
        log_sum_ref[0, 0] = jnp.where(seen, top_ref[...] + jnp.log2(total), math.inf)
        for head in range(plan.group):
            sums_ref[plan.lanes(head)] = sums_ref[plan.lanes(head)] / total[head : head + 1]
        out_ref[0] = sums_ref[...].T.astype(out_ref.dtype)


def _weights_and_slopes(refs, head: int, visible, plan: Plan) -> tuple[Array, Array]:
    """Returns the weights and the derivatives by the scaled logits of one head, [keys, queries]."""
    q, k, v, cotangent, log_sum_ref, mean_ref = refs
    lanes = plan.lanes(head)
    logits = _product(k[:, lanes], q[:, lanes], _SIDE_BY_SIDE)
    logits = logits * (plan.scale * _LOG2_E)
    weights = jnp.exp2(logits - log_sum_ref[0, 0, head : head + 1])
    products = _product(v[:, lanes], cotangent[:, lanes], _SIDE_BY_SIDE)
    slopes = products - mean_ref[0, 0, head : head + 1]
    if visible is None:
        return weights, weights * slopes
    kept = visible(head)
    weights = jnp.where(kept, weights, 0.0)
    return weights, jnp.where(kept, weights * slopes, 0.0)


def key_value_gradients(
    q_ref, k_ref, v_ref, cotangent_ref, log_sum_ref, mean_ref, masks, dk_ref, dv_ref, dq_ref,
    dk_sum, dv_sum, *, plan,
):  # fmt: skip
    key_block, query_block = pl.program_id(2), pl.program_id(3)
    query_start, key_start = query_block * plan.query_block, key_block * plan.key_block

    @pl.when(query_block == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(_needed(plan, query_block, key_block))
    def _():
        visible = _visible(plan, masks, query_start, key_start, queries=True)
        q = _zero_beyond(q_ref[0], query_start, plan.queries)
        cotangent = _zero_beyond(cotangent_ref[0], query_start, plan.queries)
        k, v = k_ref[0], v_ref[0]
        dq = []
        for head in range(plan.group):
            lanes = plan.lanes(head)
            refs = (q, k, v, cotangent, log_sum_ref, mean_ref)
            weights, slopes = _weights_and_slopes(refs, head, visible, plan)
            slopes = slopes.astype(q.dtype)
            dv_sum[head] += _product(
                weights.astype(cotangent.dtype), cotangent[:, lanes], _ROWS_BY_COLUMNS
            )
            dk_sum[head] += _product(slopes, q[:, lanes], _ROWS_BY_COLUMNS)
            if dq_ref is not None:
                dq.append(_product(k[:, lanes], slopes, _STACKED))
        if dq_ref is not None:
            dq_ref[0] = (plan.scale * jnp.concatenate(dq, axis=0)).T.astype(dq_ref.dtype)

    @pl.when(query_block == plan.query_blocks - 1)
    def _():
        for head in range(plan.group):
            dk_ref[0, :, plan.lanes(head)] = (plan.scale * dk_sum[head]).astype(dk_ref.dtype)
            dv_ref[0, :, plan.lanes(head)] = dv_sum[head].astype(dv_ref.dtype)


def query_gradients(
    q_ref, k_ref, v_ref, cotangent_ref, log_sum_ref, mean_ref, masks, dq_ref, dq_sum, *, plan
):
    query_block, key_block = pl.program_id(2), pl.program_id(3)
    query_start, key_start = query_block * plan.query_block, key_block * plan.key_block

    @pl.when(key_block == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(_needed(plan, query_block, key_block))
    def _():
        visible = _visible(plan, masks, query_start, key_start, queries=False)
        k = _zero_beyond(k_ref[0], key_start, plan.keys)
        refs = (q_ref[0], k, v_ref[0], cotangent_ref[0], log_sum_ref, mean_ref)
        for head in range(plan.group):
            lanes = plan.lanes(head)
            _, slopes = _weights_and_slopes(refs, head, visible, plan)
            dq_sum[lanes] += _product(k[:, lanes], slopes.astype(k.dtype), _STACKED)

    @pl.when(key_block == plan.key_blocks - 1)
    def _():
        dq_ref[0] = (plan.scale * dq_sum[...]).T.astype(dq_ref.dtype)
