"""Sums of the vectors of every code: the vectors sorted by code, so that each block adds its own.

Sorting makes the order of additions a property of the input, hence the same bits every time, and
leaves ``code blocks + vector blocks`` pairs of blocks to multiply where all would be their product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SortedVectors(NamedTuple):
    """Vectors in the order of their codes.

    Attributes:
        vectors: [vectors, dim], zero where left out.
        segments: [vectors], ascending code of each; ``num_codes`` and more where left out.
    """

    vectors: jax.Array
    segments: jax.Array


def sort_by_code(z: jax.Array, segments: jax.Array) -> SortedVectors:
    """Returns the vectors sorted by code; those of one code stay in their order."""
    order = jnp.argsort(segments, stable=True)
    return SortedVectors(z[order], segments[order])


class BlockRange(NamedTuple):
    """Which blocks of sorted vectors each block of codes needs, [code blocks] int32."""

    first: jax.Array
    count: jax.Array


def block_ranges(segments: jax.Array, *, codes: int, code_block: int, vector_block: int):
    """Returns the ``BlockRange`` of ``codes / code_block`` blocks; an empty one counts 0."""
    edges = jnp.arange(0, codes + 1, code_block, dtype=jnp.int32)
    ends = jnp.searchsorted(segments, edges).astype(jnp.int32)
    start, stop = ends[:-1], ends[1:]
    first = start // vector_block
    count = jnp.where(stop > start, (stop - 1) // vector_block - first + 1, 0)
    return BlockRange(first, count)
