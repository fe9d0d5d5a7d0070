"""Sums of the vectors of every code on a GPU (Mosaic GPU, Hopper), see ``statistics``."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels import mosaic_gpu
from repalign.kernels.codebook.operands import pieces
from repalign.kernels.codebook.statistics import SortedVectors, block_ranges

# Rows, depth and columns of one product: a warpgroup's codes, and 128 bytes of each vector.
CODES = 64
VECTORS = 64
COLUMNS = 64
_PIECES = 3
_STAGES = 2


def _body(
    first_gmem,
    count_gmem,
    segments_gmem,
    pieces_gmem,
    sums_gmem,
    segments_smem,
    pieces_smem,
    chosen_smem,
    sums_smem,
    loaded,
):
    block, column = lax.axis_index("codes"), lax.axis_index("columns")
    first, count = first_gmem[block], count_gmem[block]
    columns = pl.ds(column * COLUMNS, COLUMNS)

    def copy(i):
        slot = lax.rem(i, _STAGES)
        vectors = pl.ds((first + i) * VECTORS, VECTORS)
        plgpu.copy_gmem_to_smem(segments_gmem.at[vectors], segments_smem.at[slot], loaded.at[slot])
        for piece in range(_PIECES):
            plgpu.copy_gmem_to_smem(
                pieces_gmem.at[piece, vectors, columns],
                pieces_smem.at[slot, piece],
                loaded.at[slot],
            )

    pl.when(count > 0)(lambda: copy(0))
    code = plgpu.broadcasted_iota(jnp.int32, (CODES, VECTORS), 0, layout=plgpu.Layout.WGMMA)

    def total(acc_ref):
        def add(i, _):
            slot = lax.rem(i, _STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            # The other slot's products are done: they were waited for.
            pl.when(i + 1 < count)(lambda: copy(i + 1))
            segments = plgpu.layout_cast(segments_smem[slot], plgpu.Layout.WGMMA.reduce(0))
            segments = lax.broadcast_in_dim(segments - block * CODES, code.shape, [1])
            chosen_smem[...] = jnp.where(code == segments, 1.0, 0.0).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for piece in range(_PIECES):
                plgpu.wgmma(acc_ref, chosen_smem, pieces_smem.at[slot, piece])
            plgpu.wgmma_wait(0)

        lax.fori_loop(0, count, add, None)
        return acc_ref[...]

    sums_smem[...] = pl.run_scoped(total, plgpu.ACC((CODES, COLUMNS), jnp.float32))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums_smem, sums_gmem.at[pl.ds(block * CODES, CODES), columns])
    plgpu.wait_smem_to_gmem(0)


def sums(data: SortedVectors, num_codes: int) -> jax.Array:
    """Returns the sum of the vectors of every code, [num_codes, dim] float32.

    A product with ones and zeros of three bfloat16 pieces, hence of float32 exactly.

    Args:
        data: finite float32 vectors, at least one.
        num_codes: codes in the codebook.
    """
    count, dim = data.vectors.shape
    code_blocks, columns = pl.cdiv(num_codes, CODES), pl.cdiv(dim, COLUMNS)
    vectors = jnp.pad(data.vectors, ((0, -count % VECTORS), (0, -dim % COLUMNS)))
    beyond = code_blocks * CODES
    # What is left out sorts after the last block.
    segments = jnp.where(data.segments < num_codes, data.segments, beyond)
    segments = jnp.pad(segments, (0, -count % VECTORS), constant_values=beyond)
    ranges = block_ranges(segments, codes=beyond, code_block=CODES, vector_block=VECTORS)
    steps = code_blocks + vectors.shape[0] // VECTORS
    tiling, swizzle = plgpu.TilingTransform, plgpu.SwizzleTransform(128)
    result = mosaic_gpu.kernel(
        _body,
        cost_estimate=pl.CostEstimate(
            flops=2 * _PIECES * steps * CODES * VECTORS * vectors.shape[1],
            transcendentals=0,
            bytes_accessed=vectors.shape[1] * (2 * _PIECES * steps * VECTORS + 4 * beyond),
        ),
        out_type=jax.ShapeDtypeStruct((beyond, vectors.shape[1]), jnp.float32),
        scratch_types=[
            plgpu.SMEM((_STAGES, VECTORS), jnp.int32),
            plgpu.SMEM(
                (_STAGES, _PIECES, VECTORS, COLUMNS),
                jnp.bfloat16,
                transforms=(tiling((8, 64)), swizzle),
            ),
            plgpu.SMEM((CODES, VECTORS), jnp.bfloat16, transforms=(tiling((8, 64)), swizzle)),
            plgpu.SMEM((CODES, COLUMNS), jnp.float32, transforms=(tiling((8, 32)), swizzle)),
            plgpu.Barrier(num_arrivals=1 + _PIECES, num_barriers=_STAGES),
        ],
        grid=(code_blocks, columns),
        grid_names=("codes", "columns"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(ranges.first, ranges.count, segments, jnp.stack(pieces(vectors)))
    return result[:num_codes, :dim]
