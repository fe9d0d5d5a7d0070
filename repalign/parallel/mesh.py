"""The device mesh of a run and where each array of its state lies on it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from repalign.numerics import BATCH_AXES
from repalign.parallel.rules import DEFAULT_RULES, MESH_AXES, AnyMesh, ShardingRules, path_name
from repalign.registry import UserError, from_section
from repalign.typing import PyTree


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Fields of the ``mesh`` section: how many devices each axis has.

    Attributes:
        data: splits the batch; -1 takes all devices that the other axes leave.
        fsdp: splits the batch, and parameters and optimizer state with it.
        tensor: splits matrices inside a layer.
        replica: slices (of TPUs, joined by a network slower than their own): each holds a whole
            copy of what the inner axes split, and its part of the batch. Not to be confused with
            the replicas of several seeds, which no mesh axis splits.
        explicit: axes of `jax.sharding.AxisType.Explicit`: every array's layout is part of its
            type, and an operation whose layout is ambiguous is an error. Otherwise the compiler
            chooses.
        rules: fields of `repalign.parallel.rules.ShardingRules` that differ from its defaults.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replica: int = 1
    explicit: bool = False
    rules: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: dataclasses.asdict(ShardingRules())
    )

    def __post_init__(self) -> None:
        others = (self.replica, self.fsdp, self.tensor)
        if min(others) < 1 or (self.data < 1 and self.data != -1):
            raise UserError(f"mesh sizes must be positive (data may be -1), not {self._text()}.")
        self.sharding_rules()

    def sharding_rules(self) -> ShardingRules:
        """Returns the rules as a dataclass; a UserError if they cannot be."""
        return from_section(ShardingRules, self.rules, place="config.mesh.rules")

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """Returns (replica, data, fsdp, tensor) for a number of devices.

        Raises:
            UserError: the axes do not multiply to that number.
        """
        rest = self.replica * self.fsdp * self.tensor
        data = devices // rest if self.data == -1 else self.data
        if data * rest != devices or data == 0:
            raise UserError(
                f"mesh {self._text()} does not use all {devices} devices; the product must be "
                f"{devices} (data=-1 with replica * fsdp * tensor a divisor of {devices})."
            )
        return self.replica, data, self.fsdp, self.tensor

    def _text(self) -> str:
        slices = f"replica={self.replica}, " if self.replica != 1 else ""
        return f"{slices}data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh with axes replica, data, fsdp and tensor.

    Neighbours on the inner axes are neighbours in the machine: JAX's own order of the devices of a
    TPU slice, slices along ``replica``.

    Raises:
        UserError: sizes that do not use all devices, or ``replica`` not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    kind = jax.sharding.AxisType.Explicit if config.explicit else jax.sharding.AxisType.Auto
    return jax.sharding.Mesh(
        arrange(devices, config.sizes(len(devices))),
        MESH_AXES,
        axis_types=(kind,) * len(MESH_AXES),
    )


def arrange(devices: Sequence[Any], sizes: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the devices as an array of (replica, data, fsdp, tensor)."""
    slices = {device.slice_index for device in devices if hasattr(device, "slice_index")}
    if len(slices) < 2:
        return mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    if sizes[0] != len(slices):
        raise UserError(
            f"the devices form {len(slices)} slices: mesh.replica must be {len(slices)}, not "
            f"{sizes[0]}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]),
        (sizes[0], 1, 1, 1),
        list(devices),
        allow_split_physical_axes=True,
    )


def check_batch(batch_size: int, mesh: AnyMesh, *, accumulate_steps: int = 1) -> None:
    """Raises UserError if the batch does not divide into microbatches, and these over the mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = shards * accumulate_steps
    if batch_size % parts:
        splits = f"the {shards} devices of mesh axes {', '.join(BATCH_AXES)}"
        if accumulate_steps > 1:
            splits = f"optimizer.accumulate_steps={accumulate_steps} microbatches and {splits}"
        below = batch_size // parts * parts
        valid = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {splits}; {valid} would."
        )


def batch_sharding(mesh: AnyMesh, *, replicas: bool) -> jax.sharding.NamedSharding:
    """Examples are split over replica, data and fsdp; a leading axis of seeds is not."""
    leading = (None,) if replicas else ()
    return jax.sharding.NamedSharding(mesh, jax.P(*leading, BATCH_AXES))


def state_shardings(
    abstract_state: PyTree,
    mesh: AnyMesh,
    *,
    replicas: bool,
    rules: ShardingRules = DEFAULT_RULES,
) -> PyTree:
    """Returns where every array of a state lies: see `repalign.parallel.rules.ShardingRules`.

    Args:
        abstract_state: shapes of the state, or of a part of it.
        mesh: the mesh.
        replicas: whether a leading axis counts replicas of several seeds; it is never split.
        rules: which mesh axis splits what.

    Raises:
        UserError: an array that cannot be split as the rules say.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.sharding.NamedSharding(
            mesh, rules.spec(path_name(path), leaf.shape, mesh, replicas=replicas)
        ),
        abstract_state,
    )
