"""Times nearest-code search beside torch, vector-quantize-pytorch and faiss.

``repalign bench codebook`` runs the quick shapes. For others:

    python -m repalign.kernels.codebook.bench [--shapes vqgan_16k,sim_vq_262k] [--repeats 5]
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.kernels.case import Case
from repalign.kernels.codebook import api
from repalign.kernels.codebook.specs import SPECS, Spec

QUICK = ("titok_4k", "llamagen_16k", "encodec_1k", "maskgit_1k")
PEERS = ("torch", "vector_quantize_pytorch", "faiss")

# The scores of the unfused XLA form may take this much; beyond it there is no such row.
_BASELINE_BYTES = 2**31


def run(
    names: Sequence[str] = QUICK, *, repeats: int = 5, python: str | None = None
) -> list[dict[str, Any]]:
    """Returns one row per named shape and form, all in float32.

    Forms are the implementations that run here, ``full_matrix`` (unfused XLA, up to 2 GiB of
    scores), and the peers; those that hold the matrix go by rows of vectors where it would pass 2
    GiB.

    Args:
        names: keys of ``specs.SPECS``.
        repeats: timed calls after one that warms up.
        python: interpreter of the peers, by default ``$REPALIGN_PEERS_PYTHON`` or this one.

    Returns:
        Rows. ``seconds`` is the median call, between ``seconds_min`` and ``seconds_max``;
        ``ratio`` the fastest row's seconds of this package over it (below 1: slower than ours);
        ``temp_bytes`` what it needs beside arguments and results (XLA: from the compiler; peers:
        growth of the process); ``agreement`` the share of indices equal to ``xla``'s.

    Raises:
        KeyError: an unknown name.
        RuntimeError: a peer failed.
    """
    python = python or os.environ.get("REPALIGN_PEERS_PYTHON", sys.executable)
    rows = []
    for name in names:
        spec = SPECS[name]
        rng = np.random.default_rng(0)
        z = rng.standard_normal((spec.vectors, spec.dim), dtype=np.float32)
        codebook = rng.standard_normal((spec.codes, spec.dim), dtype=np.float32)
        ours = {form: _ours(_search(spec, form), z, codebook, repeats) for form in _forms()}
        results = dict(ours)
        if 4 * spec.vectors * spec.codes <= _BASELINE_BYTES:
            full = functools.partial(_full_matrix, distance=spec.distance)
            results["full_matrix"] = _ours(full, z, codebook, repeats)
        for peer in PEERS:
            result = _peer(python, peer, spec, z, codebook, repeats)
            results |= {peer: result} if result else {}
        fastest = min(statistics.median(result["seconds"]) for result in ours.values())
        for form, result in results.items():
            seconds = statistics.median(result["seconds"])
            rows.append(
                {
                    "shape": name,
                    "implementation": form,
                    "seconds": seconds,
                    "seconds_min": min(result["seconds"]),
                    "seconds_max": max(result["seconds"]),
                    "ratio": fastest / seconds,
                    "temp_bytes": result["temp_bytes"],
                    "agreement": float(np.mean(result["indices"] == results["xla"]["indices"])),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **spec._asdict(),
                }
            )
    return rows


def cases(implementation: str) -> dict[str, Case]:
    """Returns the named shapes as cases for ``implementation``, the cheapest first.

    ``<shape>/nearest`` of every shape in float32; of some also bfloat16, a top-k of 8, the soft
    assignment with its gradients, and the statistics. The products of a float32 score are six of
    bfloat16 pieces, which is what the matrix unit has to do; a search compares, and selects a score
    and an index: three vector operations a score.
    """
    found = {}
    for name, spec in sorted(SPECS.items(), key=lambda item: _work(item[1])):
        z, codebook, log_weights = (
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((spec.vectors, spec.dim), (spec.codes, spec.dim), (spec.codes,))
        )
        scores, product = spec.vectors * spec.codes, _work(spec)
        operand_bytes = 4.0 * spec.dim * (spec.vectors + spec.codes)
        searched = {"distance": spec.distance, "implementation": implementation}
        found[f"{name}/nearest"] = Case(
            functools.partial(api.nearest_codes, **searched),
            (z, codebook),
            flops=6.0 * product,
            bytes=operand_bytes + 4.0 * spec.vectors,
            vector_operations=3.0 * scores,
        )
        if name not in ("llamagen_16k", "maskgit_1k", "sim_vq_65k"):
            continue
        found[f"{name}/nearest_bfloat16"] = Case(
            functools.partial(api.nearest_codes, precision="bfloat16", **searched),
            (z, codebook),
            flops=1.0 * product,
            bytes=operand_bytes + 4.0 * spec.vectors,
            vector_operations=3.0 * scores,
        )
        found[f"{name}/top_8"] = Case(
            functools.partial(api.top_k_codes, k=8, **searched),
            (z, codebook),
            flops=6.0 * product,
            bytes=operand_bytes + 32.0 * spec.vectors,
            vector_operations=1.0 * scores,
        )
        assign = functools.partial(_assigned, implementation=implementation)
        found[f"{name}/soft_forward"] = Case(
            assign,
            (z, codebook, log_weights),
            flops=6.0 * 2.0 * product,
            bytes=operand_bytes + 4.0 * spec.vectors * (spec.dim + 1),
            vector_operations=3.0 * scores,
        )
        found[f"{name}/soft_backward"] = Case(
            jax.grad(lambda *a, assign=assign: sum(map(jnp.sum, assign(*a))), argnums=(0, 1, 2)),
            (z, codebook, log_weights),
            flops=6.0 * 7.0 * product,
            bytes=3.0 * operand_bytes,
            vector_operations=6.0 * scores,
        )
        found[f"{name}/statistics"] = Case(
            functools.partial(
                api.code_statistics, num_codes=spec.codes, implementation=implementation
            ),
            (z, jax.ShapeDtypeStruct((spec.vectors,), jnp.int32)),
            flops=1.0 * spec.vectors * spec.dim,
            bytes=operand_bytes + 4.0 * spec.vectors,
        )
    return found


def _assigned(z, codebook, log_weights, *, implementation):
    return api.soft_assignment(z, codebook, log_weights=log_weights, implementation=implementation)


def _work(spec: Spec) -> float:
    return 2.0 * spec.vectors * spec.codes * spec.dim


def _forms() -> list[str]:
    """The implementations that are timed on this device."""
    return list(dict.fromkeys(["xla", api.choose().implementation]))


def _search(spec: Spec, form: str) -> Callable[..., jax.Array]:
    return functools.partial(api.nearest_codes, distance=spec.distance, implementation=form)


def _full_matrix(z: jax.Array, codebook: jax.Array, *, distance: str) -> jax.Array:
    if distance == "cosine":
        norms = jnp.linalg.norm(codebook, axis=1)
        return jnp.argmax(jnp.matmul(z, codebook.T, precision="highest") / norms, axis=1)
    products = jnp.matmul(z, codebook.T, precision="highest")
    return jnp.argmin(jnp.sum(jnp.square(codebook), axis=1) - 2.0 * products, axis=1)


def _ours(
    search: Callable[..., jax.Array], z: np.ndarray, codebook: np.ndarray, repeats: int
) -> dict[str, Any]:
    operands = [jnp.asarray(z), jnp.asarray(codebook)]
    compiled = jax.jit(search).lower(*operands).compile()
    indices = np.asarray(compiled(*operands))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"seconds": seconds, "temp_bytes": temporary, "indices": indices}


def _peer(
    python: str, peer: str, spec: Spec, z: np.ndarray, codebook: np.ndarray, repeats: int
) -> dict[str, Any] | None:
    """Runs one library in a process of its own; None where it is not installed."""
    script = pathlib.Path(__file__).with_name("peers.py")
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data.npz"
        np.savez(data, z=z, codebook=codebook)
        request = spec._asdict() | {
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
    parser.add_argument("--python", help="interpreter that has torch, faiss and the quantizers")
    options = parser.parse_args()
    for name in options.shapes.split(","):
        for row in run([name], repeats=options.repeats, python=options.python):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
