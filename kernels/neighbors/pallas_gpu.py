"""Exact nearest neighbours in one pass on a Hopper GPU: the scores never leave registers.

A block of 128 queries belongs to two warpgroups, 64 rows each; a third one streams tiles of the
database (and the matching slabs of the queries) into shared memory. A warpgroup multiplies a tile,
and each row hands its largest score to its list of the best so far, in place of the list's worst,
for as long as any of the 64 rows has one that belongs there. Of a long database nearly all tiles
hold none, and cost one addition and one comparison per score. Lists are unordered until the end.
Registers hold lists of 64; for more neighbours the search is repeated for those that come after.

float32 operands are split in three bfloat16 parts, whose six largest products (down to 2^-24 of the
first) are summed in float32, as HIGHEST does on a TPU.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels import mosaic_gpu
from repalign.kernels.neighbors.reference import centered, squared_norms

MAX_K = 256
_LIST = 64
_WARPGROUPS = 2
_ROWS = 64
_SLAB = 64
_ACCUMULATOR = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@functools.partial(jax.jit, static_argnames=("k", "metric", "exclude_self", "tile", "stages"))
def top_k(
    queries: Array,
    database: Array,
    *,
    k: int,
    metric: str,
    exclude_self: bool,
    tile: int = 128,
    stages: int | None = None,
) -> tuple[Array, Array]:
    """Returns (scores, indices), both ``[queries, k]``, nearest first; see ``api.top_k``.

    bfloat16 queries and database are multiplied as they are (exact products, float32 sums) if the
    metric is the inner product. Operands are copied once: padded to whole tiles, float32 as three
    bfloat16 parts (1.5 times its size).

    Args:
        queries: ``[queries, dim]``.
        database: ``[database, dim]``.
        k: at most ``MAX_K``; each 64 take a search of their own.
        metric: as in ``api.top_k``; so is ``exclude_self``.
        tile: points multiplied at a time: 64 or 128.
        stages: slabs in flight; None takes as many as fit, up to 4.

    Raises:
        ValueError: ``k``, the dtype or the tile is not supported.
    """
    if k > MAX_K:
        raise ValueError(f"pallas_gpu finds at most {MAX_K} neighbours, not {k}: use 'xla'.")
    if jnp.float64 in (queries.dtype, database.dtype):
        raise ValueError("pallas_gpu compares in float32, not float64: use 'xla'.")
    if tile not in (64, 128):
        raise ValueError(f"tile {tile} is neither 64 nor 128.")
    if metric == "euclidean" or not queries.dtype == database.dtype == jnp.bfloat16:
        queries, database = queries.astype(jnp.float32), database.astype(jnp.float32)
    queries, database = centered(queries, database, metric=metric)
    (query_count, dim), count = queries.shape, database.shape[0]
    block = _WARPGROUPS * _ROWS
    padded_queries = _padded(queries, block)
    # What is added to every score of a point; points that are none never enter a list.
    bias = jnp.zeros(count) if metric == "inner_product" else -squared_norms(database)
    bias = jnp.pad(bias, (0, -count % tile), constant_values=-jnp.inf)
    query_norms = squared_norms(padded_queries.astype(jnp.float32))
    query_parts, database_parts = _parts(padded_queries), _parts(_padded(database, tile))
    parts = len(query_parts)
    stage_bytes = 2 * parts * (block + tile) * _SLAB
    stages = stages or min(4, (216 * 1024) // stage_bytes)
    blocks, slabs = len(padded_queries) // block, query_parts.shape[2] // _SLAB
    operands = (query_parts, database_parts, bias, query_norms)

    transforms = (plgpu.TilingTransform((8, _SLAB)), plgpu.SwizzleTransform(128))
    scores, indices = [], []
    for start in range(0, k, _LIST):
        length = pl.cdiv(min(k - start, _LIST), 8) * 8
        found = mosaic_gpu.kernel(
            functools.partial(
                _search,
                tiles=len(bias) // tile,
                slabs=slabs,
                count=count,
                exclude_self=exclude_self,
                euclidean=metric == "euclidean",
                again=start > 0,
            ),
            out_type=(
                jax.ShapeDtypeStruct((blocks * block, length), jnp.float32),
                jax.ShapeDtypeStruct((blocks * block, length), jnp.int32),
            ),
            grid=(blocks,),
            grid_names=("block",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=[
                plgpu.SMEM((stages, parts, block, _SLAB), jnp.bfloat16, transforms=transforms),
                plgpu.SMEM((stages, parts, tile, _SLAB), jnp.bfloat16, transforms=transforms),
                plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
                plgpu.Barrier(num_arrivals=2 * parts, num_barriers=stages),
                plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
            ],
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            cost_estimate=pl.CostEstimate(
                flops=2 * query_count * count * dim,
                bytes_accessed=2 * parts * dim * (query_count + blocks * count)
                + 8 * query_count * length,
                transcendentals=0,
            ),
        )(*operands, *((scores[-1][:, -1], indices[-1][:, -1]) if start else ()))
        # Largest first, and of equal scores the lowest index.
        negative, places = lax.sort((-found[0], found[1]), dimension=1, num_keys=2)
        scores.append(-negative)
        indices.append(places)
    return (
        jnp.concatenate(scores, axis=1)[:query_count, :k],
        jnp.concatenate(indices, axis=1)[:query_count, :k],
    )


def _padded(points: Array, rows: int) -> Array:
    """Pads with zeros to a multiple of ``rows`` points and of a slab's dimensions."""
    return jnp.pad(points, ((0, -points.shape[0] % rows), (0, -points.shape[1] % _SLAB)))


