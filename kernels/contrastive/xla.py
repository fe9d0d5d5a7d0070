"""The two passes in blocks of plain XLA: linear memory, exact.

On one device they are those of ``sweep``, where the backward pass computes each block of logits
once and adds to both gradients. Where a mesh partitions the arrays automatically that would sum
over devices inside the loop: there rows are cut into strided blocks (row ``c * blocks + k`` belongs
to block ``k``), which leaves every device an equal part of every block, columns are replicated
once, and the two gradients come from two passes: an extra matmul, and no communication in a loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from repalign.kernels.contrastive import entries, sweep
from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.reference import inner_products
from repalign.kernels.contrastive.streamed import Gradients


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


def cut_strided(side: Side) -> Side:
    """``sweep.cut`` with every ``blocks``-th entry of the leading axis in one block."""
    length = len(side["vectors"])
    blocks, size = sweep.tiling(length)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * size - length)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(size, blocks, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, side)


def join_strided(x: Array, length: int) -> Array:
    """Undoes ``cut_strided``."""
    return sweep.join(jnp.swapaxes(x, 0, 1), length)


def stream(
    rows: Side,
    columns: Side,
    start: Callable[[Array], Any],
    step: Callable[[Any, Array, Side, Side], Any],
) -> Any:
    """Folds every block of columns into every strided block of rows.

    Args:
        rows: what is known of the rows.
        columns: what is known of the columns.
        start: takes a block of row vectors to the first carry, arrays with one entry per row.
        step: takes (carry, inner products, row block, column block) to the next carry.

    Returns:
        The last carries, one entry per row.
    """
    length = len(rows["vectors"])
    column_blocks = sweep.cut(replicate(columns))

    def fold_columns(row: Side) -> Any:
        def fold(carry: Any, column: Side) -> tuple[Any, None]:
            products = inner_products(row["vectors"], column["vectors"])
            return step(carry, products, row, column), None

        return lax.scan(fold, start(row["vectors"]), column_blocks)[0]

    carries = lax.map(fold_columns, cut_strided(rows))
    return jax.tree.map(lambda x: join_strided(x, length), carries)


def forward(rows: Side, columns: Side, scale: Array, bias: Array | None) -> Array:
    """See ``streamed.Engine``."""
    if not (is_automatic() or is_explicit()):
        matrix = sweep.Matrix(rows, columns, scale, marked=False)
        return sweep.forward(matrix, bias, both=False)[0]
    rows, columns = sweep.prepare(rows, mark=False), sweep.prepare(columns, mark=True)

    def add_exponentials(sums: sweep.Sums, products: Array, row: Side, column: Side) -> sweep.Sums:
        mask = entries.counted(*sweep.along(row, column))
        return sweep.add_exponentials(sums, entries.masked(mask, scale * products, -jnp.inf), 1)

    def add_terms(total: Array, products: Array, row: Side, column: Side) -> Array:
        first, second = sweep.along(row, column)
        mask = entries.counted(first, second)
        logits = scale * products + bias
        return total + jnp.sum(entries.sigmoid_term(logits, first, second, mask), axis=1)

    if bias is not None:
        return stream(rows, columns, lambda x: jnp.zeros_like(x[:, 0]), add_terms)
    sums = stream(rows, columns, lambda x: sweep.no_sums(x[:, 0]), add_exponentials)
    return sweep.logarithm(sums)


def backward(rows: Side, columns: Side, scale: Array, bias: Array | None) -> Gradients:
    """See ``streamed.Engine``."""
    if not (is_automatic() or is_explicit()):
        matrix = sweep.Matrix(rows, columns, scale, marked=False)
        return sweep.backward(matrix, bias, both=False)
    rows, columns = sweep.prepare(rows, mark=False), sweep.prepare(columns, mark=True)
    cotangent = rows["cotangent"]

    def weigh(products: Array, values: Array, first: Side, second: Side) -> Array:
        first, second = sweep.along(first, second)
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

    attended, mass = stream(
        rows, columns, lambda x: (jnp.zeros_like(x), jnp.zeros_like(x[:, 0])), into_rows
    )
    of_columns = stream(columns, rows, jnp.zeros_like, into_columns)
    attended = attended * cotangent[:, None]
    return (
        scale * attended,
        scale * of_columns,
        jnp.sum(rows["vectors"] * attended),
        None if bias is None else jnp.sum(mass * cotangent),
    )
