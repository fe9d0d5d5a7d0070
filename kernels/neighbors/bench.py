"""Times exact search beside torch, faiss and scikit-learn.

``repalign bench neighbors`` runs the quick shapes. For others:

    python -m repalign.kernels.neighbors.bench [--shapes cifar_knn_200] [--repeats 5]
        [--python INTERPRETER]

Peers are run by another interpreter, named by ``--python`` or the variable
``REPALIGN_PEERS_PYTHON`` (this one by default), on the same data and as many threads. Those that it
lacks have no row.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.kernels.case import Case
from repalign.kernels.neighbors.api import IMPLEMENTATIONS, choose, top_k
from repalign.kernels.neighbors.specs import SHAPES, Shape

QUICK = ("small", "small_euclidean", "cifar_5k")
PEERS = ("torch", "faiss", "sklearn")
_LARGEST_MATRIX = 2**32
"""Bytes of scores up to which forms that hold the matrix are run."""


def run(
    names: Sequence[str] = QUICK, *, repeats: int = 5, python: str | None = None
) -> list[dict[str, Any]]:
    """Returns one row per named shape and form; peers search float32 whatever the shape's dtype.

    Args:
        names: keys of ``specs.SHAPES``.
        repeats: timed calls after one that warms up.
        python: interpreter of the peers, by default ``$REPALIGN_PEERS_PYTHON`` or this one.

    Returns:
        Rows. ``seconds`` is the median call, between ``seconds_min`` and ``seconds_max``;
        ``temp_bytes`` what it needs beside arguments and results (XLA: from the compiler; peers:
        growth of the process); ``agreement`` the share of indices equal to the first row's, which
        is the reference's unless its score matrix passes 4 GiB.

    Raises:
        KeyError: an unknown name.
        RuntimeError: a peer failed.
    """
    python = python or os.environ.get("REPALIGN_PEERS_PYTHON", sys.executable)
    rows = []
    for name in names:
        shape = SHAPES[name]
        rng = np.random.default_rng(0)
        queries = rng.standard_normal((shape.queries, shape.dim), dtype=np.float32)
        database = rng.standard_normal((shape.database, shape.dim), dtype=np.float32)
        results = {form: _ours(form, shape, queries, database, repeats) for form in _forms(shape)}
        for peer in PEERS:
            if peer == "torch" and 4 * shape.queries * shape.database > _LARGEST_MATRIX:
                continue
            result = _peer(python, peer, shape, queries, database, repeats)
            results |= {peer: result} if result else {}
        expected = next(iter(results.values()))["indices"]
        for form, result in results.items():
            seconds = result["seconds"]
            rows.append(
                {
                    "shape": name,
                    "implementation": form,
                    "seconds": statistics.median(seconds),
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "temp_bytes": result["temp_bytes"],
                    "agreement": float(np.mean(result["indices"] == expected)),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **shape._asdict(),
                }
            )
    return rows


def cases(implementation: str) -> dict[str, Case]:
    """Returns every named shape as a case for ``implementation``.

    The work is one product per pair of points, its traffic each operand read and each result
    written once, and one comparison per score what any search does at least.
    """
    found = {}
    for name, shape in SHAPES.items():
        item = jnp.dtype(shape.dtype).itemsize
        pairs = shape.queries * shape.database
        found[name] = Case(
            functools.partial(top_k, k=shape.k, metric=shape.metric, implementation=implementation),
            (
                jax.ShapeDtypeStruct((shape.queries, shape.dim), shape.dtype),
                jax.ShapeDtypeStruct((shape.database, shape.dim), shape.dtype),
            ),
            flops=2.0 * pairs * shape.dim,
            bytes=float(
                item * shape.dim * (shape.queries + shape.database) + 8 * shape.queries * shape.k
            ),
            vector_operations=float(pairs),
        )
    return found


def _forms(shape: Shape) -> list[str]:
    """The implementations that run on this device and fit into its memory."""
    fits = 4 * shape.queries * shape.database <= _LARGEST_MATRIX
    chosen = choose(k=shape.k, dtype=jnp.dtype(shape.dtype)).implementation
    runs = {"reference": fits, "xla": True, chosen: True}
    return [name for name in IMPLEMENTATIONS if name in runs and runs[name]]


def _ours(
    form: str, shape: Shape, queries: np.ndarray, database: np.ndarray, repeats: int
) -> dict[str, Any]:
    operands = [jnp.asarray(points, shape.dtype) for points in (queries, database)]
    search = jax.jit(functools.partial(top_k, k=shape.k, metric=shape.metric, implementation=form))
    compiled = search.lower(*operands).compile()
    indices = np.asarray(compiled(*operands).indices)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"seconds": seconds, "temp_bytes": temporary, "indices": indices}


def _peer(
    python: str, peer: str, shape: Shape, queries: np.ndarray, database: np.ndarray, repeats: int
) -> dict[str, Any] | None:
    """Runs one library in a process of its own; None where it is not installed."""
    script = pathlib.Path(__file__).with_name("peers.py")
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data.npz"
        np.savez(data, queries=queries, database=database)
        request = shape._asdict() | {
            "peer": peer,
            "repeats": repeats,
            "threads": len(os.sched_getaffinity(0)),
            "data": str(data),
        }
        done = subprocess.run(
            [python, script, json.dumps(request)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{python} {script} failed:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout)
        return result and result | {"indices": np.load(result["indices"])}


def main() -> None:
    """Prints the rows of the shapes named on the command line as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", default=",".join(QUICK), help="names")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", help="interpreter that has torch, faiss, scikit-learn")
    options = parser.parse_args()
    for name in options.shapes.split(","):
        for row in run([name], repeats=options.repeats, python=options.python):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
