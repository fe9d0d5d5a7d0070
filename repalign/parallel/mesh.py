"""The device mesh of a run and where each array of its state lies on it."""

import dataclasses
import math

import jax
import numpy as np

from repalign.registry import UserError
from repalign.typing import PyTree

BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Fields of the ``mesh`` section: how many devices each axis has.

    Attributes:
        data: splits the batch; -1 takes all devices that the other axes leave.
        fsdp: splits the batch, and parameters and optimizer state with it.
        tensor: splits matrices inside a layer.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.fsdp < 1 or self.tensor < 1 or (self.data < 1 and self.data != -1):
            raise UserError(
                f"mesh sizes must be positive (data may be -1), not data={self.data}, "
                f"fsdp={self.fsdp}, tensor={self.tensor}."
            )

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Returns (data, fsdp, tensor) for a number of devices.

        Raises:
            UserError: the axes do not multiply to that number.
        """
        rest = self.fsdp * self.tensor
        data = devices // rest if self.data == -1 else self.data
        if data * rest != devices or data == 0:
            raise UserError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not use all "
                f"{devices} devices; the product must be {devices}"
                + (f" (data=-1 with fsdp * tensor a divisor of {devices})." if data == 0 else ".")
            )
        return data, self.fsdp, self.tensor


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh with axes data, fsdp and tensor, in automatic sharding mode."""
    devices = jax.devices() if devices is None else devices
    automatic = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.Mesh(
        np.asarray(devices).reshape(config.sizes(len(devices))),
        (*BATCH_AXES, "tensor"),
        axis_types=automatic,
    )


def check_batch(batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the batch does not divide over the mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % shards:
        raise UserError(
            f"data.batch_size {batch_size} does not divide over the {shards} devices of mesh axes "
            f"data and fsdp; {batch_size // shards * shards} or "
            f"{-(-batch_size // shards) * shards} would."
        )


def batch_sharding(mesh: jax.sharding.Mesh, *, replicas: bool) -> jax.sharding.NamedSharding:
    """Examples are split over data and fsdp; a leading axis of replicas is not."""
    leading = (None,) if replicas else ()
    return jax.sharding.NamedSharding(mesh, jax.P(*leading, BATCH_AXES))


def state_shardings(
    abstract_state: PyTree, mesh: jax.sharding.Mesh, *, replicas: bool, smallest: int = 2**16
) -> PyTree:
    """Splits each large array over ``fsdp`` along its largest axis that divides; copies the others.

    Args:
        abstract_state: shapes of the state.
        mesh: the mesh.
        replicas: whether a leading axis counts replicas; that axis is never split.
        smallest: arrays with fewer elements (of one replica) are copied to every device.
    """
    split = mesh.shape["fsdp"]

    def sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        first = 1 if replicas else 0
        sizes = leaf.shape[first:]
        candidates = [axis for axis, size in enumerate(sizes) if size % split == 0]
        if split == 1 or math.prod(sizes) < smallest or not candidates:
            return jax.sharding.NamedSharding(mesh, jax.P())
        largest = max(candidates, key=lambda axis: sizes[axis]) + first
        return jax.sharding.NamedSharding(mesh, jax.P(*(None,) * largest, "fsdp"))

    return jax.tree.map(sharding, abstract_state)
