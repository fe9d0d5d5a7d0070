"""Attention on Hopper GPUs (Pallas, Mosaic GPU): asynchronous products, warp-specialised.

A block of threads is one head and a tile of queries (of keys, for their gradients): one warpgroup
fetches with the tensor memory accelerator, two compute, each on its half of the tile. In the
forward pass the two take turns, one in the softmax while the other feeds the matrix unit
(Shah et al. 2024, arXiv:2407.08608, section 3.1). Exponentials are to base 2. No atomic additions:
the same inputs give the same bits.

The swizzled tiles of shared memory are at least 16 values wide and 8 rows high, so a head dim of 72
is padded to 80 (zeros add nothing to a product) and the sequence to a multiple of 8. Both pads are
part of the copy that cuts queries, keys and values out of a fused projection.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels import mosaic_gpu, tuning
from repalign.kernels.attention import pallas_gpu_kernels as kernels
from repalign.kernels.attention.pallas_gpu_kernels import COMPUTE, Plan, round_up
from repalign.kernels.attention.reference import Masks
from repalign.kernels.choice import is_hopper, present_device

HEURISTIC = {
    "query_block": 64,
    "key_block": 128,
    "backward_query_block": 64,
    "backward_key_block": 64,
    "stages": 2,
}
"""Rows of one warpgroup, columns of one step, and how many steps are in flight."""


def _pad(x: Array, axis: int, length: int) -> Array:
    return jnp.pad(x, [(0, length - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _call(kernel: Callable, plan: Plan, operands: Any, *, tiles: int, **options: Any) -> Any:
    """Runs ``kernel`` on a grid of (batch, head, tile); its scratch comes by name."""
    leaves, structure = jax.tree.flatten(operands)

    def body(*refs, **scratch):
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        kernel(*inputs, *refs[len(leaves) :], **scratch, plan=plan)

    return mosaic_gpu.kernel(
        body,
        grid=(plan.batch, plan.heads, tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name=f"attention_{kernel.__name__}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )(*leaves)


def _plan(q: Array, k: Array, scale: float, causal: bool, blocks: tuple[int, ...]) -> Plan:
    batch, queries, heads, dim = q.shape
    return Plan(
        batch, heads, queries, k.shape[1], round_up(dim, 16), q.dtype, *blocks, scale, causal
    )  # fmt: skip


def _tokens(x: Array, plan: Plan) -> Array:
    """Pads [batch, tokens, heads, dim] to whole tiles of shared memory."""
    return _pad(_pad(x, 1, round_up(x.shape[1], 8)), 3, plan.dim)


def _padded(masks: Masks, plan: Plan) -> Masks:
    """The masks as the kernels read them: in bytes, padded so that no block ends outside."""
    queries = round_up(plan.queries, plan.query_tile)
    keys = round_up(plan.keys, plan.key_tile)
    mask, query_segments, key_segments = masks
    if mask is not None:
        mask = _pad(_pad(mask.astype(jnp.int8), 2, queries), 3, keys)
    if query_segments is not None:
        query_segments = _pad(query_segments, 1, queries)
        key_segments = _pad(key_segments, 1, keys)
    return Masks(mask, query_segments, key_segments)


def _forward(q, k, v, masks, scale, causal, blocks) -> tuple[Array, Array]:
    """Returns the output and the base-2 log-sum-exp, [batch, heads, queries padded to 8]."""
    plan = _plan(q, k, scale, causal, (*blocks[:2], blocks[4]))
    padded = _padded(masks, plan)
    out, log_sum = _call(
        kernels.forward,
        plan,
        (*(_tokens(x, plan) for x in (q, k, v)), padded),
        tiles=pl.cdiv(plan.queries, plan.query_tile),
        out_type=[
            jax.ShapeDtypeStruct(
                (plan.batch, plan.rows_of_queries, plan.heads, plan.dim), plan.dtype
            ),
            jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.rows_of_queries), jnp.float32),
        ],
        scratch_types={
            "q_tiles": plan.tiles(COMPUTE, plan.query_block, plan.dim),
            "log_sums": plgpu.SMEM((COMPUTE, plan.query_block), jnp.float32),
            "fetched": plgpu.Barrier(num_barriers=COMPUTE),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        },
        cost_estimate=plan.cost(2, arrays=4, masks=padded),
    )
    return out[:, : plan.queries, :, : q.shape[3]], log_sum


def _backward(scale, causal, blocks, residuals, cotangent):
    q, k, v, masks, out, log_sum = residuals
    plan = _plan(q, k, scale, causal, blocks[2:])
    mean = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    mean = _pad(jnp.swapaxes(mean, 1, 2), 2, plan.rows_of_queries)
    operands = (*(_tokens(x, plan) for x in (q, k, v, cotangent)), log_sum, mean)
    padded = _padded(masks, plan)
    query_tiles = plan.tiles(COMPUTE, plan.query_block, plan.dim)
    key_tiles = plan.tiles(COMPUTE, plan.key_block, plan.dim)
    statistics = plgpu.SMEM((COMPUTE, plan.query_block), jnp.float32)
    dq = _call(
        kernels.query_gradients,
        plan,
        (*operands, padded),
        tiles=pl.cdiv(plan.queries, plan.query_tile),
        out_type=jax.ShapeDtypeStruct(operands[0].shape, plan.dtype),
        scratch_types={
            "q_tiles": query_tiles,
            "cotangent_tiles": query_tiles,
            "log_sums": statistics,
            "means": statistics,
            "fetched": plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE),
        },
        cost_estimate=plan.cost(3, arrays=5, masks=padded),
    )
    if padded.mask is not None:
        padded = padded._replace(mask=jnp.swapaxes(padded.mask, 2, 3))
    like_keys = jax.ShapeDtypeStruct(operands[1].shape, plan.dtype)
    dk, dv = _call(
        kernels.key_value_gradients,
        plan,
        (*operands, padded),
        tiles=pl.cdiv(plan.keys, plan.key_tile),
        out_type=[like_keys, like_keys],
        scratch_types={
            "k_tiles": key_tiles,
            "v_tiles": key_tiles,
            "fetched": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        },
        cost_estimate=plan.cost(4, arrays=6, masks=padded),
    )
    dim = q.shape[3]
    return dq[:, : plan.queries, :, :dim], *(x[:, : plan.keys, :, :dim] for x in (dk, dv)), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, masks, scale, causal, blocks):
    return _forward(q, k, v, masks, scale, causal, blocks)[0]


def _attention_forward(q, k, v, masks, scale, causal, blocks):
    out, log_sum = _forward(q, k, v, masks, scale, causal, blocks)
    return out, (q, k, v, masks, out, log_sum)


_attention.defvjp(_attention_forward, _backward)


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
    backward_query_block: int | None = None,
    backward_key_block: int | None = None,
    stages: int | None = None,
) -> Array:
    """``reference.attention`` for bfloat16 and float16 on Hopper.

    Blocks are multiples of 64, ``key_block`` at most 256; one that is not given is looked up
    (``kernels.tuning``).

    Raises:
        ValueError: another dtype or chip, or a block that the matrix unit does not take.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"pallas_gpu takes bfloat16 or float16, not {q.dtype}: cast first.")
    device = present_device()
    if device.platform == "gpu" and not is_hopper(device):
        raise ValueError(f"pallas_gpu is written for Hopper, not {device.device_kind}.")
    given = {
        "query_block": query_block,
        "key_block": key_block,
        "backward_query_block": backward_query_block,
        "backward_key_block": backward_key_block,
        "stages": stages,
    }
    shape = {"queries": q.shape[1], "keys": k.shape[1], "heads": q.shape[2], "dim": q.shape[3]}
    found = tuning.lookup("attention/gpu", shape, q.dtype, heuristic=HEURISTIC)
    blocks = {name: found[name] if size is None else size for name, size in given.items()}
    wrong = [
        name for name, size in blocks.items() if name != "stages" and (size % 64 or size > 256)
    ]
    if wrong:
        raise ValueError(f"{wrong} must be 64, 128, 192 or 256, got {blocks}.")
    return _attention(q, k, v, masks, scale, causal, tuple(blocks.values()))
