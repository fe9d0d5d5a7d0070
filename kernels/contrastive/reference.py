"""The two reductions of contrastive learning, written the obvious way: the whole matrix in memory.

Both take rows ``a`` [M, D] and columns ``b`` [N, D] and work on the logits
``s_ij = scale * <a_i, b_j>``, computed at the highest matmul precision. ``forward`` and
``backward`` are the same by hand, for one block of a ring.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from repalign.kernels.contrastive import entries
from repalign.kernels.contrastive.entries import Side

Ids = tuple[Array, Array]
"""An integer for each row and an integer for each column; an entry matches where the two agree."""


def inner_products(a: Array, b: Array) -> Array:
    """Returns ``a @ b.T`` at the highest precision."""
    return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)


def as_float(x: Array) -> Array:
    """Returns ``x`` in float32, or float64 if it is that already."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def matches(ids: Ids) -> Array:
    """Returns the [M, N] mask of the entries whose row id equals their column id."""
    return ids[0][:, None] == ids[1][None, :]


def log_sum_exp(
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: Array | None,
) -> Array:
    """Returns ``log sum_j exp(s_ij)`` over the counted columns of every row."""
    logits = scale * inner_products(as_float(a), as_float(b))
    mask = _counted(logits, exclude, include)
    if where is not None:
        mask &= where[None, :]
    return _masked_log_sum_exp(logits, mask, axis=1)


def log_sum_exp_both_ways(
    a: Array,
    b: Array,
    scale: Array,
    exclude: Ids | None,
    include: Ids | None,
    where: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Returns ``log_sum_exp`` of every row and of every column; ``where`` masks both."""
    logits = scale * inner_products(as_float(a), as_float(b))
    mask = _counted(logits, exclude, include)
    if where is not None:
        mask &= where[0][:, None] & where[1][None, :]
    return _masked_log_sum_exp(logits, mask, axis=1), _masked_log_sum_exp(logits, mask, axis=0)


def log_sum_exp_within(
    x: Array, scale: Array, exclude: Array | None, include: Array | None, where: Array | None
) -> Array:
    """Returns ``log_sum_exp`` of rows that are the columns, too; ``where`` masks both."""
    logits = scale * inner_products(as_float(x), as_float(x))
    pairs = [None if ids is None else (ids, ids) for ids in (exclude, include)]
    mask = _counted(logits, *pairs)
    if where is not None:
        mask &= where[:, None] & where[None, :]
    return _masked_log_sum_exp(logits, mask, axis=1)


def _counted(logits: Array, exclude: Ids | None, include: Ids | None) -> Array:
    mask = jnp.ones(logits.shape, bool)
    if exclude is not None:
        mask &= ~matches(exclude)
    return mask if include is None else mask & matches(include)


def _masked_log_sum_exp(logits: Array, mask: Array, *, axis: int) -> Array:
    top = lax.stop_gradient(jnp.max(jnp.where(mask, logits, -jnp.inf), axis=axis))
    empty = ~jnp.any(mask, axis=axis)
    top = jnp.where(empty, 0.0, top)
    # An entry that does not count is exp(0) before the outer where: no overflow, no NaN gradient.
    shifted = jnp.where(mask, logits - jnp.expand_dims(top, axis), 0.0)
    total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0.0), axis=axis)
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))


def sigmoid_loss(
    a: Array, b: Array, scale: Array, bias: Array, positive: Ids, where: Array | None
) -> Array:
    """Returns ``sum_j softplus(-y_ij (s_ij + bias))``, y = +1 where ids match, else -1."""
    logits = scale * inner_products(as_float(a), as_float(b)) + bias
    terms = jax.nn.softplus(jnp.where(matches(positive), -logits, logits))
    return jnp.sum(terms if where is None else jnp.where(where[None, :], terms, 0.0), axis=1)


def forward(rows: Side, columns: Side, scale: Array, bias: Array | None) -> Array:
    """Returns every row's value; with a bias, of the sigmoid loss, else of the log-sum-exp."""

    def ids(name: str) -> Ids | None:
        return (rows[name], columns[name]) if name in rows else None

    where = columns["where"] if "where" in columns else None
    a, b = rows["vectors"], columns["vectors"]
    if bias is None:
        return log_sum_exp(a, b, scale, ids("exclude"), ids("include"), where)
    return sigmoid_loss(a, b, scale, bias, ids("positive"), where)


def backward(
    rows: Side, columns: Side, scale: Array, bias: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Returns the gradients by the two sides' vectors, by the scale and by the bias (or None).

    ``rows`` holds each row's ``cotangent`` and its ``value`` over all columns, of which these may
    be a part.
    """
    a, b = as_float(rows["vectors"]), as_float(columns["vectors"])
    first = {name: x[:, None] for name, x in entries.marks_of(rows).items()}
    second = {name: x[None, :] for name, x in entries.marks_of(columns).items()}
    mask = entries.counted(first, second)
    products = inner_products(a, b)
    if bias is None:
        weights = entries.softmax_weight(scale * products, rows["value"][:, None], mask)
    else:
        weights = entries.sigmoid_weight(scale * products + bias, first, second, mask)
    weights = weights * rows["cotangent"][:, None]
    return (
        scale * jnp.matmul(weights, b, precision=lax.Precision.HIGHEST),
        scale * jnp.matmul(weights.T, a, precision=lax.Precision.HIGHEST),
        jnp.sum(weights * products),
        None if bias is None else jnp.sum(weights),
    )
