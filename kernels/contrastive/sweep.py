"""The reductions on one device: one sweep over the blocks of the matrix of pairs.

A block of logits is computed once a pass, and serves while it is in the cache: the values of its
rows and, where those have values, of its columns. Within one set of vectors a block above the
diagonal also stands for the one below, which is not visited. The gradient's sweep adds each block
of weights to both sides.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from repalign.kernels.contrastive import entries, streamed
from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.reference import Ids, as_float, inner_products

BLOCK = 1024
"""The largest number of rows, and of columns, in a block: 4 MiB of float32 logits."""

HELD_ENTRIES = 8192 * 8192
"""The largest matrix of logits that is held from the forward to the backward pass: 256 MiB."""

HELD_DIM = 512
"""The width of vectors from which on holding logits is faster than computing them again."""

ONE_WAY, BOTH_WAYS, WITHIN = "one way", "both ways", "within"
"""What has values: the rows; the rows and the columns; rows that are the columns as well."""


def tiling(length: int) -> tuple[int, int]:
    """Returns the number of blocks and their size; together they may exceed the length."""
    blocks = -(-length // BLOCK)
    return blocks, -(-length // blocks)


def cut(side: Side) -> Side:
    """Pads the leading axis with zeros and splits it into [blocks, block, ...]."""
    length = len(side["vectors"])
    blocks, size = tiling(length)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * size - length)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(split, side)


def join(x: Array, length: int) -> Array:
    """Undoes ``cut``."""
    return x.reshape(-1, *x.shape[2:])[:length]


def prepare(side: Side, *, mark: bool) -> Side:
    """Takes vectors to the type that is computed in; marks the padding that ``cut`` will add."""
    side = side | {"vectors": as_float(side["vectors"])}
    length = len(side["vectors"])
    if mark and "where" not in side and math.prod(tiling(length)) > length:
        side["where"] = jnp.ones(length, bool)
    return side


def along(first: Side, second: Side) -> tuple[Side, Side]:
    """Shapes the marks of two blocks so that they broadcast against their inner products."""
    return (
        {name: x[:, None] for name, x in entries.marks_of(first).items()},
        {name: x[None, :] for name, x in entries.marks_of(second).items()},
    )


Sums = tuple[Array, Array]
"""The largest logit, and the sum of exponentials relative to it."""


def no_sums(like: Array) -> Sums:
    """Returns empty sums in the shape of an array."""
    return jnp.full_like(like, -jnp.inf), jnp.zeros_like(like)


def add_exponentials(sums: Sums, logits: Array, axis: int) -> Sums:
    """Adds the exponentials along an axis."""
    top, total = sums
    new_top = jnp.maximum(top, jnp.max(logits, axis=axis))
    # Where nothing has been counted yet, there is no finite maximum to subtract.
    shift = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
    terms = jnp.exp(logits - jnp.expand_dims(shift, axis))
    return new_top, total * jnp.exp(top - shift) + jnp.sum(terms, axis=axis)


def logarithm(sums: Sums) -> Array:
    """Returns the logarithm of sums, -inf of empty ones."""
    top, total = sums
    return top + jnp.log(jnp.where(total > 0, total, 1.0))


class Matrix:
    """The blocks of a matrix of logits, without a bias: computed, or cut out of a held matrix.

    Args:
        rows: see ``entries``; may hold ``value`` and ``cotangent``.
        columns: the same; None within the rows.
        scale: of the inner products.
        marked: whether padding of the rows has to be marked, as columns have values too.
        held: a matrix from ``whole``, or None.
    """

    def __init__(
        self,
        rows: Side,
        columns: Side | None,
        scale: Array,
        *,
        marked: bool,
        held: Array | None = None,
    ):
        self.lengths = len(rows["vectors"]), len((columns or rows)["vectors"])
        self.rows = cut(prepare(rows, mark=marked))
        self.within, self.scale, self.held = columns is None, scale, held
        self.columns = self.rows if columns is None else cut(prepare(columns, mark=True))
        # Vectors are scaled, of which there are fewer than logits.
        self.scaled = scale * self.rows["vectors"]

    def whole(self) -> Array:
        """Returns the matrix to hold."""
        width = self.scaled.shape[-1]
        columns = self.columns["vectors"].reshape(-1, width)
        return inner_products(self.scaled.reshape(-1, width), columns)

    def block(self, i: Array, j: Array) -> tuple[Array, Side, Side]:
        """Returns logits, and what is known of their rows and of their columns."""
        row = {name: x[i] for name, x in self.rows.items()}
        column = {name: x[j] for name, x in self.columns.items()}
        if self.held is None:
            return inner_products(self.scaled[i], column["vectors"]), row, column
        size = len(row["vectors"]), len(column["vectors"])
        return lax.dynamic_slice(self.held, (i * size[0], j * size[1]), size), row, column

    def sweep(self, step: Callable[..., Any], state: Any, *, columns: bool) -> Any:
        """Folds ``step(state, i, j, columns)`` over all blocks.

        Within, these are the ones on the diagonal, which count for their rows only, and the ones
        above it, which count for their columns, too.
        """

        def visit(state: Any, pairs: Any, columns: bool) -> Any:
            def visit_one(state: Any, pair: Any) -> tuple[Any, None]:
                return step(state, *pair, columns), None

            return lax.scan(visit_one, state, tuple(pairs))[0] if len(pairs[0]) else state

        count = len(self.scaled)
        if self.within:
            state = visit(state, np.diag_indices(count), False)
            return visit(state, np.triu_indices(count, 1), True)
        every = np.indices((count, len(self.columns["vectors"])))
        return visit(state, every.reshape(2, -1), columns)


def forward(matrix: Matrix, bias: Array | None, *, both: bool) -> tuple[Array, Array]:
    """Returns the values of rows and of columns, which are without meaning unless ``both`` have.

    A bias selects the sigmoid loss. Within, only the first are complete.
    """
    each_row, each_column = (side["vectors"][..., 0] for side in (matrix.rows, matrix.columns))

    def add_terms(totals: Array, i: Array, j: Array, columns: bool) -> Array:
        logits, row, column = matrix.block(i, j)
        first, second = along(row, column)
        mask = entries.counted(first, second)
        terms = entries.sigmoid_term(logits + bias, first, second, mask)
        return _put(totals, i, totals[i] + jnp.sum(terms, axis=1))

    def add(state: tuple[Sums, Sums], i: Array, j: Array, columns: bool) -> tuple[Sums, Sums]:
        logits, row, column = matrix.block(i, j)
        logits = entries.masked(entries.counted(*along(row, column)), logits, -jnp.inf)

        def into(sums: Sums, index: Array, axis: int) -> Sums:
            top, total = add_exponentials((sums[0][index], sums[1][index]), logits, axis)
            return _put(sums[0], index, top), _put(sums[1], index, total)

        return into(state[0], i, 1), into(state[1], j, 0) if columns else state[1]

    if bias is not None:
        of_rows = matrix.sweep(add_terms, jnp.zeros_like(each_row), columns=False)
        of_columns = jnp.zeros_like(each_column)
    else:
        start = no_sums(each_row), no_sums(each_column)
        of_rows, of_columns = map(logarithm, matrix.sweep(add, start, columns=both))
        if matrix.within:
            of_rows = jnp.logaddexp(of_rows, of_columns)
    return join(of_rows, matrix.lengths[0]), join(of_columns, matrix.lengths[1])


def backward(
    matrix: Matrix, bias: Array | None, *, both: bool
) -> tuple[Array, Array | None, Array, Array | None]:
    """Returns the gradients by the vectors of rows and of columns, by the scale and by the bias.

    Rows hold their finite ``value`` and ``cotangent``, as do columns if ``both`` have values.
    Within, the first is by all vectors, and the second None.
    """
    # The columns' part is the sum of [dim, block] matrices: a product with the weights transposed
    # is slower.
    transposed = jnp.swapaxes(matrix.rows["vectors"], 1, 2)
    state = {
        "rows": jnp.zeros_like(matrix.rows["vectors"]),
        "columns": jnp.zeros_like(jnp.swapaxes(matrix.columns["vectors"], 1, 2)),
    }
    if bias is not None:
        state["bias"] = jnp.zeros_like(bias)

    def add(state: Side, i: Array, j: Array, columns: bool) -> Side:
        logits, row, column = matrix.block(i, j)
        first, second = along(row, column)
        mask = entries.counted(first, second)
        if bias is None:
            weights = entries.softmax_weight(logits, row["value"][:, None], mask)
        else:
            weights = entries.sigmoid_weight(logits + bias, first, second, mask)
        weights = weights * row["cotangent"][:, None]
        if both:
            of_column = entries.softmax_weight(logits, column["value"][None, :], mask)
            weights = weights + of_column * column["cotangent"][None, :]
        attended = _product(weights, column["vectors"])
        state = state | {"rows": _put(state["rows"], i, state["rows"][i] + attended)}
        if columns:
            attended = _product(transposed[i], weights)
            state["columns"] = _put(state["columns"], j, state["columns"][j] + attended)
        if bias is not None:
            state["bias"] += jnp.sum(weights)
        return state

    state = matrix.sweep(add, state, columns=True)
    of_bias = None if bias is None else state["bias"]
    of_rows = join(state["rows"], matrix.lengths[0])
    of_columns = join(jnp.swapaxes(state["columns"], 1, 2), matrix.lengths[1])
    vectors = join(matrix.rows["vectors"], matrix.lengths[0])
    if matrix.within:
        of_rows = of_rows + of_columns
        return matrix.scale * of_rows, None, 0.5 * jnp.sum(vectors * of_rows), of_bias
    return (
        matrix.scale * of_rows,
        matrix.scale * of_columns,
        jnp.sum(vectors * of_rows),
        of_bias,
    )


def _put(x: Array, index: Array, new: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, new, index, 0)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def log_sum_exp(
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: Array | None,
) -> Array:
    """``reference.log_sum_exp`` in blocks."""
    marks = streamed.marks(where, exclude=exclude, include=include)
    return _reduce(False, *streamed.alike(a, b, scale), None, *marks)[0]


def log_sum_exp_both_ways(
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """``reference.log_sum_exp_both_ways`` in blocks."""
    of_rows, of_columns = streamed.marks(None, exclude=exclude, include=include)
    if where is not None:
        of_rows, of_columns = of_rows | {"where": where[0]}, of_columns | {"where": where[1]}
    return _reduce(True, *streamed.alike(a, b, scale), None, of_rows, of_columns)


def log_sum_exp_within(
    x: Array, scale: Array, exclude: Array | None, include: Array | None, where: Array | None
) -> Array:
    """``reference.log_sum_exp_within`` in blocks, those below the diagonal left out."""
    marks = {"exclude": exclude, "include": include, "where": where}
    marks = {name: mark for name, mark in marks.items() if mark is not None}
    x, scale = streamed.alike(x, scale)
    return _reduce(True, x, None, scale, None, marks, {})[0]


def sigmoid_loss(
    a: Array, b: Array, scale: Array, bias: Array, positive: Ids, where: Array | None
) -> Array:
    """``reference.sigmoid_loss`` in blocks."""
    marks = streamed.marks(where, positive=positive)
    return _reduce(False, *streamed.alike(a, b, scale, bias), *marks)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(
    both: bool,
    a: Array,
    b: Array | None,
    scale: Array,
    bias: Array | None,
    row_marks: Side,
    column_marks: Side,
) -> tuple[Array, Array]:
    """Returns the values of rows and columns; columns None are the rows."""
    columns = None if b is None else {"vectors": b} | column_marks
    matrix = Matrix({"vectors": a} | row_marks, columns, scale, marked=both)
    return forward(matrix, bias, both=both)


def _forward(both, a, b, scale, bias, row_marks, column_marks):
    columns = None if b is None else {"vectors": b} | column_marks
    matrix = Matrix({"vectors": a} | row_marks, columns, scale, marked=both)
    if b is not None and len(a) * len(b) <= HELD_ENTRIES and a.shape[1] >= HELD_DIM:
        matrix.held = matrix.whole()
    values = forward(matrix, bias, both=both)
    return values, (a, b, scale, bias, row_marks, column_marks, values, matrix.held)


def _backward(both, residuals, cotangents):
    a, b, scale, bias, row_marks, column_marks, values, held = residuals
    scale = jnp.asarray(scale)  # jax hands a literal back as a number of its own kind.

    def side(vectors: Array, marks: Side, number: int) -> Side:
        # Where nothing counts (value -inf) there is no gradient; 0 keeps masked logits finite.
        value = jnp.where(jnp.isfinite(values[number]), values[number], 0.0)
        return {"vectors": vectors, "value": value, "cotangent": cotangents[number]} | marks

    rows = side(a, row_marks, 0)
    columns = None if b is None else side(b, column_marks, 1)
    matrix = Matrix(rows, columns, scale, marked=both, held=held)
    of_a, of_b, of_scale, of_bias = backward(matrix, bias, both=both)
    of_b = None if b is None else of_b.astype(b.dtype)
    return of_a.astype(a.dtype), of_b, of_scale, of_bias, None, None


_reduce.defvjp(_forward, _backward)
