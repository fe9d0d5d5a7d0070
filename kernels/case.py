"""What a kernel is compiled and timed on: one function, its arguments, and what it has to do."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One named real shape of an op.

    Attributes:
        function: takes the arguments, positionally.
        arguments: shapes and dtypes (``jax.ShapeDtypeStruct``).
        flops: floating-point operations that the mathematics needs (a multiply-add is two).
        bytes: the smallest traffic to and from memory: each argument read, each result written.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    bytes: float
