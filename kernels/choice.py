"""Which implementation runs: what ``implementation=None`` chose and why, and on which device."""

from collections.abc import Iterable
from typing import NamedTuple

import jax


class Choice(NamedTuple):
    """What ``choose`` of an op returns.

    Attributes:
        implementation: a name in the op's ``IMPLEMENTATIONS``.
        reason: one sentence.
    """

    implementation: str
    reason: str


def check(implementation: str, implementations: Iterable[str]) -> str:
    """Returns ``implementation`` if it is one of ``implementations``.

    Raises:
        ValueError: it is not; the message lists those that are.
    """
    valid = list(implementations)
    if implementation not in valid:
        raise ValueError(f"unknown implementation {implementation!r}; valid: {', '.join(valid)}.")
    return implementation


def present_device() -> jax.sharding.AbstractDevice:
    """Returns the device that a program traced here is for: its kind, cores and platform.

    That is the device of the mesh in use (which may be a description of hardware this machine
    lacks, as when compiling ahead of time), or else the first one of the default backend.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described
    device = jax.devices()[0]
    count = {"tpu": "num_cores", "gpu": "core_count"}
    cores = getattr(device, count[device.platform]) if device.platform in count else None
    return jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=cores, platform=device.platform
    )


def is_partitioned() -> bool:
    """Whether the compiler may split what is traced here over several devices.

    It cannot split a Pallas kernel. Inside ``jax.shard_map`` nothing is left to split. Without a
    mesh in use, arrays may still carry shardings of their own, which tracing does not see.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    manual = jax.sharding.AxisType.Manual
    return any(
        size > 1 and kind != manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def is_hopper(device: jax.sharding.AbstractDevice) -> bool:
    """Whether the device has Hopper's asynchronous matrix products, which later chips lack."""
    return any(chip in device.device_kind for chip in ("H100", "H200", "H800", "GH200"))
