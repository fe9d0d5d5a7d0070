"""The losses beside those of other libraries: time of value and gradients, and temporary memory.

Every cell is a loss at N pairs of D-dimensional unit vectors, ours and each peer's in turn, call by
call, on the same data and as many threads, so that a change of the machine's speed meets all of
them. torch's libraries run in an interpreter of their own (`kernels.contrastive.peers`).
"""

import contextlib
import functools
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from repalign.kernels.contrastive.bench import BIAS, SCALE, Peer, data
from repalign.kernels.contrastive.specs import Shape
from repalign.losses import contrastive, joint_embedding
from repalign.numerics import inner_products

EXAMPLES = (1024, 4096, 16384, 65536)
DIMS = (128, 512, 1024)

MOST_BYTES = 6e9
"""What a peer may need; larger cells are estimated from the next smaller number of examples."""

MOST_SECONDS = 12.0
"""What a call may take, by the same estimate."""

CELL_SECONDS, MOST_CALLS = 1.0, 9
"""About how long the calls of one cell may go on after the first, and how many they are."""

ONCE_SECONDS = 6.0
"""If the first calls of a cell take longer, there are no others."""


def _nt_xent_of_optax(a: Array, b: Array) -> Array:
    import optax

    labels = jnp.tile(jnp.arange(len(a)), 2)
    return optax.losses.ntxent(jnp.concatenate([a, b]), labels, 1.0 / SCALE)


def _sup_con(a: Array, b: Array) -> Array:
    labels = jnp.tile(jnp.arange(len(a)), 2)
    return contrastive.sup_con(jnp.concatenate([a, b]), labels, temperature=1.0 / SCALE)


LOSSES: Mapping[str, tuple[Callable[[Array, Array], Any], tuple[str, ...]]] = {
    "matmul": (inner_products, ("torch",)),
    "nt_xent": (
        lambda a, b: contrastive.nt_xent(a, b, temperature=1.0 / SCALE),
        ("torch", "lightly", "optax"),
    ),
    "info_nce": (lambda a, b: contrastive.info_nce(a, b, temperature=1.0 / SCALE), ("torch",)),
    "clip": (
        lambda a, b: contrastive.clip(a, b, logit_scale=jnp.log(SCALE)),
        ("torch", "open_clip"),
    ),
    "siglip": (
        lambda a, b: contrastive.siglip(a, b, scale=SCALE, bias=BIAS),
        ("torch", "open_clip"),
    ),
    "sup_con": (_sup_con, ("pytorch_metric_learning",)),
    "dcl": (lambda a, b: contrastive.dcl(a, b, temperature=1.0 / SCALE), ("lightly",)),
    "dclw": (lambda a, b: contrastive.dclw(a, b, temperature=1.0 / SCALE), ("lightly",)),
    "spectral_contrastive": (contrastive.spectral_contrastive, ("torch",)),
    "barlow_twins": (joint_embedding.barlow_twins, ("lightly",)),
    "vicreg": (joint_embedding.vicreg, ("lightly",)),
    "tico": (
        lambda a, b: joint_embedding.tico(a, b, jnp.zeros((a.shape[1],) * 2))[0],
        ("lightly",),
    ),
}
"""Each loss and the peers that have it; ``matmul``, without gradients, is what bounds most."""


_MEASURED = (
    "seconds",
    "calls",
    "temp_bytes",
    "value",
    "ratio",
    "reason",
    "estimated_seconds",
    "version",
)


class _Compiled:
    """A loss that runs in this process."""

    def __init__(self, distribution: str, losses: Mapping[str, Callable[[Array, Array], Any]]):
        self._distribution, self._losses = distribution, losses
        self._call: Callable[[], Any] | None = None

    def prepare(
        self, loss: str, shape: Shape, vectors: Callable[[], Sequence[Array]], *, timed: bool
    ) -> dict[str, Any]:
        function = self._losses[loss]

        def mean(a: Array, b: Array) -> Array:
            return jnp.mean(function(a, b))

        step = jax.jit(function if loss == "matmul" else jax.value_and_grad(mean, (0, 1)))
        side = jax.ShapeDtypeStruct((shape.examples, shape.dim), jnp.float32)
        compiled = step.lower(side, side).compile()
        found = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
        found["version"] = importlib.metadata.version(self._distribution)
        if not timed or found["temp_bytes"] > MOST_BYTES:
            return found | ({"reason": _needs(found["temp_bytes"])} if timed else {})
        a, b = vectors()
        self._call = lambda: jax.block_until_ready(compiled(a, b))
        start = time.perf_counter()
        value = self._call()[0]
        seconds = time.perf_counter() - start
        return found | {"value": float(value.ravel()[0]), "first_seconds": seconds}

    def call(self) -> float:
        start = time.perf_counter()
        self._call()
        return time.perf_counter() - start


