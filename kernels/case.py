"""What a kernel is compiled, timed and bounded on: one function, its arguments, its work."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One named real shape of an op.

    Attributes:
        function: takes the arguments, positionally.
        arguments: shapes and dtypes (``jax.ShapeDtypeStruct``).
        flops: floating-point operations of the matrix products that the mathematics needs (a
            multiply-add is two).
        bytes: the smallest traffic to and from memory: each argument read, each result written.
        vector_operations: operations outside the matrix unit, one per element and instruction
            (compare, select, exponential), where they can be what binds; 0 if they never are.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    bytes: float
    vector_operations: float = 0.0
