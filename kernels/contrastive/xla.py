"""The two passes in blocks of plain XLA: linear memory, exact.

On one device the backward pass computes each block of logits once and adds to both gradients. Where
a mesh partitions the arrays automatically that would sum over devices inside the loop: there rows
are cut into strided blocks (row ``c * blocks + k`` belongs to block ``k``), which leaves every
device an equal part of every block, columns are replicated once, and the two gradients come from
two passes: an extra matmul, and no communication in a loop.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from repalign.kernels.contrastive import entries
from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.reference import as_float, inner_products
from repalign.kernels.contrastive.streamed import Gradients

BLOCK = 1024
"""The largest number of rows, and of columns, in a block: 4 MiB of float32 logits."""


def is_automatic() -> bool:
    """Whether a mesh of several devices is in force that partitions arrays automatically."""
    return _mesh_is(AxisType.Auto)


def is_explicit() -> bool:
    """Whether a mesh of several devices is in force on which types say how arrays are split."""
    return _mesh_is(AxisType.Explicit)


def _mesh_is(wanted: AxisType) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return False
    return all(kind == wanted for kind in mesh.axis_types)


def replicate(side: Any) -> Any:
    """Gathers arrays onto every device of the mesh in force; inside ``jax.shard_map`` none is."""
    if is_explicit():
        return jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec()), side)
    return lax.with_sharding_constraint(side, PartitionSpec()) if is_automatic() else side


def tiling(length: int) -> tuple[int, int]:
    """Returns the number of blocks and their size; together they may exceed the length."""
    blocks = -(-length // BLOCK)
    return blocks, -(-length // blocks)


def cut(side: Side, *, strided: bool) -> Side:
    """Pads the leading axis with zeros and splits it into [blocks, block, ...]."""
    length = len(side["vectors"])
    blocks, size = tiling(length)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * size - length)] + [(0, 0)] * (x.ndim - 1))
        if strided:
            return jnp.swapaxes(x.reshape(size, blocks, *x.shape[1:]), 0, 1)
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(split, side)


def join(x: Array, length: int, *, strided: bool) -> Array:
    """Undoes ``cut``."""
    x = jnp.swapaxes(x, 0, 1) if strided else x
    return x.reshape(-1, *x.shape[2:])[:length]


def stream(
    rows: Side,
    columns: Side,
    start: Callable[[Array], Any],
    step: Callable[[Any, Array, Side, Side], Any],
) -> Any:
    """Folds every block of columns into every block of rows.

    Args:
        rows: what is known of the rows.
        columns: what is known of the columns.
        start: takes a block of row vectors to the first carry, arrays with one entry per row.
        step: takes (carry, inner products, row block, column block) to the next carry.

    Returns:
        The last carries, one entry per row.
    """
    length = len(rows["vectors"])
    column_blocks = cut(replicate(columns), strided=False)

    def fold_columns(row: Side) -> Any:
        def fold(carry: Any, column: Side) -> tuple[Any, None]:
            products = inner_products(row["vectors"], column["vectors"])
            return step(carry, products, row, column), None

        return lax.scan(fold, start(row["vectors"]), column_blocks)[0]

    carries = lax.map(fold_columns, cut(rows, strided=True))
    return jax.tree.map(lambda x: join(x, length, strided=True), carries)


def prepare(rows: Side, columns: Side) -> tuple[Side, Side]:
    """Takes vectors to the type that is computed in; marks the padding that ``cut`` will add."""
    rows = rows | {"vectors": as_float(rows["vectors"])}
    columns = columns | {"vectors": as_float(columns["vectors"])}
    length = len(columns["vectors"])
    if "where" not in columns and math.prod(tiling(length)) > length:
        columns["where"] = jnp.ones(length, bool)
    return rows, columns


def along(first: Side, second: Side) -> tuple[Side, Side]:
    """Shapes the marks of two blocks so that they broadcast against their inner products."""
    return (
        {name: x[:, None] for name, x in entries.marks_of(first).items()},
        {name: x[None, :] for name, x in entries.marks_of(second).items()},
    )


def forward(rows: Side, columns: Side, scale: Array, bias: Array | None) -> Array:
    """See ``streamed.Engine``."""
    rows, columns = prepare(rows, columns)

    def start(vectors: Array) -> tuple[Array, Array]:
        return jnp.full_like(vectors[:, 0], -jnp.inf), jnp.zeros_like(vectors[:, 0])

    def add_exponentials(carry: Any, products: Array, row: Side, column: Side) -> Any:
        top, total = carry
        mask = entries.counted(*along(row, column))
        logits = entries.masked(mask, scale * products, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # A row of which nothing has been counted yet has no finite maximum to subtract.
        shift = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        total = total * jnp.exp(top - shift) + jnp.sum(jnp.exp(logits - shift[:, None]), axis=1)
        return new_top, total

    def add_terms(total: Array, products: Array, row: Side, column: Side) -> Array:
        first, second = along(row, column)
        mask = entries.counted(first, second)
        logits = scale * products + bias
        return total + jnp.sum(entries.sigmoid_term(logits, first, second, mask), axis=1)

    if bias is not None:
        return stream(rows, columns, lambda x: jnp.zeros_like(x[:, 0]), add_terms)
    top, total = stream(rows, columns, start, add_exponentials)
    return top + jnp.log(jnp.where(total > 0, total, 1.0))


def backward(rows: Side, columns: Side, scale: Array, bias: Array | None) -> Gradients:
    """See ``streamed.Engine``."""
    rows, columns = prepare(rows, columns)
    cotangent = rows["cotangent"]

    def weigh(products: Array, values: Array, first: Side, second: Side) -> Array:
        first, second = along(first, second)
        mask = entries.counted(first, second)
        if bias is None:
            return entries.softmax_weight(scale * products, values, mask)
        return entries.sigmoid_weight(scale * products + bias, first, second, mask)

    def into_rows(carry: Any, products: Array, row: Side, column: Side) -> Any:
        weights = weigh(products, row["value"][:, None], row, column)
        attended = jnp.matmul(weights, column["vectors"], precision=lax.Precision.HIGHEST)
        return carry[0] + attended, carry[1] + jnp.sum(weights, axis=1)

    def into_columns(carry: Array, products: Array, column: Side, row: Side) -> Array:
        weights = weigh(products, row["value"][None, :], column, row) * row["cotangent"][None, :]
        return carry + jnp.matmul(weights, row["vectors"], precision=lax.Precision.HIGHEST)

    def in_two_passes() -> tuple[Array, Array, Array]:
        attended, mass = stream(
            rows, columns, lambda x: (jnp.zeros_like(x), jnp.zeros_like(x[:, 0])), into_rows
        )
        return attended, mass, stream(columns, rows, jnp.zeros_like, into_columns)

    def in_one_pass() -> tuple[Array, Array, Array]:
        column_blocks = cut(columns, strided=False)

        def fold_rows(of_columns: Array, row: Side) -> Any:
            def fold(carry: Any, block: tuple[Side, Array]) -> tuple[Any, Array]:
                column, of_column = block
                products = inner_products(row["vectors"], column["vectors"])
                weights = weigh(products, row["value"][:, None], row, column)
                attended = jnp.matmul(weights, column["vectors"], precision=lax.Precision.HIGHEST)
                scaled = row["vectors"] * row["cotangent"][:, None]
                of_column += jnp.matmul(weights.T, scaled, precision=lax.Precision.HIGHEST)
                return (carry[0] + attended, carry[1] + jnp.sum(weights, axis=1)), of_column

            start = (jnp.zeros_like(row["vectors"]), jnp.zeros_like(row["cotangent"]))
            carry, of_columns = lax.scan(fold, start, (column_blocks, of_columns))
            return of_columns, carry

        of_columns, (attended, mass) = lax.scan(
            fold_rows, jnp.zeros_like(column_blocks["vectors"]), cut(rows, strided=False)
        )
        return (
            join(attended, len(rows["vectors"]), strided=False),
            join(mass, len(cotangent), strided=False),
            join(of_columns, len(columns["vectors"]), strided=False),
        )

    attended, mass, of_columns = in_two_passes() if is_automatic() else in_one_pass()
    attended = attended * cotangent[:, None]
    return (
        scale * attended,
        scale * of_columns,
        jnp.sum(rows["vectors"] * attended),
        None if bias is None else jnp.sum(mass * cotangent),
    )
