"""Exact nearest neighbours in one pass on a TPU: the scores never leave VMEM.

Blocks of the database stream past a block of queries. Each block's scores come from the matrix
unit. Then every row hands its largest score to its list of the best so far, which takes it in
order, for as long as some row of a group has one that belongs in its list. Of a long database
nearly all blocks hold none, and cost one comparison per score.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels import tuning
from repalign.kernels.neighbors.reference import centered, squared_norms

MAX_K = 256
_LANES = 128
# Rows whose lists are filled together: each waits for the one with most to take.
_GROUP = 32


@functools.partial(
    jax.jit, static_argnames=("k", "metric", "exclude_self", "query_block", "database_block")
)
def top_k(
    queries: Array,
    database: Array,
    *,
    k: int,
    metric: str,
    exclude_self: bool,
    query_block: int | None = None,
    database_block: int | None = None,
) -> tuple[Array, Array]:
    """Returns (scores, indices), both ``[queries, k]``, nearest first; see ``api.top_k``.

    bfloat16 queries and database are multiplied as they are (exact products, float32 sums) if the
    metric is the inner product; everything else is float32 at HIGHEST precision.

    Args:
        queries: ``[queries, dim]``.
        database: ``[database, dim]``.
        k: at most ``MAX_K``.
        metric: as in ``api.top_k``; so is ``exclude_self``.
        query_block: queries per block, a multiple of 32; None looks both blocks up.
        database_block: points per block, a multiple of 128.

    Raises:
        ValueError: ``k``, the dtype or a block is not supported.
    """
    if k > MAX_K:
        raise ValueError(f"pallas_tpu finds at most {MAX_K} neighbours, not {k}: use 'xla'.")
    if jnp.float64 in (queries.dtype, database.dtype):
        raise ValueError("pallas_tpu compares in float32, not float64: use 'xla'.")
    if metric == "euclidean" or not queries.dtype == database.dtype == jnp.bfloat16:
        queries, database = queries.astype(jnp.float32), database.astype(jnp.float32)
    queries, database = centered(queries, database, metric=metric)
    (query_count, dim), database_count = queries.shape, database.shape[0]
    blocks = tuning.lookup(
        "neighbors/top_k",
        {"queries": query_count, "database": database_count, "dim": dim, "k": k},
        queries.dtype,
        heuristic=_heuristic(dim, queries.dtype.itemsize),
    )
    rows = query_block or blocks["query_block"]
    columns = database_block or blocks["database_block"]
    if rows % _GROUP or columns % _LANES:
        raise ValueError(
            f"query_block {rows} is not a multiple of {_GROUP}, or database_block {columns} not "
            f"of {_LANES}."
        )
    # No larger than the data, and whole tiles.
    rows = min(rows, pl.cdiv(query_count, _GROUP) * _GROUP)
    columns = min(columns, pl.cdiv(database_count, _LANES) * _LANES)
    length = pl.cdiv(k, _LANES) * _LANES

    grid = (pl.cdiv(query_count, rows), pl.cdiv(database_count, columns))
    operands = [queries, database]
    in_specs = [
        pl.BlockSpec((rows, dim), lambda i, j: (i, 0)),
        pl.BlockSpec((columns, dim), lambda i, j: (j, 0)),
    ]
    if metric == "euclidean":
        operands += [squared_norms(queries)[:, None], squared_norms(database)[None, :]]
        in_specs += [
            pl.BlockSpec((rows, 1), lambda i, j: (i, 0)),
            pl.BlockSpec((1, columns), lambda i, j: (0, j)),
        ]
    list_spec = pl.BlockSpec((rows, length), lambda i, j: (i, 0))
    item = queries.dtype.itemsize
    # Windows, scores, and what the compiler takes: scores again, float32 operands in three parts.
    operand_bytes = item * dim * (rows + columns)
    vmem_bytes = (2 + 2 * (item == 4)) * operand_bytes + 16 * rows * (columns + length) + 2**23
    found_scores, found_indices = pl.pallas_call(
        functools.partial(
            _search,
            k=k,
            count=database_count,
            exclude_self=exclude_self,
            euclidean=metric == "euclidean",
        ),
        out_shape=(
            jax.ShapeDtypeStruct((query_count, length), jnp.float32),
            jax.ShapeDtypeStruct((query_count, length), jnp.int32),
        ),
        grid=grid,
        in_specs=in_specs,
        out_specs=(list_spec, list_spec),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * query_count * database_count * dim,
            bytes_accessed=item * dim * (query_count + grid[0] * database_count)
            + 8 * query_count * length,
            transcendentals=0,
        ),
        name="neighbors_top_k",
    )(*operands)
    return found_scores[:, :k], found_indices[:, :k]


def _heuristic(dim: int, itemsize: int) -> dict[str, int]:
    """Many queries, so that the database passes few times; points for about 4 MiB a window."""
    fitting = (2**22 // (dim * itemsize)) // _LANES * _LANES
    return {"query_block": 512, "database_block": min(max(fitting, _LANES), 2048)}


def _search(
    query_ref, database_ref, *refs, k: int, count: int, exclude_self: bool, euclidean: bool
):
    """One block of queries and one of the database; the outputs are the lists so far."""
    *norm_refs, list_ref, index_ref, score_ref = refs
    rows, columns = score_ref.shape
    first_row, first_column = pl.program_id(0) * rows, pl.program_id(1) * columns

    @pl.when(pl.program_id(1) == 0)
    def _():
        list_ref[...] = jnp.full_like(list_ref, -jnp.inf)
        index_ref[...] = jnp.full_like(index_ref, count)

    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    products = lax.dot_general(
        query_ref[...],
        database_ref[...],
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if euclidean:
        query_norms, database_norms = (ref[...] for ref in norm_refs)
        products = jnp.minimum(2.0 * products - query_norms - database_norms, 0.0)
    column = first_column + lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    absent = column >= count
    if exclude_self:
        absent |= column == first_row + lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    score_ref[...] = jnp.where(absent, -jnp.inf, products)

    @pl.loop(0, rows // _GROUP)
    def _(group):
        taken = pl.ds(pl.multiple_of(group * _GROUP, _GROUP), _GROUP)
        column = lax.broadcasted_iota(jnp.int32, (_GROUP, columns), 1)
        place = lax.broadcasted_iota(jnp.int32, (_GROUP, list_ref.shape[1]), 1)

        def wanted(best: Array) -> Array:
            return jnp.any(best > list_ref[taken, k - 1 : k])

        def take(best: Array) -> Array:
            scores = score_ref[taken, :]
            # Of equal scores the first: its index is the lowest.
            chosen = jnp.min(jnp.where(scores == best, column, columns), axis=1, keepdims=True)
            scores = jnp.where(column == chosen, -jnp.inf, scores)
            score_ref[taken, :] = scores
            # What is in the list came earlier, so it stays before an equal score.
            values, indices = list_ref[taken, :], index_ref[taken, :]
            above = pltpu.roll(values, 1, 1)
            stays = values >= best
            enters = (place == 0) | (above >= best)
            list_ref[taken, :] = jnp.where(stays, values, jnp.where(enters, best, above))
            index_ref[taken, :] = jnp.where(
                stays,
                indices,
                jnp.where(enters, first_column + chosen, pltpu.roll(indices, 1, 1)),
            )
            return jnp.max(scores, axis=1, keepdims=True)

        lax.while_loop(wanted, take, jnp.max(score_ref[taken, :], axis=1, keepdims=True))
