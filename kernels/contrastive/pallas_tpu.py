"""The two passes as TPU kernels (Mosaic): logits live in VMEM only, a block at a time.

Every kernel holds a block of one side, its *stationary* side, and streams the other past it. A
block of logits is worked on in slices of 128 lanes: maxima and sums are kept per lane, and lanes
are combined once, after the last block, so that the inner loop has no reduction across lanes.

The backward pass has two kernels of one body: the rows' gradient, with rows stationary, and the
columns', with columns stationary. Each recomputes the logits.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels import tuning
from repalign.kernels.contrastive import entries, operands
from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.streamed import Gradients

LANES = 128
LOWEST = float(jnp.finfo(jnp.float32).min)
"""The maximum over no entry: finite, so that the difference of two maxima is."""

VMEM_LIMIT = 48 * 2**20
"""What a kernel may use; the smallest VMEM, of v5p and tpu7x, has 64 MiB."""

Blocks = Mapping[str, int]


def default_blocks(dtype: jnp.dtype, dim: int) -> Blocks:
    """Returns the block sizes where nothing was measured: as large as fits for any D to 1024.

    A stationary block of 1,024 gives 1,024 operations per byte of the streamed side, above what
    any TPU needs to keep its matrix unit busy; large vectors have room for 512.
    """
    narrow = dim * dtype.itemsize <= 1024
    return {"stationary": 1024 if narrow else 512, "streamed": 512}


def _blocks(
    what: str, given: Blocks | None, rows: int, columns: int, dim: int, dtype: jnp.dtype
) -> Blocks:
    """Returns the blocks to use, none larger than the data rounded up to whole tiles."""
    if given is None:
        shape = {"stationary": rows, "streamed": columns, "dim": dim}
        heuristic = default_blocks(dtype, dim)
        given = tuning.lookup(f"contrastive/{what}", shape, dtype, heuristic=heuristic)
    if any(size % LANES for size in given.values()):
        raise ValueError(f"TPU blocks have to be multiples of {LANES}, got {dict(given)}.")
    largest = {"stationary": rows, "streamed": columns}
    return {name: min(given[name], -(-size // LANES) * LANES) for name, size in largest.items()}


def _products(stationary: Array, streamed: Array) -> Array:
    return _matmul(stationary, streamed, 1)


def _matmul(x: Array, y: Array, contracted: int) -> Array:
    """Contracts x's last axis with the given axis of y; float32 inputs at full precision."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((1,), (contracted,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _slices(
    products: Array, held: Side, passing: Side
) -> Iterator[tuple[slice, Array, Side, Side]]:
    """Cuts a block into slices of 128 lanes: (lanes, inner products, stationary and streamed marks)

    ``held`` has [block, 128] arrays, each row's entry in every lane; ``passing`` [1, block] ones.
    """
    for start in range(0, products.shape[1], LANES):
        lanes = slice(start, start + LANES)
        shape = (products.shape[0], LANES)
        wide = {name: jnp.broadcast_to(x[:, lanes], shape) for name, x in passing.items()}
        yield lanes, products[:, lanes], held, wide


