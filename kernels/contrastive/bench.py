"""Time and memory of contrastive losses beside torch, open_clip, lightly and optax.

``repalign bench contrastive`` runs the quick shapes. For others:

    python -m repalign.kernels.contrastive.bench [--shapes clip_4k,simclr_8k] [--repeats 5]
        [--python INTERPRETER]

torch and its libraries live in another interpreter, named by ``--python`` or the variable
``REPALIGN_PEERS_PYTHON``; it runs ``peers.py`` on the same data and as many threads. Libraries it
lacks have no row.
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

from repalign.kernels.case import Case
from repalign.kernels.choice import present_device
from repalign.kernels.contrastive import api
from repalign.kernels.contrastive.specs import QUICK, SHAPES, Shape

SCALE, BIAS = 10.0, -10.0
PEERS = {
    "nt_xent": ("torch", "lightly", "optax"),
    "clip": ("torch", "open_clip"),
    "siglip": ("torch", "open_clip"),
    "moco": ("torch",),
}
KERNELS = {"cpu": (), "tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}
_LARGEST_MATRIX = 2**31
"""Bytes of logits up to which forms that hold the matrix are run."""

_LARGEST_OPTAX = 512
"""Pairs up to which optax's form, which took 1.6 GB for 512, is run."""


def loss(name: str, implementation: str | None) -> Callable[..., Array]:
    """Returns a loss of (a, b, scale, bias) [N, D] unit vectors; of ``"moco"``, (q, k, queue, ...).

    The value is the mean over all anchors.
    """
    lse = functools.partial(api.log_sum_exp, implementation=implementation)

    def paired(a: Array, b: Array) -> Array:
        return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=1)

    def nt_xent(a, b, scale, bias):
        del bias
        views, ids = jnp.concatenate([a, b]), jnp.arange(2 * len(a))
        total = lse(views, views, scale=scale, exclude=(ids, ids))
        return jnp.mean(total) - scale * jnp.mean(paired(a, b))

    def clip(a, b, scale, bias):
        del bias
        both = lse(a, b, scale=scale) + lse(b, a, scale=scale)
        return jnp.mean(0.5 * both - scale * paired(a, b))

    def siglip(a, b, scale, bias):
        ids = jnp.arange(len(a))
        options = {"scale": scale, "bias": bias, "positive": (ids, ids)}
        return jnp.mean(api.sigmoid_loss(a, b, **options, implementation=implementation))

    def moco(a, b, queue, scale, bias):
        del bias
        positive = scale * paired(a, b)
        total = jnp.logaddexp(positive, lse(a, jax.lax.stop_gradient(queue), scale=scale))
        return jnp.mean(total - positive)

    return {"nt_xent": nt_xent, "clip": clip, "siglip": siglip, "moco": moco}[name]


def sizes(shape: Shape) -> list[tuple[int, int]]:
    """Returns rows and columns of every reduction in a loss."""
    rows = 2 * shape.examples if shape.loss == "nt_xent" else shape.examples
    return [(rows, shape.queue or rows)] * (2 if shape.loss == "clip" else 1)


def cases(implementation: str) -> dict[str, Case]:
    """Returns value (``/forward``) and value with gradients (``/backward``) of every shape.

    A loss needs one product of all pairs for its value and one for each side's gradient; what an
    implementation computes again is not counted. Of each entry the forward pass takes a maximum, a
    difference, an exponential and a sum, the backward pass as many again. The least traffic is the
    vectors', and their gradients'.
    """
    found = {}
    for name, shape in SHAPES.items():
        vectors = jax.ShapeDtypeStruct((shape.examples, shape.dim), shape.dtype)
        queue = jax.ShapeDtypeStruct((shape.queue, shape.dim), shape.dtype)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        function = loss(shape.loss, implementation)
        arguments = (vectors, vectors, *([queue] if shape.queue else []), scalar, scalar)
        differentiated = (0, 1, len(arguments) - 2)
        pairs = sum(rows * columns for rows, columns in sizes(shape))
        traffic = sum(x.size * x.dtype.itemsize for x in arguments)
        gradients = 1 if shape.loss == "moco" else 2
        found[f"{name}/forward"] = Case(
            function, arguments, 2.0 * pairs * shape.dim, float(traffic), 4.0 * pairs
        )
        found[f"{name}/backward"] = Case(
            jax.value_and_grad(function, differentiated),
            arguments,
            2.0 * (1 + gradients) * pairs * shape.dim,
            float(traffic + 2 * vectors.size * vectors.dtype.itemsize),
            8.0 * pairs,
        )
    return found


