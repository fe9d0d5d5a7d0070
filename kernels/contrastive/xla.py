"""The two reductions in blocks: linear memory, exact, with a backward pass that recomputes.

Rows are cut into strided blocks (row ``c * blocks + k`` belongs to block ``k``), so that a batch
sharded over devices leaves every device an equal part of every block; columns are replicated once
and cut into contiguous blocks. The two gradients come from two passes, one that streams columns
past the rows and one that streams rows past the columns: an extra matmul, but no sum over devices
inside a loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from repalign.kernels.contrastive.reference import Ids, inner_products, matches

BLOCK = 1024
"""The largest number of rows, and of columns, in a block: 4 MiB of float32 logits."""

Side = dict[str, Array]
"""What is known of every row, or of every column: ``vectors``, and any ids and masks."""


def replicate(side: Any) -> Any:
    """Gathers arrays onto every device of the mesh in force, if there is one in automatic mode."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return side
    return lax.with_sharding_constraint(side, PartitionSpec())


def cut(side: Side, *, strided: bool) -> Side:
    """Pads the leading axis with zeros and splits it into [blocks, block, ...]."""
    length = len(side["vectors"])
    blocks = -(-length // BLOCK)
    size = -(-length // blocks)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * size - length)] + [(0, 0)] * (x.ndim - 1))
        if strided:
            return jnp.swapaxes(x.reshape(size, blocks, *x.shape[1:]), 0, 1)
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(split, side)


def stream(
    rows: Side,
    columns: Side,
    start: Callable[[Array], Any],
    step: Callable[[Any, Array, Side, Side], Any],
) -> Any:
    """Folds every block of columns into every block of rows.

    Args:
        rows: what is known of the rows.
        columns: what is known of the columns; ``real`` is added, False on padding.
        start: takes a block of row vectors to the first carry, arrays with one entry per row.
        step: takes (carry, inner products, row block, column block) to the next carry.

    Returns:
        The last carries, one entry per row.
    """
    length = len(rows["vectors"])
    columns = replicate(columns | {"real": jnp.ones(len(columns["vectors"]), bool)})
    column_blocks = cut(columns, strided=False)

    def fold_columns(row: Side) -> Any:
        def fold(carry: Any, column: Side) -> tuple[Any, None]:
            products = inner_products(row["vectors"], column["vectors"])
            return step(carry, products, row, column), None

        return lax.scan(fold, start(row["vectors"]), column_blocks)[0]

    def join(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:length]

    return jax.tree.map(join, lax.map(fold_columns, cut(rows, strided=True)))


def counted(row: Side, column: Side) -> Array:
    """Returns the mask of a block's counted entries; either side may be the rows of the matrix."""
    mask = jnp.broadcast_to(column["real"][None, :], (len(row["vectors"]), len(column["vectors"])))
    if "exclude" in row:
        mask &= ~matches((row["exclude"], column["exclude"]))
    if "include" in row:
        mask &= matches((row["include"], column["include"]))
    if "where" in row:
        mask &= row["where"][:, None]
    if "where" in column:
        mask &= column["where"][None, :]
    return mask


def sides(a: Array, b: Array, where: Array | None, **ids: Ids | None) -> tuple[Side, Side]:
    """Sorts the arguments into what belongs to the rows and what belongs to the columns."""
    given = {name: pair for name, pair in ids.items() if pair is not None}
    rows = {"vectors": a} | {name: pair[0] for name, pair in given.items()}
    columns = {"vectors": b} | {name: pair[1] for name, pair in given.items()}
    return rows, columns if where is None else columns | {"where": where}


def gradients(
    rows: Side,
    columns: Side,
    scale: Array,
    slope: Callable[[Array, Array, Side, Side], Array],
    cotangent: Array,
) -> tuple[Array, Array, Array, Array]:
    """Returns the gradients for rows, columns, scale and bias of a sum over columns.

    With ``w_ij`` the derivative of row i's value by its logit: ``da_i = scale g_i sum_j w_ij b_j``,
    ``db_j = scale sum_i g_i w_ij a_i``, ``dscale = sum_ij g_i w_ij <a_i, b_j>`` and
    ``dbias = sum_ij g_i w_ij``.

    Args:
        slope: takes (inner products, rows' values as a broadcastable array, first side, second
            side) to ``w``.
    """
    rows = rows | {"cotangent": cotangent}

    def into_rows(carry: Any, products: Array, row: Side, column: Side) -> Any:
        weights = slope(products, row["value"][:, None], row, column)
        products = jnp.matmul(weights, column["vectors"], precision=lax.Precision.HIGHEST)
        return carry[0] + products, carry[1] + jnp.sum(weights, axis=1)

    def into_columns(carry: Array, products: Array, column: Side, row: Side) -> Array:
        weights = slope(products, row["value"][None, :], column, row) * row["cotangent"][None, :]
        return carry + jnp.matmul(weights, row["vectors"], precision=lax.Precision.HIGHEST)

    attended, mass = stream(
        rows, columns, lambda x: (jnp.zeros_like(x), jnp.zeros_like(x[:, 0])), into_rows
    )
    attended = attended * cotangent[:, None]
    grad_columns = scale * stream(columns, rows, jnp.zeros_like, into_columns)
    grad_scale = jnp.sum(rows["vectors"] * attended)
    return scale * attended, grad_columns, grad_scale, jnp.sum(mass * cotangent)


@jax.custom_vjp
def log_sum_exp(
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: Array | None,
) -> Array:
    """``reference.log_sum_exp`` in O((M + N) D) memory."""
    rows, columns = sides(a, b, where, exclude=exclude, include=include)

    def start(vectors: Array) -> tuple[Array, Array]:
        return jnp.full_like(vectors[:, 0], -jnp.inf), jnp.zeros_like(vectors[:, 0])

    def step(carry: Any, products: Array, row: Side, column: Side) -> Any:
        top, total = carry
        logits = jnp.where(counted(row, column), scale * products, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # A row of which nothing has been counted yet has no finite maximum to subtract.
        shift = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        total = total * jnp.exp(top - shift) + jnp.sum(jnp.exp(logits - shift[:, None]), axis=1)
        return new_top, total

    top, total = stream(rows, columns, start, step)
    return top + jnp.log(jnp.where(total > 0, total, 1.0))


def _log_sum_exp_forward(a, b, scale, exclude, include, where):
    value = log_sum_exp(a, b, scale, exclude, include, where)
    return value, (a, b, scale, exclude, include, where, value)


def _log_sum_exp_backward(residuals, cotangent):
    a, b, scale, exclude, include, where, value = residuals
    rows, columns = sides(a, b, where, exclude=exclude, include=include)
    # An empty row (value -inf) has no gradient; 0 keeps its masked logits finite.
    rows["value"] = jnp.where(jnp.isfinite(value), value, 0.0)

    def slope(products: Array, value: Array, first: Side, second: Side) -> Array:
        return jnp.exp(jnp.where(counted(first, second), scale * products - value, -jnp.inf))

    grads = gradients(rows, columns, scale, slope, cotangent)
    return *grads[:3], None, None, None


log_sum_exp.defvjp(_log_sum_exp_forward, _log_sum_exp_backward)


@jax.custom_vjp
def sigmoid_loss(
    a: Array, b: Array, scale: Array, bias: Array, positive: Ids, where: Array | None
) -> Array:
    """``reference.sigmoid_loss`` in O((M + N) D) memory."""
    rows, columns = sides(a, b, where, positive=positive)

    def step(carry: Array, products: Array, row: Side, column: Side) -> Array:
        logits = scale * products + bias
        is_positive = matches((row["positive"], column["positive"]))
        terms = jax.nn.softplus(jnp.where(is_positive, -logits, logits))
        return carry + jnp.sum(jnp.where(counted(row, column), terms, 0.0), axis=1)

    return stream(rows, columns, lambda x: jnp.zeros_like(x[:, 0]), step)


def _sigmoid_loss_forward(a, b, scale, bias, positive, where):
    return sigmoid_loss(a, b, scale, bias, positive, where), (a, b, scale, bias, positive, where)


def _sigmoid_loss_backward(residuals, cotangent):
    a, b, scale, bias, positive, where = residuals
    rows, columns = sides(a, b, where, positive=positive)
    rows["value"] = jnp.zeros_like(cotangent)

    def slope(products: Array, _: Array, first: Side, second: Side) -> Array:
        logits = scale * products + bias
        is_positive = matches((first["positive"], second["positive"]))
        weights = jnp.where(is_positive, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
        return jnp.where(counted(first, second), weights, 0.0)

    return *gradients(rows, columns, scale, slope, cotangent), None, None


sigmoid_loss.defvjp(_sigmoid_loss_forward, _sigmoid_loss_backward)