def _into_lanes(x: Array) -> Array:
    """Turns [1, block] into [block, 128], each row's entry in every lane."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _out_of_lanes(x: Array) -> Array:
    """Turns [block, 1] into [1, block]."""
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


def _forward_kernel(
    scalars: Any, held_refs: Any, passing_refs: Any, out: Any, marks: Any, *carry: Any
) -> None:
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _start():
        for name, mark in marks.items():
            mark[...] = _into_lanes(held_refs[name][...])
        for ref in carry:
            ref[...] = jnp.zeros_like(ref)
        if len(carry) == 2:
            carry[0][...] = jnp.full_like(carry[0], LOWEST)

    held = {name: mark[...] for name, mark in marks.items()}
    passing = {name: ref[...] for name, ref in passing_refs.items() if name != "vectors"}
    products = _products(held_refs["vectors"][...], passing_refs["vectors"][...])
    slices = list(_slices(products, held, passing))

    def add_terms(total: Any) -> None:
        for _, part, first, second in slices:
            mask = entries.counted(first, second)
            logits = scalars[0] * part + scalars[1]
            total[...] += entries.sigmoid_term(logits, first, second, mask)

    def add_exponentials(top: Any, total: Any) -> None:
        logits = [
            entries.masked(entries.counted(first, second), scalars[0] * part, -jnp.inf)
            for _, part, first, second in slices
        ]
        new_top = functools.reduce(jnp.maximum, logits, top[...])
        sums = total[...] * jnp.exp(top[...] - new_top)
        total[...] = sums + sum(jnp.exp(part - new_top) for part in logits)
        top[...] = new_top

    (add_exponentials if len(carry) == 2 else add_terms)(*carry)

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish():
        if len(carry) == 1:
            value = jnp.sum(carry[0][...], axis=1, keepdims=True)
        else:
            top = jnp.max(carry[0][...], axis=1, keepdims=True)
            shares = carry[1][...] * jnp.exp(carry[0][...] - top)
            total = jnp.sum(shares, axis=1, keepdims=True)
            value = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
        out[...] = _out_of_lanes(value)


def _backward_kernel(
    scalars: Any,
    held_refs: Any,
    passing_refs: Any,
    *outputs_and_scratch: Any,
    is_sigmoid: bool,
    rows_are_held: bool,
) -> None:
    """Adds ``w g b`` to the held rows' gradient, or ``w g a`` to the held columns'.

    Held rows also get the sums of ``w g <a, b>`` and of ``w g`` over the columns: their shares of
    the scale's and the bias's gradient.
    """
    count = 3 if rows_are_held else 1
    gradient_out, *shares_out = outputs_and_scratch[:count]
    marks, gradient, *shares = outputs_and_scratch[count:]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _start():
        for name, mark in marks.items():
            mark[...] = _into_lanes(held_refs[name][...])
        for ref in (gradient, *shares):
            ref[...] = jnp.zeros_like(ref)

    held = {name: mark[...] for name, mark in marks.items()}
    passing = {name: ref[...] for name, ref in passing_refs.items() if name != "vectors"}
    vectors = passing_refs["vectors"][...]
    products = _products(held_refs["vectors"][...], vectors)
    weights = []
    for _, part, first, second in _slices(products, held, passing):
        row = first if rows_are_held else second
        mask = entries.counted(entries.marks_of(first), entries.marks_of(second))
        if is_sigmoid:
            logits = scalars[0] * part + scalars[1]
            weight = entries.sigmoid_weight(logits, first, second, mask)
        else:
            weight = entries.softmax_weight(scalars[0] * part, row["value"], mask)
        weight = weight * row["cotangent"]
        for share, term in zip(shares, (weight * part, weight), strict=False):
            share[...] += term
        weights.append(weight.astype(vectors.dtype))
    gradient[...] += _matmul(jnp.concatenate(weights, axis=1), vectors, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish():
        gradient_out[...] = scalars[0] * gradient[...]
        for ref, share in zip(shares_out, shares, strict=True):
            ref[...] = _out_of_lanes(jnp.sum(share[...], axis=1, keepdims=True))


def _call(
    kernel: Any,
    held: Side,
    passing: Side,
    scalars: Array,
    blocks: Blocks,
    *,
    gradient: bool,
    lane_sums: int,
    matmuls: int,
) -> Sequence[Array]:
    """Runs a kernel over all blocks; returns [gradient] (if any) and the [1, held] results."""
    size, dim = held["vectors"].shape
    others = len(passing["vectors"])
    stationary, streamed = blocks["stationary"], blocks["streamed"]

    def flat(side: Side) -> Side:
        return {name: x if x.ndim == 2 else x[None, :] for name, x in side.items()}

    def specs(side: Side, block: int, axis: int) -> dict[str, pl.BlockSpec]:
        return {
            name: pl.BlockSpec((block, dim), lambda i, j: ((i, j)[axis], 0))
            if name == "vectors"
            else pl.BlockSpec((1, block), lambda i, j: (0, (i, j)[axis]))
            for name in side
        }

    results = [jax.ShapeDtypeStruct((1, size), jnp.float32)] * (lane_sums if gradient else 1)
    result_specs = [pl.BlockSpec((1, stationary), lambda i, j: (0, i))] * len(results)
    per_lane = pltpu.VMEM((stationary, LANES), jnp.float32)
    scratch = [
        {
            name: pltpu.VMEM((stationary, LANES), x.dtype)
            for name, x in held.items()
            if name != "vectors"
        }
    ]
    if gradient:
        results.insert(0, jax.ShapeDtypeStruct((size, dim), jnp.float32))
        result_specs.insert(0, pl.BlockSpec((stationary, dim), lambda i, j: (i, 0)))
        scratch.append(pltpu.VMEM((stationary, dim), jnp.float32))
    scratch += [per_lane] * lane_sums
    itemsize = held["vectors"].dtype.itemsize
    cost = pl.CostEstimate(
        flops=matmuls * 2 * size * others * dim,
        transcendentals=size * others,
        bytes_accessed=(size + size // stationary * others) * dim * itemsize
        + sum(math.prod(result.shape) * 4 for result in results),
    )
    return pl.pallas_call(
        kernel,
        grid=(size // stationary, others // streamed),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            specs(held, stationary, 0),
            specs(passing, streamed, 1),
        ],
        out_specs=result_specs,
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost,
    )(scalars, flat(held), flat(passing))


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
        blocks: ``{"stationary": rows, "streamed": columns}`` of a block, multiples of 128; by
            default what ``tuning`` knows.
    """
    operands.check_types(rows, columns, "pallas_tpu")
    dtype, count = operands.vectors_dtype(rows, columns), len(rows["vectors"])
    dim = rows["vectors"].shape[1]
    blocks = _blocks("forward", blocks, count, len(columns["vectors"]), dim, dtype)
    held = operands.prepare(rows, dtype, blocks["stationary"], LANES, mark=False)
    passing = operands.prepare(columns, dtype, blocks["streamed"], LANES, mark=True)
    (value,) = _call(
        _forward_kernel,
        held,
        passing,
        _scalars(scale, bias),
        blocks,
        gradient=False,
        lane_sums=2 if bias is None else 1,
        matmuls=1,
    )
    return value[0, :count]


