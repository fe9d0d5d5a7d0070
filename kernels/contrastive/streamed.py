"""The two reductions with memory linear in the batch: a forward pass, and one that recomputes.

An engine computes both passes for one device; ``Ring`` makes one for many devices of it.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax

from repalign.kernels.contrastive.entries import Side
from repalign.kernels.contrastive.reference import Ids

Gradients = tuple[Array, Array, Array, Array | None]
"""By the rows' and the columns' vectors, the scale, and the bias (None without one)."""


@runtime_checkable
class Engine(Protocol):
    """A module (or ``Ring``) with the two passes. A bias selects the sigmoid loss."""

    def forward(self, rows: Side, columns: Side, scale: Array, bias: Array | None) -> Array:
        """Returns the value of every row."""

    def backward(self, rows: Side, columns: Side, scale: Array, bias: Array | None) -> Gradients:
        """Returns the gradients; ``rows`` also holds each row's finite ``value`` and ``cotangent``.

        With ``w_ij`` the derivative of row i's value by its logit and ``g`` the cotangent:
        ``da_i = scale g_i sum_j w_ij b_j``, ``db_j = scale sum_i g_i w_ij a_i``,
        ``dscale = sum_ij g_i w_ij <a_i, b_j>``, ``dbias = sum_ij g_i w_ij``.
        """


class Ring(NamedTuple):
    """The columns of all devices along a mesh axis, which travel past the rows of each.

    For use under ``jax.shard_map``: every device holds its rows and its part of the columns, and
    passes columns on to the next one while it works on them. In the backward pass the gradient of a
    part travels with it, so that it arrives complete where it belongs.

    Attributes:
        engine: computes the block of a device's rows and the columns that are visiting.
        axis: name of the mesh axis (or names, of which the product is the ring).
    """

    engine: Engine
    axis: str | tuple[str, ...]

    def forward(self, rows: Side, columns: Side, scale: Array, bias: Array | None) -> Array:
        """Returns the values of this device's rows over the columns of all devices."""

        def visit(state, _):
            value, columns = state
            passed_on = self._pass_on(columns)
            part = self.engine.forward(rows, columns, scale, bias)
            return (jnp.logaddexp(value, part) if bias is None else value + part, passed_on), None

        # The first block stands outside the loop and gives it values that vary over the devices.
        first = self.engine.forward(rows, columns, scale, bias)
        state = (first, self._pass_on(columns))
        return lax.scan(visit, state, length=lax.axis_size(self.axis) - 1)[0][0]

    def backward(self, rows: Side, columns: Side, scale: Array, bias: Array | None) -> Gradients:
        """Returns the gradients for this device's rows and columns, and its rows' share of both."""

        def visit(state, _):
            (of_rows, of_columns, of_scale, of_bias), columns = state
            of_columns, passed_on = self._pass_on(of_columns), self._pass_on(columns)
            part = self.engine.backward(rows, columns, scale, bias)
            total = jax.tree.map(jnp.add, (of_rows, of_columns, of_scale, of_bias), part)
            return (total, passed_on), None

        state = (self.engine.backward(rows, columns, scale, bias), self._pass_on(columns))
        length = lax.axis_size(self.axis) - 1
        (of_rows, of_columns, *of_scalars), _ = lax.scan(visit, state, length=length)[0]
        return of_rows, self._pass_on(of_columns), *of_scalars

    def _pass_on(self, x):
        size = lax.axis_size(self.axis)
        return lax.ppermute(x, self.axis, [(i, (i + 1) % size) for i in range(size)])


def log_sum_exp(
    engine: Engine,
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: Array | None,
) -> Array:
    """``reference.log_sum_exp`` in O((M + N) D) memory."""
    a, b, scale = alike(a, b, scale)
    return _reduce(engine, a, b, scale, None, *marks(where, exclude=exclude, include=include))


def sigmoid_loss(
    engine: Engine,
    a: Array,
    b: Array,
    scale: Array,
    bias: Array,
    positive: Ids,
    where: Array | None,
) -> Array:
    """``reference.sigmoid_loss`` in O((M + N) D) memory."""
    a, b, scale, bias = alike(a, b, scale, bias)
    return _reduce(engine, a, b, scale, bias, *marks(where, positive=positive))


def alike(*arrays: Array) -> list[Array]:
    """Marks arrays as varying over every mesh axis that one of them varies over.

    So their gradients may vary, too; the gradient of the mark is the sum over the devices.
    """
    axes = frozenset().union(*(_varying(x) for x in arrays))
    missing = [tuple(axes - _varying(x)) for x in arrays]
    return [
        lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(arrays, missing, strict=True)
    ]


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def marks(where: Array | None, **ids: Ids | None) -> tuple[Side, Side]:
    given = {name: pair for name, pair in ids.items() if pair is not None}
    rows = {name: pair[0] for name, pair in given.items()}
    columns = {name: pair[1] for name, pair in given.items()}
    return rows, columns if where is None else columns | {"where": where}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(
    engine: Engine,
    a: Array,
    b: Array,
    scale: Array,
    bias: Array | None,
    row_marks: Side,
    column_marks: Side,
) -> Array:
    return engine.forward({"vectors": a} | row_marks, {"vectors": b} | column_marks, scale, bias)


def _forward(engine, a, b, scale, bias, row_marks, column_marks):
    value = _reduce(engine, a, b, scale, bias, row_marks, column_marks)
    return value, (a, b, scale, bias, row_marks, column_marks, value)


def _backward(engine, residuals, cotangent):
    a, b, scale, bias, row_marks, column_marks, value = residuals
    # A row without columns (value -inf) has no gradient; 0 keeps its masked logits finite.
    value = jnp.where(jnp.isfinite(value), value, 0.0)
    rows = {"vectors": a, "value": value, "cotangent": cotangent} | row_marks
    columns = {"vectors": b} | column_marks
    of_rows, of_columns, of_scale, of_bias = engine.backward(rows, columns, scale, bias)
    return of_rows.astype(a.dtype), of_columns.astype(b.dtype), of_scale, of_bias, None, None


_reduce.defvjp(_forward, _backward)
