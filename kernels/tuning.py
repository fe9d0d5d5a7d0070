"""Block sizes by op, device and shape: committed defaults, the user's own, and how to measure them.

An op asks ``lookup`` while it is traced. Entries come from two JSON files, the user's first:
``$REPALIGN_TUNING`` (or ``~/.cache/repalign/tuning.json``), which ``tune`` writes, and
``kernels/<op>/tuned.json``, committed beside the op. Both map an op to device kinds to buckets of
shapes to block sizes.
"""

import functools
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from repalign.kernels.choice import present_device

Blocks = dict[str, int]


def bucket(shape: Mapping[str, int], dtype: Any) -> str:
    """Returns the name that shapes share whose sizes round up to the same powers of two.

    ``bucket({"codes": 8000, "dim": 8}, jnp.bfloat16)`` is ``"codes=8192,dim=8,bfloat16"``.
    """
    sizes = [f"{name}={1 << (size - 1).bit_length()}" for name, size in sorted(shape.items())]
    return ",".join([*sizes, jax.numpy.dtype(dtype).name])


def lookup(
    op: str, shape: Mapping[str, int], dtype: Any, *, heuristic: Mapping[str, int]
) -> Blocks:
    """Returns the block sizes for one call, while it is traced; reads each file once per process.

    Args:
        op: the package under ``kernels``, and what of it: ``"codebook/nearest"``.
        shape: the sizes that matter, by name.
        dtype: of the operands.
        heuristic: the blocks where nothing was measured. An entry that lacks one of its names, or
            has others, belongs to an earlier version of the kernel and is not used.
    """
    kind, name = present_device().device_kind, bucket(shape, dtype)
    for entries in (_read(user_file()), _read(default_file(op))):
        if op in entries and kind in entries[op] and name in entries[op][kind]:
            found = entries[op][kind][name]
            if found.keys() == heuristic.keys():
                return dict(found)
    return dict(heuristic)


def tune(
    op: str,
    shape: Mapping[str, int],
    dtype: Any,
    candidates: Iterable[Mapping[str, int]],
    measure: Callable[[Mapping[str, int]], float],
    *,
    file: pathlib.Path | None = None,
) -> tuple[Blocks, dict[str, float | str]]:
    """Measures every candidate on the present device and keeps the fastest.

    Args:
        op: as in ``lookup``; so are ``shape`` and ``dtype``.
        candidates: block sizes to try.
        measure: seconds of one call with these blocks (see ``seconds``).
        file: where to keep the winner: the user's file by default, ``default_file(op)`` to commit.

    Returns:
        The winner, and for each candidate its seconds, or why it does not run.

    Raises:
        ValueError: no candidate runs.
    """
    seconds_of: dict[str, float | str] = {}
    best: tuple[float, Blocks] = (math.inf, {})
    for blocks in candidates:
        label = ",".join(f"{name}={size}" for name, size in blocks.items())
        try:
            taken = measure(blocks)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            seconds_of[label] = str(error).splitlines()[0]
            continue
        seconds_of[label] = taken
        if taken < best[0]:
            best = (taken, dict(blocks))
    if not best[1]:
        raise ValueError(f"no candidate for {op} runs on this device: {seconds_of}.")
    _write(file or user_file(), op, bucket(shape, dtype), best[1])
    return best[1], seconds_of


def seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    """Returns the median time of a call of the jitted ``function`` after one that warms up."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def user_file() -> pathlib.Path:
    """Returns where this user's entries are: ``$REPALIGN_TUNING`` or the cache directory."""
    default = pathlib.Path.home() / ".cache" / "repalign" / "tuning.json"
    return pathlib.Path(os.environ.get("REPALIGN_TUNING", default))


def default_file(op: str) -> pathlib.Path:
    """Returns where an op's committed entries are."""
    return pathlib.Path(__file__).parent / op.partition("/")[0] / "tuned.json"


@functools.cache
def _read(path: pathlib.Path) -> dict[str, dict[str, dict[str, Blocks]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: pathlib.Path, op: str, name: str, blocks: Blocks) -> None:
    entries = json.loads(path.read_text()) if path.exists() else {}
    of_device = entries.setdefault(op, {}).setdefault(present_device().device_kind, {})
    of_device[name] = blocks
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another process reads the old file or the new one.
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
    _read.cache_clear()
