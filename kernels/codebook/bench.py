"""Times nearest-code search beside the unfused baseline: the full matrix, then argmin."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels.codebook.api import nearest_codes
from repalign.kernels.codebook.specs import SPECS, Spec

# The baseline's matrix may take this much; beyond it the row has no baseline.
_BASELINE_BYTES = 2**31


def _full_matrix(z: jax.Array, codebook: jax.Array) -> jax.Array:
    products = jnp.matmul(z, codebook.T, precision=lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(codebook), axis=1) - 2.0 * products, axis=1)


def _measure(
    search: Callable[..., jax.Array], operands: tuple[jax.Array, ...], repeats: int
) -> tuple[list[float], int]:
    """Returns the seconds of each repeat and the temporary bytes."""
    compiled = jax.jit(search).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        seconds.append(time.perf_counter() - start)
    return seconds, compiled.memory_analysis().temp_size_in_bytes


def _row(name: str, spec: Spec, implementation: str | None, repeats: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    operands = (
        jax.random.normal(keys[0], (spec.vectors, spec.dim)),
        jax.random.normal(keys[1], (spec.codes, spec.dim)),
    )

    def search(z: jax.Array, codebook: jax.Array) -> jax.Array:
        return nearest_codes(z, codebook, distance=spec.distance, implementation=implementation)

    seconds, temporary = _measure(search, operands, repeats)
    median = statistics.median(seconds)
    baseline = None
    if 4 * spec.vectors * spec.codes <= _BASELINE_BYTES:
        baseline = statistics.median(_measure(_full_matrix, operands, repeats)[0])
    return {
        "name": name,
        **spec._asdict(),
        "implementation": implementation or "xla",
        "milliseconds": 1e3 * median,
        "fastest_milliseconds": 1e3 * min(seconds),
        "slowest_milliseconds": 1e3 * max(seconds),
        "gflop_per_second": 2e-9 * spec.vectors * spec.codes * spec.dim / median,
        "temporary_mib": temporary / 2**20,
        "full_matrix_milliseconds": None if baseline is None else 1e3 * baseline,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def run(
    names: Iterable[str] = tuple(SPECS), *, implementation: str | None = None, repeats: int = 5
) -> list[dict[str, Any]]:
    """Times the named specs of ``specs.SPECS``; one row each, times as median, fastest and slowest.

    ``full_matrix_milliseconds`` is the unfused XLA baseline, None where its matrix exceeds 2 GiB.

    Raises:
        KeyError: a name that ``SPECS`` lacks.
    """
    return [_row(name, SPECS[name], implementation, repeats) for name in names]
