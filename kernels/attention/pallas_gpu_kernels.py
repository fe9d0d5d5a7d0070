"""The bodies of the Hopper kernels: the forward pass, and two for the backward pass.

One warpgroup fetches with the tensor memory accelerator, ``COMPUTE`` others compute, each on its
part of a tile; exponentials are to base 2.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels.attention.reference import Masks

COMPUTE = 2  # warpgroups that compute; one more fetches
_FETCH_REGISTERS = 40
_LOG2_E = math.log2(math.e)
_MATRIX = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Plan(NamedTuple):
    """The static sizes of one kernel call; ``queries`` and ``keys`` are those before padding."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    dtype: Any
    query_block: int
    key_block: int
    stages: int
    scale: float
    causal: bool

    @property
    def query_tile(self) -> int:
        return COMPUTE * self.query_block

    @property
    def key_tile(self) -> int:
        return COMPUTE * self.key_block

    @property
    def rows_of_queries(self) -> int:
        return round_up(self.queries, 8)

    def tiles(self, *shape: int) -> Any:
        """Shared memory that the matrix unit reads: swizzled tiles of 8 rows."""
        return plgpu.SMEM(shape, self.dtype, transforms=self.transforms())

    def transforms(self) -> tuple[Any, ...]:
        row = self.dim * jnp.dtype(self.dtype).itemsize
        swizzle = next(size for size in (128, 64, 32) if row % size == 0)
        width = swizzle // jnp.dtype(self.dtype).itemsize
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)

    def cost(self, products: int, *, arrays: int, masks: Masks) -> pl.CostEstimate:
        """The cost of ``products`` matrix products over all (or the past) pairs."""
        pairs = self.batch * self.heads * self.queries * self.keys // (2 if self.causal else 1)
        tokens = self.batch * self.heads * max(self.queries, self.keys)
        masked = sum(x.size * x.dtype.itemsize for x in masks if x is not None)
        return pl.CostEstimate(
            flops=2 * products * pairs * self.dim,
            transcendentals=pairs,
            bytes_accessed=arrays * tokens * self.dim * jnp.dtype(self.dtype).itemsize + masked,
        )


def round_up(length: int, multiple: int) -> int:
    """Returns the least multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


def _zeros(shape: tuple[int, ...], layout: Any) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _load(ref: Any, *, layout: Any, optimized: bool = True) -> Array:
    """``plgpu.load`` of all of ``ref``; JAX 0.10.2 wants an index as well."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def from_registers(total_ref: Any, a: Array, b: Any) -> None:
    """``total += a b`` with the left operand in registers, where the softmax left it."""
    plgpu.wgmma(total_ref, a, b)


def _rows(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _columns(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, [1])


def _product(a: Any, b: Any, shape: tuple[int, int]) -> Array:
    """Returns ``a b`` in registers, ``a`` from there or from shared memory."""

    def multiply(total_ref):
        (from_registers if isinstance(a, jax.Array) else plgpu.wgmma)(total_ref, a, b)
        return total_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _visible(
    plan: Plan, masks: Masks, at: tuple[Array, Array], query_start: Array, key_start: Array,
    *, keys_are_rows: bool,
) -> Array | None:  # fmt: skip
    """Returns which entries of a block count; None if all do.

    The mask comes in the orientation of the block, padded to whole blocks as the segments are.
    """
    batch, head = at
    shape = (plan.query_block, plan.key_block)
    starts, segments = (query_start, key_start), (masks.query_segments, masks.key_segments)
    if keys_are_rows:
        shape, starts, segments = shape[::-1], starts[::-1], segments[::-1]
    shared = []

    def index(start: Array, axis: int) -> Array:
        return start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_MATRIX)

    if plan.keys % plan.key_block:
        shared.append(index(key_start, 0 if keys_are_rows else 1) < plan.keys)
    if plan.causal:
        rows, columns = index(starts[0], 0), index(starts[1], 1)
        shared.append(rows <= columns if keys_are_rows else rows >= columns)
    if masks.query_segments is not None:

        def load(ref: Any, start: Array, size: int, layout: Any) -> Array:
            row = batch if ref.shape[0] > 1 else 0
            return _load(ref.at[row, pl.ds(start, size)], layout=layout, optimized=False)

        rows = _rows(load(segments[0], starts[0], shape[0], _BY_ROW), shape)
        columns = _columns(load(segments[1], starts[1], shape[1], _BY_COLUMN), shape)
        shared.append(rows == columns)
    if masks.mask is not None:
        block = masks.mask.at[
            batch if masks.mask.shape[0] > 1 else 0,
            head if masks.mask.shape[1] > 1 else 0,
            pl.ds(starts[0], shape[0]),
            pl.ds(starts[1], shape[1]),
        ]
        shared.append(_load(block, layout=_MATRIX, optimized=False) != 0)
    return functools.reduce(jnp.logical_and, shared) if shared else None


