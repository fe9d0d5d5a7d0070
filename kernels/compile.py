"""Compiles the Pallas kernels for hardware this machine lacks, and bounds what they can reach.

    python -m repalign.kernels.compile --target v5e:2x2 [--op codebook] [--first N]
        [--format text|json] [--out FILE]

Targets: ``v5e:2x2``, ``v5p:2x2x1``, ``v6e:2x2``, ``tpu7x:2x2x1`` (any topology libtpu knows; one
device of it is compiled for) and ``h100``. TPU targets need ``libtpu`` (``pip install
repalign[plan]``), h100 needs ``jax[cuda13]``; without them the command ends with exit status 2. It
ends with 1 if a case does not compile.

What is reported is computed, not measured. ``fast_memory_bytes`` is what the compiler reserved for
the largest kernel of a case:

* TPU: scoped VMEM, the sum of ``used_scoped_memory_configs`` of memory space 1 in the backend
  configuration that libtpu leaves on every ``tpu_custom_call`` of the compiled module: windows (two
  of each where they are pipelined), scratch and Mosaic's own. Operands and results that XLA itself
  placed in VMEM are not in it.
* GPU: dynamic shared memory of a block, the last operand of ``gpu.launch`` in the Mosaic module
  that the lowered program carries (barriers included). The step from there to machine code happens
  on the device, so registers and spills are not known here.

``bound_seconds`` is the roofline of ``chips.Chip.bound``: no run can take less.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import dialect as mosaic_gpu_dialect
from jax.extend.mlir import ir
from jax.interpreters import mlir

from repalign.kernels.case import Case
from repalign.kernels.chips import CHIPS, Chip

OPS = ("attention", "codebook", "contrastive", "neighbors")
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
PACKAGES = {"tpu": ("libtpu", "repalign[plan]"), "gpu": ("jax-cuda13-plugin", "jax[cuda13]")}


class MissingPackageError(RuntimeError):
    """The compiler for a target is not installed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m repalign.kernels.compile",
        description="Compiles the Pallas kernels for hardware this machine lacks.",
    )
    parser.add_argument("--target", required=True, help="v5e:2x2, v5p:2x2x1, v6e:2x2, ..., h100")
    parser.add_argument("--op", choices=OPS, action="append", help="again for more; all by default")
    parser.add_argument("--first", type=int, help="only the first N cases of an op")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    try:
        result = compile_all(options.target, options.op or OPS, first=options.first)
    except (MissingPackageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    encoded = json.dumps(result, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(encoded)
    print(encoded if options.format == "json" else as_text(result), end="")
    return int(any(row["error"] for row in result["cases"]))


def compile_all(target: str, ops: Sequence[str], *, first: int | None = None) -> dict[str, Any]:
    """Compiles the ``first`` cases (all by default) of every op; returns the report.

    Raises:
        MissingPackageError: the target's compiler is not installed.
        ValueError: there is no such target.
    """
    chip, device = _device(target)
    rows = []
    for op in ops:
        bench = importlib.import_module(f"repalign.kernels.{op}.bench")
        cases = list(bench.cases(KERNELS[chip.platform]).items())
        rows += [
            {"op": op, "case": name} | compile_case(case, chip, device)
            for name, case in cases[:first]
        ]
    package = PACKAGES[chip.platform][0]
    return {
        "kind": "bounds, computed from the compiled program; nothing was timed",
        "target": target,
        "device_kind": chip.device_kind,
        "jax": jax.__version__,
        package: importlib.metadata.version(package),
        "fast_memory_bytes_of_device": chip.fast_memory,
        "cases": rows,
    }


def compile_case(case: Case, chip: Chip, device: Any) -> dict[str, Any]:
    """Compiles one case for a device of a topology; returns its row of the report."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        case.arguments,
    )
    seconds, binding = chip.bound(
        flops=float(case.flops),
        bytes=float(case.bytes),
        vector_operations=float(case.vector_operations),
    )
    row: dict[str, Any] = {
        "error": None,
        "kernels": None,
        "hbm_temporary_bytes": None,
        "fast_memory_bytes": None,
        "flops": case.flops,
        "bytes": case.bytes,
        "vector_operations": case.vector_operations,
        "bound_seconds": seconds,
        "bound_by": binding,
    }
    platform = {"tpu": "tpu", "gpu": "cuda"}[chip.platform]
    try:
        with jax.sharding.use_abstract_mesh(chip.described()):
            traced = jax.jit(lambda *operands: case.function(*operands)).trace(*arguments)
            lowered = traced.lower(lowering_platforms=(platform,))
        compiled = lowered.compile()
    except Exception as error:
        # Lowering raises many types. The report goes on, and the exit status is not 0.
        reason = " ".join(str(error).split())[:500]
        return row | {"error": f"{type(error).__name__}: {reason}"}
    used = vmem_bytes(compiled.as_text()) if platform == "tpu" else shared_bytes(lowered)
    return row | {
        "kernels": len(used),
        "hbm_temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "fast_memory_bytes": max(used, default=None),
    }


def vmem_bytes(compiled_text: str) -> list[int]:
    """Returns the scoped VMEM of every ``tpu_custom_call`` in the text of a compiled module."""
    found = []
    for line in compiled_text.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        configs = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', line)
        entries = json.loads(configs[1]) if configs else []
        found.append(sum(int(one["size"]) for one in entries if one["memory_space"] == "1"))
    return found


def shared_bytes(lowered: jax.stages.Lowered) -> list[int]:
    """Returns the dynamic shared memory of a block of every Mosaic GPU kernel in a module."""
    found: list[int] = []

    def visit_kernel(operation: ir.Operation) -> ir.WalkResult:
        if operation.name.endswith("gpu.launch"):
            size = operation.operands[len(operation.operands) - 1].owner
            found.append(ir.IntegerAttr(size.attributes["value"]).value)
        return ir.WalkResult.ADVANCE

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            if target.startswith("mosaic_gpu"):
                config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
                with _kernel_context():
                    kernel = ir.Module.parse(ir.StringAttr(config["module"]).value_bytes)
                    kernel.operation.walk(visit_kernel)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def _kernel_context() -> ir.Context:
    """Returns a context that reads a serialised Mosaic GPU kernel."""
    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    context.allow_unregistered_dialects = True
    return context


def as_text(result: dict[str, Any]) -> str:
    """Returns the report as a table."""
    lines = [
        f"{result['target']} ({result['device_kind']}), jax {result['jax']}: {result['kind']}",
        f"{'case':44} {'temp MiB':>9} {'fast KiB':>9} {'bound us':>10}  bound by",
    ]
    for row in result["cases"]:
        name = f"{row['op']}/{row['case']}"
        if row["error"]:
            lines.append(f"{name:44} does not compile: {row['error']}")
            continue
        temporary = row["hbm_temporary_bytes"] / 2**20
        fast = "none" if row["fast_memory_bytes"] is None else row["fast_memory_bytes"] // 1024
        bound = f"{1e6 * row['bound_seconds']:.1f}"
        lines.append(f"{name:44} {temporary:9.1f} {fast:>9} {bound:>10}  {row['bound_by']}")
    return "\n".join(lines) + "\n"


def _device(target: str) -> tuple[Chip, Any]:
    """Returns the chip of a target and one device of its topology."""
    name, _, shape = target.partition(":")
    if name not in CHIPS:
        raise ValueError(f"unknown target {target!r}; known chips: {', '.join(CHIPS)}.")
    chip = CHIPS[name]
    package, extra = PACKAGES[chip.platform]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"{target} is compiled by {package}, which is not installed: pip install '{extra}'."
        ) from error
    if chip.platform == "gpu":
        description = pathlib.Path(__file__).with_name(f"{name}.txtpb").read_text()
        options = {"topology_name": name, "topology": "1x1x1", "target_config": description}
        return chip, topologies.get_topology_desc(platform="cuda", **options).devices[0]
    if not shape:
        raise ValueError(f"target {target!r} lacks its topology, as in 'v5e:2x2'.")
    # libtpu looks for a machine of its own, says so at length, and wants to be the only process.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    try:
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu does not give topology {target!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
