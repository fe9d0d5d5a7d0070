"""Time and memory of attention beside ``jax.nn`` and torch.

``repalign bench attention`` runs the quick shapes. For others:

    python -m repalign.kernels.attention.bench [--shapes sit_xl_2_512px,...] [--batch N]
        [--repeats 5] [--python INTERPRETER]

torch may live in another interpreter, named by ``--python`` or the variable
``REPALIGN_PEERS_PYTHON``; it runs ``peers.py`` on the same data and as many threads. Without it
torch has no row.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from repalign.kernels.attention import api
from repalign.kernels.attention.specs import QUICK, SPECS, Spec
from repalign.kernels.case import Case
from repalign.kernels.choice import present_device

TIMED = {
    "cpu": ("dense", "xla", "jax_nn"),
    "gpu": ("dense", "xla", "jax_nn", "jax_cudnn", "pallas_gpu"),
    "tpu": ("dense", "xla", "jax_nn", "jax_flash_tpu", "pallas_tpu"),
}
"""What is timed where."""

_UNMASKED = ("jax_cudnn", "jax_flash_tpu")
_HOLDS_WEIGHTS = ("dense", "jax_nn")
_LARGEST_WEIGHTS = 2**31
"""Bytes of float32 weights up to which forms that hold them are run."""


def cases(implementation: str) -> dict[str, Case]:
    """Returns output (``/forward``), and output with gradients (``/backward``), of every shape.

    A pair of query and key needs two products for the output and four for the gradients (what an
    implementation computes again is not counted); of vector work the maximum, the shifted scale,
    the exponential and the sum, and as many again. The least traffic is that of the arguments and
    the results.
    """
    found = {}
    for name, spec in SPECS.items():
        if spec.segmented and implementation in _UNMASKED:
            continue
        tokens = jax.ShapeDtypeStruct((spec.batch, spec.tokens, spec.heads, spec.dim), jnp.bfloat16)
        segments = [jax.ShapeDtypeStruct((spec.batch, spec.tokens), jnp.int32)] * spec.segmented
        pairs = _pairs(spec)
        size = float(tokens.size * tokens.dtype.itemsize)
        found[f"{name}/forward"] = Case(
            _forward(spec, implementation),
            (*[tokens] * 3, *segments),
            4.0 * pairs * spec.dim,
            4 * size,
            4.0 * pairs,
        )
        found[f"{name}/backward"] = Case(
            _backward(spec, implementation),
            (*[tokens] * 4, *segments),
            12.0 * pairs * spec.dim,
            8 * size,
            8.0 * pairs,
        )
    return found


def run(
    shapes: Iterable[str] = QUICK,
    *,
    batch: int | None = 1,
    repeats: int = 5,
    python: str | None = None,
) -> list[dict[str, Any]]:
    """Times output, and output with gradients, of named shapes, ours and others', in one run.

    float32 on a CPU, bfloat16 elsewhere.

    Args:
        shapes: names in ``specs.SPECS``.
        batch: sequences, instead of the shape's own; None for those.
        repeats: timed calls after one that warms up; the implementations take turns.
        python: interpreter that has torch, by default ``$REPALIGN_PEERS_PYTHON``.

    Returns:
        One row per shape, pass and implementation: the median, least and greatest seconds of a
        call, the ratio of the median to the fastest of torch and ``jax.nn`` (below 1 is faster),
        the bytes it needs beside arguments and results (XLA: from the compiler; torch: growth of
        the process), and whether ``implementation=None`` would choose it.
    """
    python = python or os.environ.get("REPALIGN_PEERS_PYTHON")
    rows = []
    for name in shapes:
        spec = SPECS[name] if batch is None else SPECS[name]._replace(batch=batch)
        arrays = data(spec)
        chosen = api.choose(*arrays[:2], masked=spec.segmented).implementation
        torch = _torch(python, spec, repeats) if python and not spec.segmented else {}
        for which, make, count in (("forward", _forward, 3), ("backward", _backward, 4)):
            arguments = (*arrays[:count], *arrays[4:])
            measured = _ours({x: make(spec, x) for x in _timed(spec)}, arguments, repeats)
            peers = {"torch": torch[which]} if torch else {}
            medians = {x: statistics.median(y["seconds"]) for x, y in (measured | peers).items()}
            fastest = min((medians[x] for x in ("torch", "jax_nn") if x in medians), default=None)
            for implementation, result in (measured | peers).items():
                rows.append(
                    {
                        "shape": name,
                        "pass": which,
                        "implementation": implementation,
                        "seconds": medians[implementation],
                        "seconds_min": min(result["seconds"]),
                        "seconds_max": max(result["seconds"]),
                        "ratio": None if fastest is None else medians[implementation] / fastest,
                        "temp_bytes": result["temp_bytes"],
                        "chosen": implementation == chosen,
                        "dtype": str(arrays[0].dtype),
                        "device": jax.devices()[0].device_kind,
                        "jax": jax.__version__,
                        **spec._asdict(),
                    }
                )
    return rows


def data(spec: Spec) -> list[Array]:
    """Returns q, k, v, the output's cotangent, and segment ids if any; ``peers.py`` draws alike."""
    rng = np.random.default_rng(0)
    shape = (spec.batch, spec.tokens, spec.heads, spec.dim)
    dtype = jnp.float32 if present_device().platform == "cpu" else jnp.bfloat16
    arrays = [jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype) for _ in range(4)]
    if spec.segmented:
        ids = jnp.arange(spec.tokens) * 3 // spec.tokens
        arrays.append(jnp.broadcast_to(ids.astype(jnp.int32), shape[:2]))
    return arrays


