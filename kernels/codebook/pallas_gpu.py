"""Codebook search on a GPU (Mosaic GPU, Hopper): scores stay in registers until they are reduced.

A block of threads keeps 128 vectors, two warpgroups of 64, and streams the codes past them; a third
warpgroup does nothing but start the copies. See ``operands.packed`` for the product. What becomes
of the scores is a ``Reduction``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels import mosaic_gpu, tuning
from repalign.kernels.codebook.operands import Scored, packed, packed_depth, padded

# Vectors of one warpgroup: the rows of Hopper's matrix product.
ROWS = 64
WARPGROUPS = 2
# Depth of one copy: 64 bfloat16 are the 128 bytes of the widest swizzle.
DEPTH = 64
# Columns that are reduced at a time: the fewest that the layout of a product has.
COLUMNS = 8
# Bytes of shared memory that the vectors may stay in; beyond it they are streamed as well.
_RESIDENT_BYTES = 96 * 1024
# Places of a top-k that fit in registers beside the scores.
MAX_K = 32
_LAST = jnp.iinfo(jnp.int32).max


def _swizzled(shape: tuple[int, ...]):
    return plgpu.SMEM(
        shape,
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128)),
    )


def _filled(shape: tuple[int, ...], value: float | int, dtype: jax.typing.DTypeLike) -> jax.Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


class Reduction(NamedTuple):
    """What a kernel makes of the scores of its vectors, one block of codes after the other.

    Attributes:
        initial: returns the state before the first block.
        update: ``(state, scores [64, code_block], step) -> state``.
        finish: ``state -> results``, for each output its places, [64] each.
        outputs: dtype and number of places of each output.
    """

    initial: Callable[[], Any]
    update: Callable[[Any, jax.Array, jax.Array], Any]
    finish: Callable[[Any], list[list[jax.Array]]]
    outputs: tuple[tuple[jax.typing.DTypeLike, int], ...]


def _columns(scores: jax.Array) -> list[jax.Array]:
    return [scores[:, i : i + COLUMNS] for i in range(0, scores.shape[1], COLUMNS)]


def _over_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _column_index(columns: int) -> jax.Array:
    shape = (ROWS, columns)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _first_index(scores: jax.Array, minimum: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the lowest of ``indices`` whose score is the minimum of the row."""
    reached = scores == _over_columns(minimum, scores.shape)
    return jnp.min(jnp.where(reached, indices, _LAST), axis=1)


def _minimum() -> Reduction:
    """The lowest score and the lowest index that has it.

    One running minimum for each of eight columns: three operations a score, and nothing crosses
    lanes before the end. Within a column the earlier group has the lower index.
    """

    def initial():
        shape = (ROWS, COLUMNS)
        return _filled(shape, jnp.inf, jnp.float32), _filled(shape, 0, jnp.int32)

    def update(state, scores, step):
        best, group = state
        columns = _columns(scores)
        for i, column in enumerate(columns):
            better = column < best
            best = jnp.where(better, column, best)
            group = jnp.where(better, step * len(columns) + i, group)
        return best, group

    def finish(state):
        best, group = state
        minimum = jnp.min(best, axis=1)
        indices = group * COLUMNS + _column_index(COLUMNS)
        return [[minimum], [_first_index(best, minimum, indices)]]

    return Reduction(initial, update, finish, ((jnp.float32, 1), (jnp.int32, 1)))


def _sorted_minima(k: int) -> Reduction:
    """The ``k`` lowest scores and their indices, lowest first.

    A block costs as many passes over its scores as it has codes that enter the list of one of the
    warpgroup's vectors: few, once the first blocks have filled the list.
    """

    def initial():
        held = [_filled((ROWS,), jnp.inf, jnp.float32) for _ in range(k)]
        return held, [_filled((ROWS,), i, jnp.int32) for i in range(k)]

    def update(state, scores, step):
        code = _column_index(scores.shape[1])

        def improves(loop):
            _, minimum, (held, _) = loop
            return jnp.max(jnp.where(minimum < held[-1], 1.0, 0.0)) > 0.5

        def insert(loop):
            scores, minimum, (held, indices) = loop
            position = _first_index(scores, minimum, code)
            scores = jnp.where(code == _over_columns(position, code.shape), jnp.inf, scores)
            score, index = minimum, step * scores.shape[1] + position
            new_held, new_indices = [], []
            for other, other_index in zip(held, indices, strict=True):
                # Equal scores stay ahead: they have the lower index.
                ahead = score < other
                new_held.append(jnp.where(ahead, score, other))
                new_indices.append(jnp.where(ahead, index, other_index))
                score, index = jnp.where(ahead, other, score), jnp.where(ahead, other_index, index)
            return scores, jnp.min(scores, axis=1), (new_held, new_indices)

        start = (scores, jnp.min(scores, axis=1), state)
        return lax.while_loop(improves, insert, start)[2]

    return Reduction(initial, update, list, ((jnp.float32, k), (jnp.int32, k)))