def run(
    shapes: Iterable[str] = QUICK, *, repeats: int = 5, python: str | None = None
) -> list[dict[str, Any]]:
    """Measures value and gradients of named shapes, ours and others', in one run.

    Args:
        shapes: names in ``specs.SHAPES``.
        repeats: timed calls after one that warms up.
        python: interpreter of the peers, by default ``$REPALIGN_PEERS_PYTHON``; none of them
            without.

    Returns:
        One row per shape and implementation: its value, the median, least and greatest seconds of
        a call, the ratio of the median to the fastest peer's (below 1 is faster), and the bytes it
        needs beside arguments and results (XLA: from the compiler; torch: growth of the process).
    """
    python = python or os.environ.get("REPALIGN_PEERS_PYTHON")
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        dense = 4 * max(r * c for r, c in sizes(shape)) <= _LARGEST_MATRIX
        names = ["reference", "xla"] if dense else ["xla"]
        names += KERNELS[present_device().platform]
        measured = {which: _ours(shape, loss(shape.loss, which), repeats) for which in names}
        peers = {}
        for peer in PEERS[shape.loss] if dense else ():
            if peer == "optax":
                if shape.examples <= _LARGEST_OPTAX:
                    peers[peer] = _ours(shape, _optax_nt_xent, repeats)
            elif python:
                peers |= _peer(python, peer, shape, repeats)
        fastest = min((statistics.median(x["seconds"]) for x in peers.values()), default=None)
        for which, result in (measured | peers).items():
            median = statistics.median(result["seconds"])
            rows.append(
                {
                    "shape": name,
                    "implementation": which,
                    "seconds": median,
                    "seconds_min": min(result["seconds"]),
                    "seconds_max": max(result["seconds"]),
                    "ratio": None if fastest is None else median / fastest,
                    "temp_bytes": result["temp_bytes"],
                    "value": result["value"],
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **shape._asdict(),
                }
            )
    return rows


def data(shape: Shape) -> list[np.ndarray]:
    """Returns the unit vectors of a shape; ``peers.py`` draws the same."""
    rng = np.random.default_rng(0)
    found = []
    for count in (shape.examples, shape.examples, *([shape.queue] if shape.queue else [])):
        x = rng.standard_normal((count, shape.dim), dtype=np.float32)
        found.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return found


def _optax_nt_xent(a: Array, b: Array, scale: Array, bias: Array) -> Array:
    import optax

    del bias
    labels = jnp.tile(jnp.arange(len(a)), 2)
    return optax.losses.ntxent(jnp.concatenate([a, b]), labels, 1.0 / scale)


def _ours(shape: Shape, function: Callable[..., Array], repeats: int) -> dict[str, Any]:
    arguments = [jnp.asarray(x, shape.dtype) for x in data(shape)]
    arguments += [jnp.float32(SCALE), jnp.float32(BIAS)]
    step = jax.value_and_grad(function, (0, 1, len(arguments) - 2))
    compiled = jax.jit(step).lower(*arguments).compile()
    value = float(compiled(*arguments)[0])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"seconds": seconds, "temp_bytes": temporary, "value": value}


class Peer:
    """A process in an interpreter that has torch, which runs ``peers.py``; a context manager."""

    def __init__(self, python: str):
        script = pathlib.Path(__file__).with_name("peers.py")
        self._command = [python, str(script)]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def prepare(self, peer: str, shape: Shape) -> dict[str, Any] | None:
        """Returns value, memory and seconds of a library's first call; None if it is not there."""
        request = shape._asdict() | {
            "peer": peer,
            "threads": len(os.sched_getaffinity(0)),
            "scale": SCALE,
            "bias": BIAS,
        }
        return self._ask({"prepare": request})

    def call(self) -> float:
        """Returns the seconds of one more call of what was prepared."""
        return self._ask({"call": None})["seconds"]

    def _ask(self, message: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)} failed at {json.dumps(message)}.")
        return json.loads(answer)


def _peer(python: str, peer: str, shape: Shape, repeats: int) -> dict[str, dict[str, Any]]:
    """Runs one library in a process of its own; nothing where it is not installed."""
    with Peer(python) as process:
        result = process.prepare(peer, shape)
        if result is None:
            return {}
        return {peer: result | {"seconds": [process.call() for _ in range(repeats)]}}


def main() -> None:
    """Prints the rows of the shapes named on the command line as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", default=",".join(QUICK), help="names, or all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", help="interpreter that has torch")
    options = parser.parse_args()
    names = SHAPES if options.shapes == "all" else options.shapes.split(",")
    for name in names:
        for row in run([name], repeats=options.repeats, python=options.python):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
