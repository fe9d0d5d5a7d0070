"""What a function's definition asks for, before any compiler sees it: FLOPs and memory."""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax


def model_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the FLOPs of the products that a function's definition holds.

    Two for each multiply-add of a ``dot_general`` or a convolution, and what a Pallas kernel's cost
    estimate says; loops of known length counted, of others one iteration, of branches the dearest;
    elementwise work is not counted. Nothing is computed: the arguments may be shapes.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def peak_live_bytes(
    function: Callable[..., Any], *arguments: Any, parameters: Collection[tuple[int, ...]] = ()
) -> int:
    """Returns the peak of the bytes of intermediate arrays, operation after operation.

    An array lives from the operation that makes it to the last that uses it; a loop adds the peak
    of one iteration. Nothing is fused and nothing is done in place, so a compiler needs less for
    elementwise work, and about this for what a backward pass keeps.

    Args:
        function: traced, not run.
        arguments: arrays or shapes; they and what is returned do not count.
        parameters: shapes of arrays that do not count either, nor slices of them along the first
            of three or more axes (the layers of a stack): copies of parameters in another type,
            their gradients and what an optimizer makes of these.
    """
    ignored = {*parameters, *(shape[1:] for shape in parameters if len(shape) > 2)}
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr, frozenset(ignored))


def _flops(jaxpr: Any) -> float:
    return sum(map(_equation_flops, jaxpr.eqns), start=0.0)


def _equation_flops(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = parameters["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "pallas_call":
        estimate = parameters["cost_estimate"]
        return 0.0 if estimate is None else float(estimate.flops)
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in parameters["branches"])
    inner = sum(map(_flops, _jaxprs(parameters)), start=0.0)
    if name == "scan":
        return inner * parameters["length"]
    if name == "shard_map":
        mesh = parameters["mesh"]
        return inner * math.prod(mesh.shape[axis] for axis in parameters["manual_axes"])
    return inner


def _convolution_flops(equation: Any) -> float:
    """Counts every tap of the kernel at every output, taps in the padding included."""
    numbers = equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    features = kernel.shape[numbers.rhs_spec[0]]
    dense = 2.0 * out.size * kernel.size / features
    # Between the elements of a dilated input (the gradient of a strided convolution) lie zeros.
    return dense / math.prod(equation.params["lhs_dilation"])


def _peak(jaxpr: Any, ignored: frozenset[tuple[int, ...]]) -> int:
    returned = set(map(id, jaxpr.outvars))
    last_use: dict[int, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_use |= {id(variable): number for variable in (*equation.outvars, *equation.invars)}
    alive: dict[int, int] = {}
    peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            shape = tuple(variable.aval.shape)
            if id(variable) not in returned and not {shape, shape[1:]} & ignored:
                alive[id(variable)] = _bytes(variable.aval)
        inside = max((_peak(one, ignored) for one in _jaxprs(equation.params)), default=0)
        peak = max(peak, sum(alive.values()) + inside)
        for variable in (*equation.outvars, *equation.invars):
            if last_use[id(variable)] == number and id(variable) in alive:
                del alive[id(variable)]
    return peak


def _bytes(aval: Any) -> int:
    is_key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    return math.prod(aval.shape) * (8 if is_key else aval.dtype.itemsize)


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among the parameters of an equation: those of calls, loops, remat."""
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one
