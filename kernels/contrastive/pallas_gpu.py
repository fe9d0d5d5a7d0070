"""The two passes on a Hopper GPU (Mosaic GPU): logits stay in registers until they are reduced.

Both kernels are one matrix product with an epilogue. A block of threads has 128 rows, two
warpgroups of 64, and streams columns past them; a third warpgroup does nothing but start copies.
The forward kernel takes each block of logits into running sums, kept per group of 8 columns so that
nothing is exchanged between threads before the end. The backward kernel writes the weights of at
most ``ROWS_AT_A_TIME`` x ``COLUMNS_AT_A_TIME`` entries, which two plain matrix products take to
both gradients: accumulators of all D columns of a gradient would not fit in registers, and this way
logits are recomputed once for both.

float32 vectors are split into three bfloat16 parts, of whose nine products the six largest are
added: the matrix unit has no wider type that keeps 24 bits.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from repalign.kernels import mosaic_gpu, tuning
from repalign.kernels.contrastive import entries, operands
from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.streamed import Gradients

# Rows of a warpgroup: those of Hopper's matrix product.
ROWS = 64
WARPGROUPS = 2
BLOCK_ROWS = ROWS * WARPGROUPS
# Depth of one copy: 64 bfloat16 are the 128 bytes of the widest swizzle.
DEPTH = 64
# Columns of a block that are masked, weighted and stored at a time.
SLICE = 64
# Columns whose sums are kept apart: the fewest that the layout of a product has.
GROUP = 8
# Shared memory of a block of threads, less 2 KiB for barriers and results.
SHARED_BYTES = 222 * 1024
# The largest block of weights in memory: 64 MiB in bfloat16. Taller than wide, because the columns'
# gradient is read and written once for every block of rows.
ROWS_AT_A_TIME, COLUMNS_AT_A_TIME = 8192, 4096
# Blocks of threads to start, if there is work for as many: two for each of an H100's 132 cores.
BLOCKS_OF_THREADS = 264

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The maximum over no entry: finite, so that the difference of two maxima is."""

# Parts of rows and columns that are multiplied, for one part (bfloat16) and for three (float32).
PRODUCTS = {1: ((0, 0),), 3: ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))}

Blocks = Mapping[str, int]
DEFAULT_BLOCKS = {"columns": 256, "stages": 3}


