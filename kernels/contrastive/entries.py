"""What one entry of the matrix of pairs contributes; every implementation computes it from here.

A ``Side`` holds what is known of every row, or of every column: ``vectors``, and as far as the
caller gave them ``exclude``, ``include``, ``positive`` (integers) and ``where``. The functions take
the same names, as arrays that broadcast against a block of inner products, and do not care which of
the two sides runs along which axis.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

Side = dict[str, Array]
Marks = Mapping[str, Array]


def marks_of(side: Side) -> Side:
    """Returns the integers and masks of a side, without its vectors and what belongs to rows."""
    return {
        name: side[name] for name in ("exclude", "include", "positive", "where") if name in side
    }


def counted(first: Marks, second: Marks) -> Array | None:
    """Returns the mask of the entries that count, or None where all of them do."""
    masks = []
    if "exclude" in first:
        masks.append(first["exclude"] != second["exclude"])
    if "include" in first:
        masks.append(first["include"] == second["include"])
    masks += [side["where"] != 0 for side in (first, second) if "where" in side]
    if not masks:
        return None
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    return mask


def masked(mask: Array | None, x: Array, otherwise: float) -> Array:
    """Returns ``x``, with ``otherwise`` in the entries that do not count."""
    return x if mask is None else jnp.where(mask, x, otherwise)


def softmax_weight(logits: Array, value: Array, mask: Array | None) -> Array:
    """Returns ``exp(s - value)``, the derivative of a log-sum-exp by its logit."""
    return jnp.exp(masked(mask, logits - value, -jnp.inf))


def sigmoid_term(logits: Array, first: Marks, second: Marks, mask: Array | None) -> Array:
    """Returns ``softplus(-y s)``, y = +1 where the ids agree and -1 elsewhere."""
    signed = jnp.where(first["positive"] == second["positive"], -logits, logits)
    small = jnp.exp(-jnp.abs(signed))
    return masked(mask, jnp.maximum(signed, 0.0) + log_one_plus(small), 0.0)


def sigmoid_weight(logits: Array, first: Marks, second: Marks, mask: Array | None) -> Array:
    """Returns the derivative of ``sigmoid_term`` by its logit: ``sigmoid(s)``, minus 1 if y = 1."""
    is_positive = first["positive"] == second["positive"]
    small = jnp.exp(-jnp.abs(logits))
    # sigmoid(|s|) and sigmoid(-|s|), neither of them as a difference from 1.
    large_share, small_share = 1.0 / (1.0 + small), small / (1.0 + small)
    weight = jnp.where(
        is_positive,
        jnp.where(logits > 0, -small_share, -large_share),
        jnp.where(logits > 0, large_share, small_share),
    )
    return masked(mask, weight, 0.0)


def log_one_plus(x: Array) -> Array:
    """Returns ``log(1 + x)`` for x in [0, 1], with a relative error of at most about 2^-20.

    Mosaic GPU has no log1p, and ``log(1 + x)`` loses the small terms that most pairs of a SigLIP
    batch are: below 1/16 the series stands in, whose first term left out is x^7 / 8 of x. From
    there on what is lost is the rounding of ``1 + x``, 2^-24 in at least 1/16.
    """
    if x.dtype == jnp.float64:
        return jnp.log1p(x)
    series = 1.0 / 7.0
    for n in (6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        series = 1.0 / n - x * series
    return jnp.where(x < 0.0625, x * series, jnp.log(1.0 + x))
