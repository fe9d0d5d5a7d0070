"""Array and pytree types that every signature of the package uses.

Shapes are stated in annotations (``Float[Array, "batch dim"]``) and checked in the tests only
(``--jaxtyping-packages`` in setup.cfg); at run time they cost nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Int, Integer, Key, Num, PyTree, Shaped, UInt8

Features = Mapping[str, Array]
"""Named arrays that a forward pass returns, e.g. ``sit/block_8`` or ``teacher/patches``."""

Metrics = Mapping[str, Array]
"""Named scalars."""

Schedule = Callable[[Any], Any]
"""A function of the step, as in optax."""

Scalar = Float[Array, ""]

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Features",
    "Float",
    "Int",
    "Integer",
    "Key",
    "Metrics",
    "Num",
    "PyTree",
    "Scalar",
    "Schedule",
    "Shaped",
    "UInt8",
]
