"""What a compiled step needs of a machine that nobody has at hand: memory, traffic, time.

The compiler for TPUs (libtpu) and for an H100 (jax[cuda13]) runs on a machine with neither. This
module holds what does not depend on what is compiled; `repalign.train.plan` plans experiments.
"""

import importlib.resources
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from repalign.parallel.chips import GIB, Topology
from repalign.parallel.hlo_cost import Collective, Cost, cost
from repalign.parallel.roofline import Roofline, roofline
from repalign.registry import UserError

_PACKAGES = {
    "tpu": ("libtpu", "pip install 'repalign[plan]'"),
    "cuda": ("jax_cuda13_plugin", "pip install 'repalign[cuda]'"),
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemory(Exception):
    """The compiler found no way to fit a program into a device.

    Attributes:
        needed, available: bytes, as the compiler states them.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"needs {needed / GIB:.2f} GiB of the {available / GIB:.2f} GiB that a device has, "
            f"{(needed - available) / GIB:.2f} GiB too much"
        )
        self.needed, self.available = needed, available


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
        arguments, outputs: the state and the batch; the state and the metrics.
        aliased: of the outputs, what is written over the arguments.
        temporaries: everything else that lives during a step.
        capacity: what a program can have.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    capacity: float

    @property
    def total(self) -> int:
        """Bytes in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class Step(NamedTuple):
    """What a compiled step costs one device."""

    memory: Memory
    cost: Cost
    roofline: Roofline
    bandwidths: Mapping[Collective, float]


def check_compiler(topology: Topology) -> None:
    """Raises UserError if the compiler for a topology is not installed."""
    package, fix = _PACKAGES[topology.chip.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"compiling for {topology.name} needs {package}, which is not installed: {fix}."
        )


def compiler_environment() -> dict[str, str]:
    """Returns the environment of a process that compiles for devices it does not have.

    The variables have to be there before jax starts. libtpu otherwise asks the cloud's metadata
    server what it runs on, and lets one process at a time load it.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology, good for compiling only."""
    from jax.experimental import topologies

    platform, options = topology.chip.platform, topology.options()
    if platform == "cuda":
        described = importlib.resources.files("repalign.kernels") / "h100.txtpb"
        options["target_config"] = described.read_text()
    name = topology.name if platform == "tpu" else topology.chip.name
    return list(
        topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    )


def measure(compiled: Any, mesh: jax.sharding.Mesh, topology: Topology) -> Step:
    """Returns what a compiled program costs one device of a mesh of ``topology``'s devices."""
    sizes = compiled.memory_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        topology.chip.usable_memory,
    )
    counted = cost(compiled.as_text(), mesh=dict(mesh.shape))
    places = [_place(device, topology) for device in mesh.devices.flat]
    bandwidths = {
        one.collective: topology.bandwidth([places[member] for member in one.collective.group])
        for one in counted.collectives
    }
    times = roofline(counted, topology.chip, bandwidths.__getitem__)
    return Step(memory, counted, times, bandwidths)


def out_of_memory(error: Exception) -> OutOfMemory | None:
    """Returns what the compiler's RESOURCE_EXHAUSTED says; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for pattern in (
        r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)",
        r"\(([\d.]+)([KMGT]?)i?B?\) exceeds available \w+ \(([\d.]+)([KMGT]?)",
    ):
        found = re.search(pattern, text)
        if found:
            needed, available = (float(found[place]) * _UNITS[found[place + 1]] for place in (1, 3))
            return OutOfMemory(needed, available)
    return None


def collective_rows(step: Step) -> list[dict[str, Any]]:
    """Returns the collectives by kind and axes: calls, bytes, seconds, where most comes from."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    largest: dict[tuple[str, str], float] = {}
    for one in step.cost.collectives:
        called = one.collective
        key = (called.kind, called.axes)
        row = rows.setdefault(
            key,
            {"kind": called.kind, "axes": called.axes, "devices": len(called.group), "calls": 0}
            | {"bytes": 0.0, "sent_bytes": 0.0, "seconds": 0.0, "mostly": ""},
        )
        sent = one.count * called.sent
        row["calls"] += one.count
        row["bytes"] += one.count * called.bytes
        row["sent_bytes"] += sent
        row["seconds"] += sent / step.bandwidths[called]
        if sent >= largest.setdefault(key, 0.0):
            largest[key], row["mostly"] = sent, called.source
    return sorted(rows.values(), key=lambda row: -row["sent_bytes"])


def _place(device: Any, topology: Topology) -> tuple[int, ...]:
    """Returns where a device is: its chip in the torus, or its host and number there."""
    if topology.chip.platform == "tpu":
        return tuple(device.coords)[: len(topology.shape)]
    return divmod(device.id, topology.shape[1])