def _parts(points: Array) -> Array:
    """Returns ``[parts, points, dim]`` bfloat16, whose sum over parts is ``points``."""
    if points.dtype == jnp.bfloat16:
        return points[None]
    parts, rest = [], points
    for _ in range(3):
        # Rounded in the integers, for XLA may drop a cast there and back.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    return jnp.stack(parts).astype(jnp.bfloat16)


def _search(
    query_gmem,
    database_gmem,
    bias_gmem,
    norm_gmem,
    *refs,
    tiles: int,
    slabs: int,
    count: int,
    exclude_self: bool,
    euclidean: bool,
    again: bool,
):
    """One block of queries against the whole database, or what of it comes after an earlier list.

    With ``again`` two more operands hold the last score and index of each row's earlier list.
    """
    *last_gmem, score_gmem, index_gmem, query_smem, database_smem, flag_smem, full, free = refs
    stages, parts, tile, _ = database_smem.shape
    length = score_gmem.shape[1]
    warpgroup = lax.axis_index("warpgroup")
    first_row = lax.axis_index("block") * (_WARPGROUPS * _ROWS)
    products = [(i, j) for i, j in itertools.product(range(parts), repeat=2) if i + j < parts]

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, tiles * slabs)
        def _(step):
            stage = lax.rem(step, stages)
            dims = pl.ds(lax.rem(step, slabs) * _SLAB, _SLAB)
            rows, points = (
                pl.ds(first_row, _WARPGROUPS * _ROWS),
                pl.ds(lax.div(step, slabs) * tile, tile),
            )

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(free.at[stage])

            for part in range(parts):
                for source, target in (
                    (query_gmem.at[part, rows, dims], query_smem),
                    (database_gmem.at[part, points, dims], database_smem),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[stage, part], full.at[stage])

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own_row = first_row + warpgroup * _ROWS
        own = pl.ds(own_row, _ROWS)
        flags = flag_smem.at[warpgroup]
        if euclidean:
            query_norms = mosaic_gpu.load(norm_gmem.at[own], _BY_ROW, optimized=False)
        if again:
            last = [mosaic_gpu.load(ref.at[own], _BY_ROW, optimized=False) for ref in last_gmem]

        def multiplied(tile_index: Array) -> Array:
            first_step = tile_index * slabs

            def accumulate(accumulator):
                @pl.loop(0, slabs)
                def _(slab):
                    stage = lax.rem(first_step + slab, stages)
                    plgpu.barrier_wait(full.at[stage])
                    for part, other in products:
                        plgpu.wgmma(
                            accumulator,
                            query_smem.at[stage, part, pl.ds(warpgroup * _ROWS, _ROWS)],
                            database_smem.at[stage, other].transpose((1, 0)),
                        )
                    # These go on while the next slab is waited for; those before are done.
                    plgpu.wgmma_wait(len(products))

                    @pl.when(slab > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(first_step + slab - 1, stages)])

                return accumulator[...]

            result = pl.run_scoped(accumulate, plgpu.ACC((_ROWS, tile), jnp.float32))
            plgpu.barrier_arrive(free.at[lax.rem(first_step + slabs - 1, stages)])
            return result

        def in_any_row(margin: Array) -> Array:
            # Through shared memory into the layout where every warp holds all rows.
            flags[...] = margin
            return jnp.max(mosaic_gpu.load(flags, _BY_COLUMN, optimized=False)) > 0.0

        def search_tile(tile_index: Array, lists: tuple[Array, Array]) -> tuple[Array, Array]:
            scores = multiplied(tile_index)
            first_column = tile_index * tile
            bias = mosaic_gpu.load(
                bias_gmem.at[pl.ds(first_column, tile)], _BY_COLUMN, optimized=False
            )
            column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, tile), 1, layout=_ACCUMULATOR)
            if euclidean:
                scores = 2.0 * scores - lax.broadcast_in_dim(query_norms, scores.shape, (0,))
            scores += lax.broadcast_in_dim(bias, scores.shape, (1,))
            if euclidean:
                scores = jnp.minimum(scores, 0.0)
            if exclude_self:
                row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, tile), 0, layout=_ACCUMULATOR)
                same = first_column + column == own_row + row
                scores = jnp.where(same, -jnp.inf, scores)
            if again:
                score, index = (lax.broadcast_in_dim(one, scores.shape, (0,)) for one in last)
                after = (scores < score) | ((scores == score) & (first_column + column > index))
                scores = jnp.where(after, scores, -jnp.inf)

            def wanted(carry):
                _, best, values, _ = carry
                return in_any_row(jnp.where(best > jnp.min(values, axis=1), 1.0, 0.0))

            def take(carry):
                scores, best, values, indices = carry
                wide = lax.broadcast_in_dim(best, scores.shape, (0,))
                # Of equal scores the first: its index is the lowest.
                chosen = jnp.min(jnp.where(scores == wide, column, tile), axis=1)
                wide_chosen = lax.broadcast_in_dim(chosen, scores.shape, (0,))
                scores = jnp.where(column == wide_chosen, -jnp.inf, scores)
                # It takes the worst one's place: of equals the one with the highest index.
                worst = lax.broadcast_in_dim(jnp.min(values, axis=1), values.shape, (0,))
                highest = jnp.max(jnp.where(values == worst, indices, -1), axis=1)
                entering = lax.broadcast_in_dim(best, values.shape, (0,))
                replaced = indices == lax.broadcast_in_dim(highest, values.shape, (0,))
                replaced &= entering > worst
                entering_index = lax.broadcast_in_dim(first_column + chosen, values.shape, (0,))
                values = jnp.where(replaced, entering, values)
                indices = jnp.where(replaced, entering_index, indices)
                return scores, jnp.max(scores, axis=1), values, indices

            carry = (scores, jnp.max(scores, axis=1), *lists)
            return lax.while_loop(wanted, take, carry)[2:]

        # Places that are not taken yet have indices of their own, after all real ones.
        place = plgpu.broadcasted_iota(jnp.int32, (_ROWS, length), 1, layout=_ACCUMULATOR)
        nothing = plgpu.layout_cast(jnp.full((_ROWS, length), -jnp.inf), _ACCUMULATOR)
        values, indices = lax.fori_loop(0, tiles, search_tile, (nothing, count + place))
        score_gmem[own, :] = values
        index_gmem[own, :] = indices