def _needed_keys(plan: Plan, tile: Array) -> Any:
    """How many blocks of keys a tile of queries sees: all, or up to the diagonal."""
    blocks = pl.cdiv(plan.keys, plan.key_block)
    if not plan.causal:
        return blocks
    return jnp.minimum(blocks, pl.cdiv((tile + 1) * plan.query_tile, jnp.int32(plan.key_block)))


def _pipeline(plan: Plan, body: Callable, compute: Callable, steps: Any, specs: list[Any]):
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        max_concurrent_steps=plan.stages,
        num_compute_wgs=COMPUTE,
        memory_registers=_FETCH_REGISTERS,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=specs,
    )


def forward(
    q_ref, k_ref, v_ref, masks, out_ref, log_sum_ref, q_tiles, log_sums, fetched, turn, *, plan
):
    batch, head, tile = map(lax.axis_index, ("batch", "head", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    query_start = tile * plan.query_tile + warpgroup * plan.query_block
    rows = pl.ds(query_start, plan.query_block)
    block = (plan.query_block, plan.key_block)

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def compute(run_pipeline):
        q, log_sum = q_tiles.at[warpgroup], log_sums.at[warpgroup]
        barrier = fetched.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q, barrier)
        plgpu.barrier_wait(barrier)
        pl.when(warpgroup == 1)(take_turns)
        top = plgpu.layout_cast(jnp.full(block[:1], -math.inf, jnp.float32), _BY_ROW)
        total = _zeros(block[:1], _BY_ROW)
        sums = _zeros((plan.query_block, plan.dim), _MATRIX)
        top, total, sums = run_pipeline((top, total, sums))
        pl.when(warpgroup == 0)(take_turns)
        seen = total > 0.0
        total = jnp.where(seen, total, 1.0)
        log_sum[...] = jnp.where(seen, top + jnp.log(total) * _LOG2_E, math.inf)
        q[...] = (sums / _rows(total, sums.shape)).astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(log_sum, log_sum_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    def step(indices, k, v, k_read, v_read, carry):
        top, total, sums = carry

        def multiply(logits_ref):
            plgpu.wgmma(logits_ref, q_tiles.at[warpgroup], k.transpose((1, 0)))
            take_turns()
            return logits_ref[...]

        logits = pl.run_scoped(multiply, plgpu.ACC(block, jnp.float32))
        plgpu.barrier_arrive(k_read)
        logits = logits * (plan.scale * _LOG2_E)
        kept = _visible(
            plan, masks, (batch, head), query_start, indices[0] * plan.key_block,
            keys_are_rows=False,
        )  # fmt: skip
        if kept is not None:
            logits = jnp.where(kept, logits, -math.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # A query that has seen no key yet has no finite maximum to subtract.
        shift = new_top if kept is None else jnp.where(new_top == -math.inf, 0.0, new_top)
        rescale = jnp.exp2(top - shift)
        weights = jnp.exp2(logits - _rows(shift, block))
        total = total * rescale + jnp.sum(weights, axis=1)
        weights = weights.astype(plan.dtype)
        take_turns()
        product = _product(weights, v, sums.shape)
        plgpu.barrier_arrive(v_read)
        sums = sums * _rows(rescale, sums.shape) + product
        return new_top, total, sums

    keys = plgpu.BlockSpec(
        (plan.key_block, plan.dim), lambda i: (i, 0), transforms=plan.transforms()
    )
    _pipeline(plan, step, compute, _needed_keys(plan, tile), [keys, keys])(
        k_ref.at[batch, :, head], v_ref.at[batch, :, head]
    )


def query_gradients(
    q_ref, k_ref, v_ref, cotangent_ref, log_sum_ref, mean_ref, masks, dq_ref,
    q_tiles, cotangent_tiles, log_sums, means, fetched, *, plan,
):  # fmt: skip
    batch, head, tile = map(lax.axis_index, ("batch", "head", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    query_start = tile * plan.query_tile + warpgroup * plan.query_block
    rows = pl.ds(query_start, plan.query_block)
    block = (plan.query_block, plan.key_block)

    def compute(run_pipeline):
        barrier = fetched.at[warpgroup]
        fetch = (
            (q_ref.at[batch, rows, head], q_tiles),
            (cotangent_ref.at[batch, rows, head], cotangent_tiles),
            (log_sum_ref.at[batch, head, rows], log_sums),
            (mean_ref.at[batch, head, rows], means),
        )
        for source, target in fetch:
            plgpu.copy_gmem_to_smem(source, target.at[warpgroup], barrier)
        plgpu.barrier_wait(barrier)
        log_sum = _load(log_sums.at[warpgroup], layout=_BY_ROW)
        mean = _load(means.at[warpgroup], layout=_BY_ROW)
        dq = pl.run_scoped(
            lambda dq_ref: (run_pipeline((dq_ref, log_sum, mean)), dq_ref[...])[1],
            plgpu.ACC((plan.query_block, plan.dim), jnp.float32),
        )
        q_tiles.at[warpgroup][...] = (dq * plan.scale).astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tiles.at[warpgroup], dq_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(indices, k, v, k_read, v_read, carry):
        dq_ref, log_sum, mean = carry
        logits = _product(q_tiles.at[warpgroup], k.transpose((1, 0)), block)
        weights = jnp.exp2(logits * (plan.scale * _LOG2_E) - _rows(log_sum, block))
        kept = _visible(
            plan, masks, (batch, head), query_start, indices[0] * plan.key_block,
            keys_are_rows=False,
        )  # fmt: skip
        if kept is not None:
            weights = jnp.where(kept, weights, 0.0)
        products = _product(cotangent_tiles.at[warpgroup], v.transpose((1, 0)), block)
        plgpu.barrier_arrive(v_read)
        slopes = weights * (products - _rows(mean, block))
        from_registers(dq_ref, slopes.astype(plan.dtype), k)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_read)
        return dq_ref, log_sum, mean

    keys = plgpu.BlockSpec(
        (plan.key_block, plan.dim), lambda i: (i, 0), transforms=plan.transforms()
    )
    _pipeline(plan, step, compute, _needed_keys(plan, tile), [keys, keys])(
        k_ref.at[batch, :, head], v_ref.at[batch, :, head]
    )


def key_value_gradients(
    q_ref, k_ref, v_ref, cotangent_ref, log_sum_ref, mean_ref, masks, dk_ref, dv_ref,
    k_tiles, v_tiles, fetched, *, plan,
):  # fmt: skip
    batch, head, tile = map(lax.axis_index, ("batch", "head", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    key_start = tile * plan.key_tile + warpgroup * plan.key_block
    rows = pl.ds(key_start, plan.key_block)
    block = (plan.key_block, plan.query_block)
    blocks = pl.cdiv(plan.queries, plan.query_block)
    # Queries before the first key see none of the tile; one block at least keeps the pipeline full.
    first = jnp.minimum(tile * plan.key_tile // plan.query_block, blocks - 1) if plan.causal else 0

    def compute(run_pipeline):
        k, v, barrier = k_tiles.at[warpgroup], v_tiles.at[warpgroup], fetched.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, head], k, barrier)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, head], v, barrier)
        plgpu.barrier_wait(barrier)
        sums = plgpu.ACC((plan.key_block, plan.dim), jnp.float32)

        def sum_over_queries(dk_ref, dv_ref):
            run_pipeline((dk_ref, dv_ref))
            return dk_ref[...], dv_ref[...]

        dk, dv = pl.run_scoped(sum_over_queries, sums, sums)
        k[...] = (dk * plan.scale).astype(plan.dtype)
        v[...] = dv.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(
        indices, q, cotangent, log_sums, means, q_read, cotangent_read, log_sums_read, means_read,
        carry,
    ):  # fmt: skip
        dk_ref, dv_ref = carry
        log_sum = _load(log_sums, layout=_BY_COLUMN)
        mean = _load(means, layout=_BY_COLUMN)
        plgpu.barrier_arrive(log_sums_read)
        plgpu.barrier_arrive(means_read)
        logits = _product(k_tiles.at[warpgroup], q.transpose((1, 0)), block)
        weights = jnp.exp2(logits * (plan.scale * _LOG2_E) - _columns(log_sum, block))
        kept = _visible(
            plan, masks, (batch, head), (indices[0] + first) * plan.query_block, key_start,
            keys_are_rows=True,
        )  # fmt: skip
        if kept is not None:
            weights = jnp.where(kept, weights, 0.0)
        from_registers(dv_ref, weights.astype(plan.dtype), cotangent)
        products = _product(v_tiles.at[warpgroup], cotangent.transpose((1, 0)), block)
        plgpu.barrier_arrive(cotangent_read)
        slopes = weights * (products - _columns(mean, block))
        from_registers(dk_ref, slopes.astype(plan.dtype), q)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(q_read)
        return dk_ref, dv_ref

    queries = plgpu.BlockSpec(
        (plan.query_block, plan.dim), lambda i: (i + first, 0), transforms=plan.transforms()
    )
    statistics = plgpu.BlockSpec((plan.query_block,), lambda i: (i + first,))
    specs = [queries, queries, statistics, statistics]
    _pipeline(plan, step, compute, blocks - first, specs)(
        q_ref.at[batch, :, head],
        cotangent_ref.at[batch, :, head],
        log_sum_ref.at[batch, head],
        mean_ref.at[batch, head],
    )