class _Elsewhere:
    """A library in another interpreter."""

    def __init__(self, library: str, process: Peer):
        self._library, self._process = library, process

    def prepare(
        self, loss: str, shape: Shape, vectors: Callable[[], Sequence[Array]], *, timed: bool
    ) -> dict[str, Any] | None:
        return self._process.prepare(self._library, shape._replace(loss=loss))

    def call(self) -> float:
        return self._process.call()


def run(
    python: str,
    *,
    examples: Sequence[int] = EXAMPLES,
    dims: Sequence[int] = DIMS,
    losses: Sequence[str] = tuple(LOSSES),
) -> Iterator[dict[str, Any]]:
    """Measures losses and their peers.

    Args:
        python: an interpreter that has torch, lightly, open_clip and pytorch-metric-learning, or
            some of them; what it lacks has no row.
        examples: numbers of pairs, ascending.
        dims: widths of the vectors.
        losses: names in `LOSSES`.

    Yields:
        A row per loss, size and library, ours (``"repalign"``) first: median ``seconds`` of
        ``calls``, ``temp_bytes`` beside arguments and results (XLA: from the compiler; torch:
        growth of the process), the mean ``value``, ``ratio``, our seconds to the peer's (below 1,
        ours is faster), and ``version`` (ours: jax's). Where a call was left out, ``reason`` says
        why, and a peer's bytes are an estimate.
    """
    with contextlib.ExitStack() as stack:
        measured: dict[str, _Compiled | _Elsewhere] = {
            "repalign": _Compiled("jax", {name: loss for name, (loss, _) in LOSSES.items()}),
            "optax": _Compiled("optax", {"nt_xent": _nt_xent_of_optax}),
        }
        for library in {peer for loss in losses for peer in LOSSES[loss][1]} - {"optax"}:
            measured[library] = _Elsewhere(library, stack.enter_context(Peer(python)))
        for dim in dims:
            smaller: dict[tuple[str, str], dict[str, Any]] = {}
            for count in examples:
                shape = Shape(count, dim, "clip")
                vectors = functools.cache(lambda shape=shape: list(map(jnp.asarray, data(shape))))
                for loss in losses:
                    for row in _cell(loss, shape, vectors, measured, smaller):
                        smaller[loss, row["library"]] = row
                        yield row


