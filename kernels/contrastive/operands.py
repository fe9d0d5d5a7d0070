"""What the two Pallas implementations share: their operands, padded and in the types of kernels."""

import jax.numpy as jnp
from jax import Array

from repalign.kernels.contrastive.entries import Side


def check_types(rows: Side, columns: Side, name: str) -> None:
    """Raises a ValueError for 64-bit arrays, which the kernels would have to cut short."""
    for side in (rows, columns):
        for key, x in side.items():
            if x.dtype.itemsize > 4:
                raise ValueError(
                    f"{name} computes in 32 bits, but {key} is {x.dtype}: convert it, "
                    'or name implementation="xla".'
                )


def vectors_dtype(rows: Side, columns: Side) -> jnp.dtype:
    """Returns bfloat16 if both sides are in it, else float32."""
    both = {rows["vectors"].dtype, columns["vectors"].dtype}
    return jnp.dtype(jnp.bfloat16) if both == {jnp.dtype(jnp.bfloat16)} else jnp.dtype(jnp.float32)


def pad(x: Array, axis: int, multiple: int) -> Array:
    """Pads an axis with zeros to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def prepare(side: Side, dtype: jnp.dtype, multiple: int, depth: int, *, mark: bool) -> Side:
    """Pads a side to multiples of the blocks; marks become int32.

    Args:
        side: see ``entries``; may hold ``value`` and ``cotangent``.
        dtype: of the vectors.
        multiple: of the vectors' number.
        depth: multiple of their length.
        mark: where padding must not count, ``where`` says so.
    """
    if mark and "where" not in side and len(side["vectors"]) % multiple:
        side = side | {"where": jnp.ones(len(side["vectors"]), jnp.int32)}
    prepared = {}
    for name, x in side.items():
        if name == "vectors":
            x = pad(x.astype(dtype), 1, depth)
        elif name not in ("value", "cotangent"):
            x = x.astype(jnp.int32)
        prepared[name] = pad(x, 0, multiple)
    return prepared
