"""Codebook search on a TPU (Mosaic): scores of a block of codes, reduced before the next block.

Scores are ``[codes, vectors]``: reductions over codes then combine whole registers, and what is
found lies along lanes. See ``operands.packed`` for the product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels import tuning
from repalign.kernels.codebook.operands import Scored, packed, packed_depth, padded

SUBLANES = 8
LANES = 128
_LAST = jnp.iinfo(jnp.int32).max


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _blocks(
    op: str, vectors: int, codes: int, depth: int, given: tuple[int | None, int | None]
) -> tuple[int, int]:
    """Returns the vectors and the codes of a block, no larger than there are."""
    if None in given:
        # Both operands are held twice (the next block arrives meanwhile): at most 4 MiB each.
        held = _round_up(depth, LANES) * 2
        heuristic = {
            "vector_block": max(LANES, min(1024, 2**21 // held // LANES * LANES)),
            "code_block": max(LANES, min(512, 2**20 // held // LANES * LANES)),
        }
        found = tuning.lookup(
            f"codebook/{op}",
            {"vectors": vectors, "codes": codes, "depth": depth},
            jnp.bfloat16,
            heuristic=heuristic,
        )
        given = (given[0] or found["vector_block"], given[1] or found["code_block"])
    vector_block, code_block = given
    if vector_block % LANES or code_block % SUBLANES:
        raise ValueError(
            f"blocks of {vector_block} vectors and {code_block} codes: multiples of {LANES} and "
            f"{SUBLANES} are needed."
        )
    return (
        min(vector_block, _round_up(vectors, LANES)),
        min(code_block, _round_up(codes, 2 * SUBLANES)),
    )


def _scores(codes_ref, vectors_ref) -> jax.Array:
    return lax.dot_general(
        codes_ref[...],
        vectors_ref[...],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _first_index(scores: jax.Array, minimum: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the lowest of ``indices`` whose score is the minimum over the first axis."""
    return jnp.min(jnp.where(scores == minimum, indices, _LAST), axis=0, keepdims=True)


def _nearest_kernel(vectors_ref, codes_ref, score_ref, index_ref, scores_ref, best_ref, group_ref):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        best_ref[...] = jnp.full(best_ref.shape, jnp.inf, jnp.float32)
        group_ref[...] = jnp.zeros(group_ref.shape, jnp.int32)

    scores_ref[...] = _scores(codes_ref, vectors_ref)
    # One running minimum per sublane: three vector operations a score, and no reduction across
    # sublanes before the last block. Within a sublane the earlier group has the lower index.
    groups = scores_ref.shape[0] // SUBLANES
    best, group = best_ref[...], group_ref[...]
    for i in range(groups):
        scores = scores_ref[i * SUBLANES : (i + 1) * SUBLANES, :]
        better = scores < best
        best = jnp.where(better, scores, best)
        group = jnp.where(better, step * groups + i, group)
    best_ref[...], group_ref[...] = best, group

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        minimum = jnp.min(best, axis=0, keepdims=True)
        sublane = lax.broadcasted_iota(jnp.int32, best.shape, 0)
        score_ref[...] = minimum
        index_ref[...] = _first_index(best, minimum, group * SUBLANES + sublane)


def _top_k_kernel(
    vectors_ref, codes_ref, score_ref, index_ref, scores_ref, *, k: int, code_block: int
):
    step = pl.program_id(1)
    place = lax.broadcasted_iota(jnp.int32, score_ref.shape, 0)

    @pl.when(step == 0)
    def _():
        score_ref[...] = jnp.full(score_ref.shape, jnp.inf, jnp.float32)
        index_ref[...] = place

    scores_ref[...] = _scores(codes_ref, vectors_ref)
    code = lax.broadcasted_iota(jnp.int32, scores_ref.shape, 0)

    def insert(minimum: jax.Array) -> jax.Array:
        """Moves every vector's best remaining code of the block into its sorted list."""
        scores = scores_ref[...]
        position = _first_index(scores, minimum, code)
        scores = jnp.where(code == position, jnp.inf, scores)
        scores_ref[...] = scores
        held, indices = score_ref[...], index_ref[...]
        # Equal scores stay ahead: they have the lower index.
        rank = jnp.sum((held <= minimum).astype(jnp.int32), axis=0, keepdims=True)
        found = (minimum, step * code_block + position)
        for ref, old, new in zip((score_ref, index_ref), (held, indices), found, strict=True):
            shifted = jnp.concatenate([new, old[:-1]], axis=0)
            ref[...] = jnp.where(place < rank, old, jnp.where(place == rank, new, shifted))
        return jnp.min(scores, axis=0, keepdims=True)

    def improves(minimum: jax.Array) -> jax.Array:
        return jnp.any(minimum < score_ref[k - 1 : k, :])

    lax.while_loop(improves, insert, jnp.min(scores_ref[...], axis=0, keepdims=True))


