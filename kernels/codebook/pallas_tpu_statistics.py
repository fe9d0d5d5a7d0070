"""Sums of the vectors of every code on a TPU (Mosaic), see ``statistics``."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels import tuning
from repalign.kernels.codebook.statistics import SortedVectors, block_ranges

LANES = 128


def _kernel(code_ids, vector_ids, active, segments_ref, vectors_ref, sums_ref):
    step = pl.program_id(0)
    block = code_ids[step]

    @pl.when((step == 0) | (block != code_ids[jnp.maximum(step - 1, 0)]))
    def _():
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

    @pl.when(active[step] == 1)
    def _():
        code_block, vector_block = sums_ref.shape[0], vectors_ref.shape[0]
        code = lax.broadcasted_iota(jnp.int32, (code_block, vector_block), 0) + block * code_block
        chosen = (code == segments_ref[...]).astype(jnp.float32)
        sums_ref[...] += jnp.dot(
            chosen,
            vectors_ref[...],
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


def sums(
    data: SortedVectors,
    num_codes: int,
    *,
    code_block: int | None = None,
    vector_block: int | None = None,
) -> jax.Array:
    """Returns the sum of the vectors of every code, [num_codes, dim] float32.

    Args:
        data: finite float32 vectors, at least one.
        num_codes: codes in the codebook.
        code_block: codes of a block, a multiple of 8; None looks it up.
        vector_block: vectors of a block, a multiple of 128; None looks it up.
    """
    count, dim = data.vectors.shape
    if code_block is None or vector_block is None:
        found = tuning.lookup(
            "codebook/statistics",
            {"vectors": count, "codes": num_codes, "dim": dim},
            jnp.float32,
            heuristic={"code_block": 256, "vector_block": 256},
        )
        code_block = code_block or found["code_block"]
        vector_block = vector_block or found["vector_block"]
    if code_block % 8 or vector_block % LANES:
        raise ValueError(
            f"blocks of {code_block} codes and {vector_block} vectors: multiples of 8 and {LANES} "
            "are needed."
        )
    code_blocks, vector_blocks = pl.cdiv(num_codes, code_block), pl.cdiv(count, vector_block)
    padding = vector_blocks * vector_block - count
    vectors = jnp.pad(data.vectors, ((0, padding), (0, 0)))
    beyond = code_blocks * code_block
    # What is left out sorts after the last block.
    segments = jnp.where(data.segments < num_codes, data.segments, beyond)
    segments = jnp.pad(segments, (0, padding), constant_values=beyond)
    ranges = block_ranges(segments, codes=beyond, code_block=code_block, vector_block=vector_block)
    # A block of codes without vectors takes one step, to be written at all.
    steps = code_blocks + vector_blocks
    ends = jnp.cumsum(jnp.maximum(ranges.count, 1))
    step = jnp.arange(steps, dtype=jnp.int32)
    code_ids = jnp.minimum(jnp.searchsorted(ends, step, side="right"), code_blocks - 1)
    code_ids = code_ids.astype(jnp.int32)
    place = step - (ends - jnp.maximum(ranges.count, 1))[code_ids]
    active = (place < ranges.count[code_ids]).astype(jnp.int32)
    vector_ids = jnp.minimum(ranges.first[code_ids] + place, vector_blocks - 1).astype(jnp.int32)
    result = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((1, vector_block), lambda i, codes, vectors, _: (0, vectors[i])),
                pl.BlockSpec((vector_block, dim), lambda i, codes, vectors, _: (vectors[i], 0)),
            ],
            out_specs=pl.BlockSpec((code_block, dim), lambda i, codes, *_: (codes[i], 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((beyond, dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * steps * code_block * vector_block * dim,
            transcendentals=0,
            bytes_accessed=4 * dim * (steps * vector_block + beyond),
        ),
        name="codebook_statistics",
    )(code_ids, vector_ids, active, segments[None], vectors)
    return result[:num_codes]
