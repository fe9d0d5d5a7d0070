"""Exact nearest neighbours in bounded memory: blocks of queries against blocks of the database."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from repalign.kernels.neighbors.reference import centered, scores

QUERY_BLOCK = 1024
DATABASE_BLOCK = 4096


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
    query_block: int = QUERY_BLOCK,
    database_block: int = DATABASE_BLOCK,
) -> tuple[Array, Array]:
    """Returns (scores, indices), both ``[queries, k]``, nearest first; see ``api.top_k``.

    The largest temporary is ``query_block * database_block`` scores, whatever the two counts are.
    Each block's best k join the best k so far; the latter come first, and ``lax.top_k`` keeps the
    earlier of equal values, so a tie goes to the lowest database index.
    """
    queries, database = centered(queries, database, metric=metric)
    query_count, database_count = queries.shape[0], database.shape[0]
    query_block = min(query_block, query_count)
    database_block = min(database_block, database_count)
    query_blocks = _blocks(queries, query_block)
    database_blocks = _blocks(database, database_block)
    query_starts = jnp.arange(query_blocks.shape[0]) * query_block
    database_starts = jnp.arange(database_blocks.shape[0]) * database_block

    def search(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        query_start, block = arguments
        rows = query_start + jnp.arange(query_block)

        def merge(best: tuple[Array, Array], candidates: tuple[Array, Array]):
            best_scores, best_indices = best
            start, points = candidates
            columns = (start + jnp.arange(database_block)).astype(jnp.int32)
            absent = columns[None, :] >= database_count
            if exclude_self:
                absent = absent | (rows[:, None] == columns[None, :])
            new = jnp.where(absent, -jnp.inf, scores(block, points, metric=metric))
            new_scores, new_positions = lax.top_k(new, min(k, database_block))
            joined_scores = jnp.concatenate([best_scores, new_scores], axis=1)
            joined_indices = jnp.concatenate([best_indices, columns[new_positions]], axis=1)
            kept_scores, kept = lax.top_k(joined_scores, k)
            return (kept_scores, jnp.take_along_axis(joined_indices, kept, axis=1)), None

        # The placeholder index is out of range and never survives: k real candidates exist.
        nothing = (
            jnp.full((query_block, k), -jnp.inf, block.dtype),
            jnp.full((query_block, k), database_count, jnp.int32),
        )
        best, _ = lax.scan(merge, nothing, (database_starts, database_blocks))
        return best

    found_scores, found_indices = lax.map(search, (query_starts, query_blocks))
    return (
        found_scores.reshape(-1, k)[:query_count],
        found_indices.reshape(-1, k)[:query_count],
    )


def _blocks(points: Array, size: int) -> Array:
    """Cuts ``[count, dim]`` into ``[blocks, size, dim]``, the last one padded with zeros."""
    count = math.ceil(points.shape[0] / size)
    padding = count * size - points.shape[0]
    return jnp.pad(points, ((0, padding), (0, 0))).reshape(count, size, points.shape[1])