def _cell(
    loss: str,
    shape: Shape,
    vectors: Callable[[], Sequence[Array]],
    measured: Mapping[str, _Compiled | _Elsewhere],
    smaller: Mapping[tuple[str, str], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measures one loss at one size by every library that has it."""
    rows, seconds = [], {}
    for library in ("repalign", *LOSSES[loss][1]):
        row = {"loss": loss, "examples": shape.examples, "dim": shape.dim, "library": library}
        row |= dict.fromkeys(_MEASURED) | {"threads": len(os.sched_getaffinity(0))}
        if (loss, library) in smaller:
            row |= _estimate(smaller[loss, library], shape.examples)
        timed = row["reason"] is None
        if timed or library == "repalign":
            found = measured[library].prepare(loss, shape, vectors, timed=timed)
            if found is None:
                continue
            if "first_seconds" in found:
                seconds[library] = [found.pop("first_seconds")]
            row |= found
        rows.append(row)
    total = sum(first for (first,) in seconds.values())
    rounds = int(min(MOST_CALLS, max(CELL_SECONDS / total, total < ONCE_SECONDS))) if seconds else 0
    for _ in range(rounds):
        for library, each in seconds.items():
            time.sleep(0.002)  # The threads of the one before may still be spinning.
            each.append(measured[library].call())
    for row in rows:
        if row["library"] in seconds:
            each = seconds[row["library"]]
            each = each[1:] or each  # The first call warms up, unless it is the only one.
            row |= {"seconds": statistics.median(each), "calls": len(each)}
            if row is not rows[0] and rows[0]["seconds"] is not None:
                row["ratio"] = rows[0]["seconds"] / row["seconds"]
    return rows


def _estimate(smaller: Mapping[str, Any], examples: int) -> dict[str, Any]:
    """Returns what a call would take that is left out, from fewer examples: their square."""
    growth = (examples / smaller["examples"]) ** 2
    seconds = smaller["estimated_seconds"] if smaller["seconds"] is None else smaller["seconds"]
    seconds = None if seconds is None else growth * seconds
    taken, reason = growth * smaller["temp_bytes"], None
    if smaller["library"] != "repalign" and taken > MOST_BYTES:
        reason = _needs(taken)
    elif seconds is not None and seconds > MOST_SECONDS:
        reason = f"would take about {seconds:,.0f} s"
    if reason is None:
        return {}
    return {"reason": reason, "estimated_seconds": seconds, "temp_bytes": taken}


def _needs(count: float) -> str:
    return f"would need about {count / 1e9:,.0f} GB"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns docs/losses/peers.md: a table per loss, and where a peer is faster.

    Args:
        rows: of `run`.
    """
    compared = [row for row in rows if row["ratio"] is not None and row["loss"] != "matmul"]
    slower = [row for row in compared if row["ratio"] >= 1.0]
    versions = {row["library"]: row["version"] for row in rows if row["version"] is not None}
    lines = [
        _HEAD,
        f"Measured with {rows[0]['threads']} threads: "
        + ", ".join(f"{library} {version}" for library, version in sorted(versions.items()))
        + ".",
        "",
        f"Ours is faster in {len(compared) - len(slower)} of the {len(compared)} comparisons that "
        "could be run" + (", slower in:" if slower else "."),
        "",
    ]
    for row in sorted(slower, key=lambda row: -row["ratio"]):
        lines.append(
            f"* {row['loss']}, N = {row['examples']:,}, D = {row['dim']:,}: "
            f"{row['ratio']:.2f} of {row['library']}'s time"
        )
    lines += [""] * bool(slower)
    for loss in dict.fromkeys(row["loss"] for row in rows):
        lines += _table(loss, [row for row in rows if row["loss"] == loss])
    return "\n".join(lines).rstrip() + "\n"


_HEAD = """# Losses beside other libraries

Value and gradients of a loss on N pairs of D-dimensional vectors (NT-Xent, DCL and SupCon: 2N
vectors, each against all others): the median time of a call, and the memory it takes beside
arguments and results, which our compiler states and for a torch library is the growth of the
process. In brackets our time divided by the peer's: below 1, ours is faster. All libraries took
turns in one run, on the same data and as many threads, and every value agrees with ours to 1e-4.
`torch` is the loss as users write it: one matrix of logits, and cross-entropy. A dash is a call
left out, and why. Made by `repalign bench losses --peers PYTHON --format json` and `make docs`.

`matmul` is the product of all pairs alone, XLA's beside MKL's: what bounds the losses that have it.
A matrix of logits costs three, one for the values and one for each gradient. Ours are computed in
blocks that stay in the cache, and once more for the gradients, four in all; where D is at least 512
and N at most 8,192 the logits are held instead. Within one set of vectors (NT-Xent, DCL, SupCon)
half of the matrix is enough, and two products.
"""


def _table(loss: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    cells = {(row["dim"], row["examples"], row["library"]): row for row in rows}
    lines = [f"## {loss}", "", "| D | N | " + " | ".join(libraries) + " |"]
    lines.append("|---:|---:|" + "---:|" * len(libraries))
    for dim, count in dict.fromkeys((row["dim"], row["examples"]) for row in rows):
        shown = [
            _shown(cells[dim, count, library]) if (dim, count, library) in cells else ""
            for library in libraries
        ]
        lines.append(f"| {dim:,} | {count:,} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _shown(row: Mapping[str, Any]) -> str:
    memory = f"{row['temp_bytes'] / 2**20:,.0f} MiB"
    if row["seconds"] is None:
        return f"– {row['reason']}" + (f"; {memory}" if row["library"] == "repalign" else "")
    ratio = "" if row["ratio"] is None else f" ({row['ratio']:.2f})"
    return f"{1e3 * row['seconds']:,.1f} ms{ratio}, {memory}"