def _log_sum_exp() -> Reduction:
    """``log sum exp(-2 score)``, with a running minimum and sum for each of eight columns."""

    def initial():
        shape = (ROWS, COLUMNS)
        highest = float(jnp.finfo(jnp.float32).max)
        return _filled(shape, highest, jnp.float32), _filled(shape, 0.0, jnp.float32)

    def update(state, scores, step):
        lowest, total = state
        columns = _columns(scores)
        new_lowest = functools.reduce(jnp.minimum, columns, lowest)
        total = total * jnp.exp(2.0 * (new_lowest - lowest))
        for column in columns:
            total += jnp.exp(2.0 * (new_lowest - column))
        return new_lowest, total

    def finish(state):
        lowest, total = state
        minimum = jnp.min(lowest, axis=1)
        scale = jnp.exp(2.0 * (_over_columns(minimum, lowest.shape) - lowest))
        return [[jnp.log(jnp.sum(total * scale, axis=1)) - 2.0 * minimum]]

    return Reduction(initial, update, finish, ((jnp.float32, 1),))


def _body(*refs, code_block: int, resident: bool, reduction: Reduction):
    places = len(reduction.outputs)
    vectors_gmem, codes_gmem, *refs = refs
    outputs_gmem, (vectors_smem, codes_smem, *refs) = refs[:places], refs[places:]
    outputs_smem, (vectors_loaded, codes_loaded, consumed) = refs[:places], refs[places:]
    stages = codes_smem.shape[0]
    depth_steps = vectors_gmem.shape[1] // DEPTH
    code_steps = codes_gmem.shape[1] // code_block
    warpgroup = lax.axis_index("warpgroup")
    first = lax.axis_index("block") * (ROWS * WARPGROUPS)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(first, ROWS * WARPGROUPS)
        if resident:
            for i in range(depth_steps):
                plgpu.copy_gmem_to_smem(
                    vectors_gmem.at[rows, pl.ds(i * DEPTH, DEPTH)],
                    vectors_smem.at[i],
                    vectors_loaded,
                )

        def copy(i, _):
            slot = lax.rem(i, stages)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            depth = pl.ds(lax.rem(i, depth_steps) * DEPTH, DEPTH)
            codes = pl.ds(lax.div(i, depth_steps) * code_block, code_block)
            plgpu.copy_gmem_to_smem(
                codes_gmem.at[depth, codes], codes_smem.at[slot], codes_loaded.at[slot]
            )
            if not resident:
                plgpu.copy_gmem_to_smem(
                    vectors_gmem.at[rows, depth], vectors_smem.at[slot], codes_loaded.at[slot]
                )

        lax.fori_loop(0, depth_steps * code_steps, copy, None)

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(warpgroup * ROWS, ROWS)
        if resident:
            plgpu.barrier_wait(vectors_loaded)

        def block(step, state):
            def product(acc_ref):
                def accumulate(i, _):
                    slot = lax.rem(step * depth_steps + i, stages)
                    plgpu.barrier_wait(codes_loaded.at[slot])
                    vectors = vectors_smem.at[i if resident else slot, rows]
                    plgpu.wgmma(acc_ref, vectors, codes_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[slot])

                lax.fori_loop(0, depth_steps, accumulate, None)
                return acc_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((ROWS, code_block), jnp.float32))
            return reduction.update(state, scores, step)

        state = lax.fori_loop(0, code_steps, block, reduction.initial())
        vectors = pl.ds(first + warpgroup * ROWS, ROWS)
        for smem, results in zip(outputs_smem, reduction.finish(state), strict=True):
            for place, result in enumerate(results):
                smem[warpgroup, place] = result
        plgpu.commit_smem()
        for smem, gmem in zip(outputs_smem, outputs_gmem, strict=True):
            for place in range(gmem.shape[0]):
                plgpu.copy_smem_to_gmem(smem.at[warpgroup, place], gmem.at[place, vectors])
        plgpu.wait_smem_to_gmem(0)