def backward(
    rows: Side,
    columns: Side,
    scale: Array,
    bias: Array | None,
    *,
    blocks: Blocks | None = None,
) -> Gradients:
    """See ``streamed.Engine``; ``blocks`` as in ``forward``, for both kernels."""
    operands.check_types(rows, columns, "pallas_tpu")
    dtype = operands.vectors_dtype(rows, columns)
    dim = rows["vectors"].shape[1]

    def of(held: Side, passing: Side, rows_are_held: bool) -> Sequence[Array]:
        sizes = len(held["vectors"]), len(passing["vectors"])
        chosen = _blocks("backward", blocks, *sizes, dim, dtype)
        held = operands.prepare(held, dtype, chosen["stationary"], LANES, mark=False)
        passing = operands.prepare(passing, dtype, chosen["streamed"], LANES, mark=rows_are_held)
        kernel = functools.partial(
            _backward_kernel, is_sigmoid=bias is not None, rows_are_held=rows_are_held
        )
        return _call(
            kernel,
            held,
            passing,
            _scalars(scale, bias),
            chosen,
            gradient=True,
            lane_sums=2 if rows_are_held else 0,
            matmuls=2,
        )

    of_rows, of_scale, of_bias = of(rows, columns, True)
    (of_columns,) = of(columns, rows, False)
    return (
        of_rows[: len(rows["vectors"]), :dim],
        of_columns[: len(columns["vectors"]), :dim],
        jnp.sum(of_scale),
        None if bias is None else jnp.sum(of_bias),
    )