def _pairs(spec: Spec) -> float:
    seen = spec.tokens * (spec.tokens + 1) / 2 if spec.causal else spec.tokens**2
    return float(spec.batch * spec.heads * seen)


def _forward(spec: Spec, implementation: str) -> Callable[..., Array]:
    def forward(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        ids = None if segments is None else (segments, segments)
        return api.attention(
            q, k, v, causal=spec.causal, segment_ids=ids, implementation=implementation
        )

    return forward


def _backward(spec: Spec, implementation: str) -> Callable[..., tuple[Array, ...]]:
    def backward(
        q: Array, k: Array, v: Array, cotangent: Array, segments: Array | None = None
    ) -> tuple[Array, ...]:
        forward = functools.partial(_forward(spec, implementation), segments=segments)
        out, gradients = jax.vjp(forward, q, k, v)
        return out, *gradients(cotangent)

    return backward


def _timed(spec: Spec) -> list[str]:
    names = list(TIMED[present_device().platform])
    if spec.segmented:
        names = [name for name in names if name not in _UNMASKED]
    if 4 * spec.batch * spec.heads * spec.tokens**2 > _LARGEST_WEIGHTS:
        names = [name for name in names if name not in _HOLDS_WEIGHTS]
    return names


def _ours(
    functions: dict[str, Callable[..., Any]], arguments: tuple[Array, ...], repeats: int
) -> dict[str, dict[str, Any]]:
    results, compiled = {}, {}
    for name, function in functions.items():
        try:
            compiled[name] = jax.jit(function).lower(*arguments).compile()
        except (ValueError, NotImplementedError):
            if name not in _UNMASKED:
                raise
            continue  # A library that does not take this device, length or head dim.
        jax.block_until_ready(compiled[name](*arguments))
        temporary = compiled[name].memory_analysis().temp_size_in_bytes
        results[name] = {"seconds": [], "temp_bytes": temporary}
    for _ in range(repeats):
        for name, call in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            results[name]["seconds"].append(time.perf_counter() - start)
    return results


def _torch(python: str, spec: Spec, repeats: int) -> dict[str, dict[str, Any]]:
    """Runs torch in a process of its own; nothing where it is not installed."""
    script = pathlib.Path(__file__).with_name("peers.py")
    request = spec._asdict() | {"repeats": repeats, "threads": len(os.sched_getaffinity(0))}
    done = subprocess.run(
        [python, script, json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{python} {script} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout) or {}


def main() -> None:
    """Prints the rows of the shapes named on the command line as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", default=",".join(QUICK), help="names, or all")
    parser.add_argument("--batch", type=int, help="instead of the shape's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", help="interpreter that has torch")
    options = parser.parse_args()
    names = SPECS if options.shapes == "all" else options.shapes.split(",")
    for name in names:
        rows = run([name], batch=options.batch, repeats=options.repeats, python=options.python)
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