def _search(
    operands: Scored,
    reduction: Reduction,
    *,
    op: str,
    precision: str,
    code_block: int | None,
    stages: int | None,
    transcendentals: int = 0,
) -> list[jax.Array]:
    """Returns the outputs of a reduction, [places, vectors] each."""
    count, codes = operands.vectors.shape[0], operands.codes.shape[0]
    depth = packed_depth(operands.codes.shape[1], precision=precision, multiple=DEPTH)
    if code_block is None or stages is None:
        found = tuning.lookup(
            f"codebook/{op}",
            {"vectors": count, "codes": codes, "depth": depth},
            jnp.bfloat16,
            # The longer the list of a top-k, the fewer registers are left for scores.
            heuristic={"code_block": 128 if op == "top_k" else 256, "stages": 3},
        )
        code_block = code_block or found["code_block"]
        stages = stages or found["stages"]
    if code_block not in (64, 128, 192, 256) or stages < 2:
        raise ValueError(
            f"code_block={code_block} must be 64, 128, 192 or 256, and stages={stages} at least 2."
        )
    block = ROWS * WARPGROUPS
    operands = padded(operands, vectors=block, codes=code_block)
    left, right = packed(operands, precision=precision, multiple=DEPTH)
    count_padded, codes_padded = left.shape[0], right.shape[0]
    depth_steps = depth // DEPTH
    resident = block * depth * 2 <= _RESIDENT_BYTES
    outputs = mosaic_gpu.kernel(
        functools.partial(_body, code_block=code_block, resident=resident, reduction=reduction),
        cost_estimate=pl.CostEstimate(
            flops=2 * count_padded * codes_padded * depth,
            transcendentals=transcendentals * count_padded * codes_padded,
            bytes_accessed=2 * depth * (count_padded + count_padded // block * codes_padded)
            + 4 * count_padded * sum(places for _, places in reduction.outputs),
        ),
        out_type=[
            jax.ShapeDtypeStruct((places, count_padded), dtype)
            for dtype, places in reduction.outputs
        ],
        scratch_types=[
            _swizzled((depth_steps if resident else stages, block, DEPTH)),
            _swizzled((stages, DEPTH, code_block)),
            *(plgpu.SMEM((WARPGROUPS, places, ROWS), dtype) for dtype, places in reduction.outputs),
            plgpu.Barrier(num_arrivals=depth_steps),
            plgpu.Barrier(num_arrivals=1 if resident else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ],
        grid=(count_padded // block,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(left, right.T)
    return [output[:, :count] for output in outputs]


def nearest(
    operands: Scored,
    *,
    precision: str,
    code_block: int | None = None,
    stages: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest score of every vector and the lowest index that has it, [vectors] each.

    Args:
        operands: float32, at least one vector.
        precision: see ``operands.packed``.
        code_block: codes of a block, 64, 128, 192 or 256; None looks it up.
        stages: copies under way at once, at least 2; None looks it up.
    """
    scores, indices = _search(
        operands,
        _minimum(),
        op="nearest",
        precision=precision,
        code_block=code_block,
        stages=stages,
    )
    return scores[0], indices[0]


def top_k(
    operands: Scored,
    *,
    k: int,
    precision: str,
    code_block: int | None = None,
    stages: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the ``k`` lowest scores and their indices, [vectors, k] each, as ``nearest``.

    Raises:
        ValueError: ``k`` over 32: the list of a vector is kept in registers.
    """
    if k > MAX_K:
        raise ValueError(f"pallas_gpu keeps the list in registers: k={k} exceeds {MAX_K}.")
    scores, indices = _search(
        operands,
        _sorted_minima(k),
        op="top_k",
        precision=precision,
        code_block=code_block,
        stages=stages,
    )
    return scores.T, indices.T


def log_normalizer(
    operands: Scored, *, code_block: int | None = None, stages: int | None = None
) -> jax.Array:
    """Returns ``log sum_k exp(-2 score_k)``, [vectors]; arguments as in ``nearest``."""
    (result,) = _search(
        operands,
        _log_sum_exp(),
        op="soft_assignment",
        precision="float32",
        code_block=code_block,
        stages=stages,
        transcendentals=1,
    )
    return result[0]