def _search(
    operands: Scored,
    *,
    precision: str,
    op: str,
    places: int,
    vector_block: int | None,
    code_block: int | None,
    body,
    scratch_shapes,
) -> tuple[jax.Array, jax.Array]:
    count, codes = operands.vectors.shape[0], operands.codes.shape[0]
    depth = packed_depth(operands.codes.shape[1], precision=precision, multiple=LANES)
    vector_block, code_block = _blocks(op, count, codes, depth, (vector_block, code_block))
    operands = padded(operands, vectors=vector_block, codes=code_block)
    left, right = packed(operands, precision=precision, multiple=LANES)
    grid = (left.shape[0] // vector_block, right.shape[0] // code_block)
    found_spec = pl.BlockSpec((places, vector_block), lambda i, j: (0, i))
    scores, indices = pl.pallas_call(
        functools.partial(body, code_block=code_block) if op == "top_k" else body,
        grid=grid,
        in_specs=[
            pl.BlockSpec((vector_block, depth), lambda i, j: (i, 0)),
            pl.BlockSpec((code_block, depth), lambda i, j: (j, 0)),
        ],
        out_specs=[found_spec, found_spec],
        out_shape=[
            jax.ShapeDtypeStruct((places, left.shape[0]), jnp.float32),
            jax.ShapeDtypeStruct((places, left.shape[0]), jnp.int32),
        ],
        scratch_shapes=scratch_shapes(vector_block, code_block),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * left.shape[0] * right.shape[0] * depth,
            transcendentals=0,
            bytes_accessed=2 * depth * (left.shape[0] + grid[0] * right.shape[0])
            + 8 * places * left.shape[0],
        ),
        name=f"codebook_{op}",
    )(left, right)
    return scores[:, :count].T, indices[:, :count].T


def nearest(
    operands: Scored,
    *,
    precision: str,
    vector_block: int | None = None,
    code_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest score of every vector and the lowest index that has it, [vectors] each.

    Args:
        operands: float32, at least one vector.
        precision: see ``operands.packed``.
        vector_block: vectors of a block, a multiple of 128; None looks it up.
        code_block: codes of a block, a multiple of 8; None looks it up.
    """
    scores, indices = _search(
        operands,
        precision=precision,
        op="nearest",
        places=1,
        vector_block=vector_block,
        code_block=code_block,
        body=_nearest_kernel,
        scratch_shapes=lambda vector_block, code_block: [
            pltpu.VMEM((code_block, vector_block), jnp.float32),
            pltpu.VMEM((SUBLANES, vector_block), jnp.float32),
            pltpu.VMEM((SUBLANES, vector_block), jnp.int32),
        ],
    )
    return scores[:, 0], indices[:, 0]


def top_k(
    operands: Scored,
    *,
    k: int,
    precision: str,
    vector_block: int | None = None,
    code_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the ``k`` lowest scores and their indices, [vectors, k] each, as ``nearest``.

    A block of codes costs as many passes over its scores as it has codes that enter the list of
    one of its vectors: few, once the first blocks have filled the list.
    """
    scores, indices = _search(
        operands,
        precision=precision,
        op="top_k",
        places=_round_up(k, SUBLANES),
        vector_block=vector_block,
        code_block=code_block,
        body=functools.partial(_top_k_kernel, k=k),
        scratch_shapes=lambda vector_block, code_block: [
            pltpu.VMEM((code_block, vector_block), jnp.float32)
        ],
    )
    return scores[:, :k], indices[:, :k]