def _parts(vectors: Array) -> Array:
    """Returns [parts, rows, dim] in bfloat16, whose sum is the vectors."""
    if vectors.dtype == jnp.bfloat16:
        return vectors[None]
    parts = []
    for _ in range(3):
        # reduce_precision, unlike a cast to bfloat16 and back, is never simplified away.
        part = lax.reduce_precision(vectors, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        vectors = vectors - part
    return jnp.stack(parts)


def _swizzled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    tile = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _filled(value: float) -> Array:
    """Returns a running sum or maximum: one entry for each row and column of a group."""
    return plgpu.layout_cast(jnp.full((ROWS, GROUP), value, jnp.float32), plgpu.Layout.WGMMA)


def _load(ref: Any, index: Any, layout: Any) -> Array:
    """Loads entries that several threads share straight from global memory."""
    if "idx" in inspect.signature(plgpu.load).parameters:  # JAX before 0.11
        return plgpu.load(ref, index, layout=layout, optimized=False)
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _load_rows(ref: Any, start: Array) -> Array:
    """Returns 64 rows' entries, broadcast over a slice of columns."""
    x = _load(ref, pl.ds(start, ROWS), plgpu.Layout.WGMMA.reduce(1))
    return lax.broadcast_in_dim(x, (ROWS, SLICE), [0])


def _load_columns(ref: Any, start: Array) -> Array:
    """Returns the entries of a slice of columns, broadcast over 64 rows."""
    x = _load(ref, pl.ds(start, SLICE), plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(x, (ROWS, SLICE), [1])


def _groups(x: Array) -> list[Array]:
    return [x[:, i : i + GROUP] for i in range(0, x.shape[1], GROUP)]


def _body(
    rows_gmem: Any,
    columns_gmem: Any,
    row_marks: Any,
    column_marks: Any,
    scalars: Any,
    outputs: Any,
    scratch: Any,
    *,
    epilogue: Any,
    tiles: int,
    resident: bool,
) -> None:
    """Multiplies a block of rows with its share of the column blocks, each taken by the epilogue.

    ``epilogue`` has ``start()``, which returns the carry, ``take(carry, acc, marks, ...)`` and
    ``finish(carry, ...)``.
    """
    rows_smem, columns_smem, rows_loaded, loaded, consumed, *rest = scratch
    stages, column_block = columns_smem.shape[0], columns_smem.shape[1]
    parts, _, dim = rows_gmem.shape
    depth_steps = dim // DEPTH
    copies_of_tile = depth_steps * len(PRODUCTS[parts])
    warpgroup, split = lax.axis_index("warpgroup"), lax.axis_index("split")
    first_row = lax.axis_index("block") * BLOCK_ROWS
    first_tile = split * tiles
    own_tiles = jnp.minimum(tiles, columns_gmem.shape[1] // column_block - first_tile)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(first_row, BLOCK_ROWS)
        if resident:
            for i in range(depth_steps):
                source = rows_gmem.at[0, rows, pl.ds(i * DEPTH, DEPTH)]
                plgpu.copy_gmem_to_smem(source, rows_smem.at[i], rows_loaded)

        def copy(i, _):
            slot = lax.rem(i, stages)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            tile, step = lax.div(i, copies_of_tile), lax.rem(i, copies_of_tile)
            product = lax.div(step, depth_steps)
            row_part, column_part = (
                sum(
                    jnp.where(product == n, pair[side], 0) for n, pair in enumerate(PRODUCTS[parts])
                )
                if parts > 1
                else 0
                for side in (0, 1)
            )
            depth = pl.ds(lax.rem(step, depth_steps) * DEPTH, DEPTH)
            columns = pl.ds((first_tile + tile) * column_block, column_block)
            source = columns_gmem.at[column_part, columns, depth]
            plgpu.copy_gmem_to_smem(source, columns_smem.at[slot], loaded.at[slot])
            if not resident:
                source = rows_gmem.at[row_part, rows, depth]
                plgpu.copy_gmem_to_smem(source, rows_smem.at[slot], loaded.at[slot])
            return None

        lax.fori_loop(0, own_tiles * copies_of_tile, copy, None)

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        start_row = first_row + warpgroup * ROWS
        own_rows = pl.ds(warpgroup * ROWS, ROWS)
        held = {name: _load_rows(ref, start_row) for name, ref in row_marks.items()}
        constants = {name: scalars[i] for i, name in enumerate(("scale", "bias"))}
        if resident:
            plgpu.barrier_wait(rows_loaded)

        def tile(t, carry):
            def product(acc_ref):
                def accumulate(i, _):
                    slot = lax.rem(t * copies_of_tile + i, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    rows = rows_smem.at[i if resident else slot, own_rows]
                    plgpu.wgmma(acc_ref, rows, columns_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[slot])
                    return None

                lax.fori_loop(0, copies_of_tile, accumulate, None)
                return acc_ref[...]

            acc = pl.run_scoped(product, plgpu.ACC((ROWS, column_block), jnp.float32))
            first_column = (first_tile + t) * column_block

            def slices():
                for i in range(0, column_block, SLICE):
                    column = first_column + i
                    marks = {name: _load_columns(x, column) for name, x in column_marks.items()}
                    yield column, acc[:, i : i + SLICE], marks

            return epilogue.take(carry, constants, held, slices(), start_row, outputs, rest)

        carry = lax.fori_loop(0, own_tiles, tile, epilogue.start())
        epilogue.finish(carry, split, start_row, outputs, rest)


def _store_rows(
    values: Sequence[Array], refs: Sequence[Any], smem: Any, split: Any, start: Any
) -> None:
    """Writes 64 rows' results, one array each, through shared memory."""
    warpgroup = lax.axis_index("warpgroup")
    for i, x in enumerate(values):
        smem[warpgroup, i] = x
    plgpu.commit_smem()
    for i, ref in enumerate(refs):
        plgpu.copy_smem_to_gmem(smem.at[warpgroup, i], ref.at[split, pl.ds(start, ROWS)])
    plgpu.wait_smem_to_gmem(0)


class _LogSumExp:
    """Takes logits into a running maximum and the sum of exponentials below it."""

    results = 2

    @staticmethod
    def start():
        return _filled(LOWEST), _filled(0.0)

    @staticmethod
    def take(carry, constants, held, slices, *_):
        top, total = carry
        logits = []
        for _, part, marks in slices:
            mask = entries.counted(held, marks)
            logits += _groups(entries.masked(mask, constants["scale"] * part, -jnp.inf))
        new_top = functools.reduce(jnp.maximum, logits, top)
        total = total * jnp.exp(top - new_top)
        for part in logits:
            total += jnp.exp(part - new_top)
        return new_top, total

    @staticmethod
    def finish(carry, split, start_row, outputs, rest):
        top, total = carry
        highest = jnp.max(top, axis=1)
        shares = total * jnp.exp(top - lax.broadcast_in_dim(highest, top.shape, [0]))
        _store_rows([highest, jnp.sum(shares, axis=1)], outputs, rest[0], split, start_row)


class _SigmoidLoss:
    """Takes logits into the running sum of their losses."""

    results = 1

    @staticmethod
    def start():
        return _filled(0.0)

    @staticmethod
    def take(carry, constants, held, slices, *_):
        for _, part, marks in slices:
            mask = entries.counted(held, marks)
            logits = constants["scale"] * part + constants["bias"]
            carry = sum(_groups(entries.sigmoid_term(logits, held, marks, mask)), carry)
        return carry

    @staticmethod
    def finish(carry, split, start_row, outputs, rest):
        _store_rows([jnp.sum(carry, axis=1)], outputs, rest[0], split, start_row)


class _Weights:
    """Writes ``w g`` of every entry; sums ``w g <a, b>`` and ``w g`` over each row's columns."""

    results = 2

    def __init__(self, is_sigmoid: bool):
        self.is_sigmoid = is_sigmoid

    @staticmethod
    def start():
        return _filled(0.0), _filled(0.0)

    def take(self, carry, constants, held, slices, start_row, outputs, rest):
        of_scale, of_bias = carry
        weights_gmem, weights_smem = outputs[0], rest[1]
        warpgroup = lax.axis_index("warpgroup")
        for i, (column, part, marks) in enumerate(slices):
            mask = entries.counted(entries.marks_of(held), marks)
            logits = constants["scale"] * part
            if self.is_sigmoid:
                logits = logits + constants["bias"]
                weights = entries.sigmoid_weight(logits, held, marks, mask)
            else:
                weights = entries.softmax_weight(logits, held["value"], mask)
            weights = weights * held["cotangent"]
            of_scale = sum(_groups(weights * part), of_scale)
            of_bias = sum(_groups(weights), of_bias)
            slot = weights_smem.at[warpgroup, i % 2]
            # The copy before the last one has left this slot.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            slot[...] = weights.astype(weights_smem.dtype)
            plgpu.commit_smem()
            target = weights_gmem.at[pl.ds(start_row, ROWS), pl.ds(column, SLICE)]
            plgpu.copy_smem_to_gmem(slot, target)
        return of_scale, of_bias

    @staticmethod
    def finish(carry, split, start_row, outputs, rest):
        sums = [jnp.sum(x, axis=1) for x in carry]
        _store_rows(sums, outputs[1:], rest[0], split, start_row)


def _call(
    epilogue: Any,
    rows: Side,
    columns: Side,
    scalars: Array,
    blocks: Blocks,
    *,
    weights_dtype: Any = None,
) -> Sequence[Array]:
    """Runs the kernel; returns [weights] (if there is a type for them) and [splits, rows] results.

    ``vectors`` are what ``_parts`` returns; all sizes are multiples of the blocks.
    """
    parts, count, dim = rows["vectors"].shape
    size = columns["vectors"].shape[1]
    column_block, stages = blocks["columns"], blocks["stages"]
    column_tiles, row_blocks = size // column_block, count // BLOCK_ROWS
    tiles = max(1, column_tiles * row_blocks // BLOCKS_OF_THREADS)
    splits = -(-column_tiles // tiles)
    weights_bytes = 0
    if weights_dtype is not None:
        weights_bytes = WARPGROUPS * 2 * ROWS * SLICE * jnp.dtype(weights_dtype).itemsize
    resident_bytes = 2 * BLOCK_ROWS * dim + stages * 2 * column_block * DEPTH + weights_bytes
    resident = parts == 1 and resident_bytes <= SHARED_BYTES
    results = [jax.ShapeDtypeStruct((splits, count), jnp.float32)] * epilogue.results
    scratch = [
        _swizzled((dim // DEPTH if resident else stages, BLOCK_ROWS, DEPTH)),
        _swizzled((stages, column_block, DEPTH)),
        plgpu.Barrier(num_arrivals=dim // DEPTH),
        plgpu.Barrier(num_arrivals=1 if resident else 2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        plgpu.SMEM((WARPGROUPS, epilogue.results, ROWS), jnp.float32),
    ]
    if weights_dtype is not None:
        results.insert(0, jax.ShapeDtypeStruct((count, size), weights_dtype))
        scratch.append(_swizzled((WARPGROUPS, 2, ROWS, SLICE), weights_dtype))
    row_names = sorted(rows.keys() - {"vectors"})
    column_names = sorted(columns.keys() - {"vectors"})

    def body(rows_gmem, columns_gmem, scalars_gmem, *refs):
        row_marks = dict(zip(row_names, refs, strict=False))
        refs = refs[len(row_names) :]
        column_marks = dict(zip(column_names, refs, strict=False))
        refs = refs[len(column_names) :]
        _body(
            rows_gmem,
            columns_gmem,
            row_marks,
            column_marks,
            scalars_gmem,
            refs[: len(results)],
            refs[len(results) :],
            epilogue=epilogue,
            tiles=tiles,
            resident=resident,
        )

    written = sum(x.size * x.dtype.itemsize for x in results)
    return mosaic_gpu.kernel(
        body,
        cost_estimate=pl.CostEstimate(
            flops=2 * count * size * dim * len(PRODUCTS[parts]),
            transcendentals=count * size,
            bytes_accessed=2 * parts * dim * (count + row_blocks * size) + written,
        ),
        out_type=results,
        scratch_types=scratch,
        grid=(splits, row_blocks),
        grid_names=("split", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(
        rows["vectors"],
        columns["vectors"],
        scalars,
        *(rows[name] for name in row_names),
        *(columns[name] for name in column_names),
    )


def _blocks(rows: Side, columns: Side, given: Blocks | None, what: str) -> Blocks:
    operands.check_types(rows, columns, "pallas_gpu")
    if given is None:
        sizes = {"rows": len(rows["vectors"]), "columns": len(columns["vectors"])}
        sizes["dim"] = rows["vectors"].shape[1]
        dtype = operands.vectors_dtype(rows, columns)
        given = tuning.lookup(f"contrastive/{what}", sizes, dtype, heuristic=DEFAULT_BLOCKS)
    if given["columns"] not in (64, 128, 192, 256) or given["stages"] < 2:
        raise ValueError(f"columns of 64, 128, 192 or 256 and 2 or more stages, not {dict(given)}.")
    return given


def _scalars(scale: Array, bias: Array | None) -> Array:
    return jnp.stack([scale, jnp.zeros_like(scale) if bias is None else bias])


def forward(
    rows: Side,
    columns: Side,
    scale: Array,
    bias: Array | None,
    *,
    blocks: Blocks | None = None,
) -> Array:
    """See ``streamed.Engine``.

    Args:
        blocks: ``{"columns": of a block, 64 to 256, "stages": copies under way}``; by default what
            ``tuning`` knows.
    """
    count, dtype = len(rows["vectors"]), operands.vectors_dtype(rows, columns)
    blocks = _blocks(rows, columns, blocks, "forward")
    rows = operands.prepare(rows, dtype, BLOCK_ROWS, DEPTH, mark=False)
    columns = operands.prepare(columns, dtype, blocks["columns"], DEPTH, mark=True)
    rows, columns = (x | {"vectors": _parts(x["vectors"])} for x in (rows, columns))
    scalars = _scalars(scale, bias)
    if bias is not None:
        (total,) = _call(_SigmoidLoss, rows, columns, scalars, blocks)
        return jnp.sum(total, axis=0)[:count]
    top, total = _call(_LogSumExp, rows, columns, scalars, blocks)
    highest = jnp.max(top, axis=0)
    total = jnp.sum(total * jnp.exp(top - highest), axis=0)
    return jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)[:count]


def backward(
    rows: Side,
    columns: Side,
    scale: Array,
    bias: Array | None,
    *,
    blocks: Blocks | None = None,
) -> Gradients:
    """See ``streamed.Engine``; ``blocks`` as in ``forward``. The rows' gradient has their type."""
    count, size = len(rows["vectors"]), len(columns["vectors"])
    dim, dtype = rows["vectors"].shape[1], operands.vectors_dtype(rows, columns)
    blocks = _blocks(rows, columns, blocks, "backward")
    scalars, epilogue = _scalars(scale, bias), _Weights(bias is not None)

    def cut(side: Side, largest: int, multiple: int, *, mark: bool) -> Side:
        """Pads a side and splits it into [chunks, chunk, ...]."""
        length = len(side["vectors"])
        chunks = -(-length // largest)
        side = operands.prepare(side, dtype, chunks * multiple, DEPTH, mark=mark)
        return {name: x.reshape(chunks, -1, *x.shape[1:]) for name, x in side.items()}

    def multiply(x: Array, y: Array) -> Array:
        exact = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
        return jnp.matmul(x, y, precision=exact, preferred_element_type=jnp.float32)

    row_chunks = cut(rows, ROWS_AT_A_TIME, BLOCK_ROWS, mark=False)
    column_chunks = cut(columns, COLUMNS_AT_A_TIME, blocks["columns"], mark=True)

    def take_rows(of_columns: Array, row: Side) -> tuple[Array, Any]:
        split_row = row | {"vectors": _parts(row["vectors"])}

        def take_columns(j: Array, state: Any) -> Any:
            of_columns, of_rows, of_scale, of_bias = state
            column = {name: x[j] for name, x in column_chunks.items()}
            split_column = column | {"vectors": _parts(column["vectors"])}
            weights, *sums = _call(
                epilogue, split_row, split_column, scalars, blocks, weights_dtype=dtype
            )
            # One chunk is updated in place: stacked results would be a second copy of them all.
            of_columns = of_columns.at[j].add(multiply(weights.T, row["vectors"]))
            of_rows = of_rows + multiply(weights, column["vectors"])
            return of_columns, of_rows, of_scale + jnp.sum(sums[0]), of_bias + jnp.sum(sums[1])

        start = (jnp.zeros(row["vectors"].shape, jnp.float32), jnp.float32(0), jnp.float32(0))
        steps = len(column_chunks["vectors"])
        of_columns, of_rows, *sums = lax.fori_loop(0, steps, take_columns, (of_columns, *start))
        return of_columns, ((scale * of_rows).astype(dtype), sums)

    start = jnp.zeros(column_chunks["vectors"].shape, jnp.float32)
    of_columns, (of_rows, (of_scale, of_bias)) = lax.scan(take_rows, start, row_chunks)
    return (
        of_rows.reshape(-1, of_rows.shape[-1])[:count, :dim],
        scale * of_columns.reshape(-1, of_columns.shape[-1])[:size, :dim],
        jnp.sum(of_scale),
        None if bias is None else jnp.sum(of_bias),
    )
