"""What every kernel is proven with: interpretation, cross-lowering and derived error bounds."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels.chips import CHIPS

INTERPRETERS = ("tpu", "gpu") if hasattr(plgpu, "force_gpu_interpret_mode") else ("tpu",)
"""The Pallas interpreters this JAX has in public: Mosaic GPU's came after 0.10.2.

Parametrise over it (``[p for p in ("gpu",) if p in INTERPRETERS]``), so that older JAX leaves that
level out; the cross-lowering to cuda is run by every JAX.
"""


@contextlib.contextmanager
def _interpreter(platform: str, detect_races: bool, cores: int) -> Iterator[None]:
    if platform == "tpu":
        # Scratch and outputs start as NaN; copies happen as late as they may ("on_wait").
        params = pltpu.InterpretParams(detect_races=detect_races, num_cores_or_threads=cores)
        with pltpu.force_tpu_interpret_mode(params):
            yield
    else:
        params = plgpu.InterpretGPUParams(detect_races=detect_races)
        with plgpu.force_gpu_interpret_mode(params):
            yield


def interpreted(
    function: Callable[..., Any],
    *arguments: Any,
    platform: str = "tpu",
    detect_races: bool = True,
    cores: int = 1,
) -> Any:
    """Returns ``function(*arguments)`` in NumPy, its Pallas kernels interpreted on the CPU.

    Uninitialised memory reads as NaN. A data race is an AssertionError.

    Args:
        function: calls kernels of one platform; may take their gradients.
        arguments: arrays.
        platform: ``"tpu"``, or ``"gpu"`` where it is in ``INTERPRETERS``.
        detect_races: check the order of all accesses (slower).
        cores: TensorCores that share the ``"parallel"`` grid axes (TPU only).
    """
    said = io.StringIO()
    try:
        with _interpreter(platform, detect_races, cores), contextlib.redirect_stdout(said):
            # A fresh function: nothing traced outside the interpreter is used again.
            result = jax.block_until_ready(jax.jit(lambda *a: function(*a))(*arguments))
    except jax.errors.JaxRuntimeError as error:
        pltpu.reset_tpu_interpret_mode_state()
        if "race" in str(error).lower():
            raise AssertionError(str(error)) from error
        raise
    finally:
        if detect_races:
            pltpu.reset_tpu_interpret_mode_state()
    # JAX 0.10.2 prints what later releases raise.
    assert "RACE DETECTED" not in said.getvalue(), said.getvalue()
    return jax.tree.map(np.asarray, result)


def cross_lower(
    function: Callable[..., Any], arguments: Sequence[Any], platform: str, *, chip: str = ""
) -> str:
    """Returns the module that ``function`` lowers to for hardware this machine need not have.

    Asserts that a Mosaic kernel is in it.

    Args:
        function: calls kernels of one platform.
        arguments: arrays or ``jax.ShapeDtypeStruct``.
        platform: ``"tpu"`` or ``"cuda"``.
        chip: a name in ``repalign.kernels.chips.CHIPS``; v5e or h100 by default.
    """
    described = CHIPS[chip or {"tpu": "v5e", "cuda": "h100"}[platform]].described()
    with jax.sharding.use_abstract_mesh(described):
        traced = jax.jit(lambda *a: function(*a)).trace(*arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    call = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform]
    assert call in text, f"no {call} in the lowered module"
    return text


def error_bound(
    length: int, *, accumulate: Any = jnp.float32, rounded: Sequence[Any] = ()
) -> float:
    r"""Returns the largest relative Frobenius error that rounding explains.

    .. math:: \beta = n\,u(\mathrm{accumulate}) + \sum_t u(t)

    with :math:`u(t)` = ``finfo(t).eps / 2`` the unit roundoff. The first term is the classical
    :math:`\gamma_n` of a sum of n products in any order (Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., eq. 3.5) without cancellation. With terms of random sign, whose
    sum is about :math:`\sqrt n` times smaller than the sum of their sizes, errors add up like
    :math:`\sqrt n\,u` (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5), thm 3.1), and the product is
    the same :math:`n\,u`. The second term is one rounding for every value that passes through a
    narrower type on the way: a bf16 result, probabilities cast to bf16 before a product.

    Args:
        length: n, the number of terms of the longest chain of sums (for a product of products, the
            sum of both lengths).
        accumulate: type that sums are kept in. On hardware whose f32 products are rounded first
            (TF32), that type's roundings belong in ``rounded``.
        rounded: the types that values are rounded to, once per rounding.
    """
    return length * _unit_roundoff(accumulate) + sum(_unit_roundoff(dtype) for dtype in rounded)


def _unit_roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def relative_error(actual: Any, expected: Any) -> float:
    """Returns ``|actual - expected|_F / |expected|_F`` in float64; where both are 0, 0.

    Entries that are the same infinity on both sides do not count; NaN anywhere gives NaN.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    same = np.isinf(expected) & (actual == expected)
    actual, expected = np.where(same, 0.0, actual), np.where(same, 0.0, expected)
    error, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    return 0.0 if error == 0.0 else float(error / size) if size else float("inf")


def assert_within(actual: Any, expected: Any, bound: float) -> None:
    """Asserts for every tensor of a pytree that its relative error is at most ``bound``."""
    paths, structure = jax.tree.flatten_with_path(expected)
    others, other_structure = jax.tree.flatten(actual)
    assert structure == other_structure, (other_structure, structure)
    for (path, value), other in zip(paths, others, strict=True):
        error = relative_error(other, value)
        name = jax.tree_util.keystr(path) or "result"
        assert error <= bound, f"{name}: relative error {error:.3g} over its bound {bound:.3g}"
