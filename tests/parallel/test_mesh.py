"""The mesh and the layout of a state: the rules here, the numbers on 8 simulated devices.

The devices have to exist before JAX starts, so that measurement runs in one process of its own
(this file as a script), which prints one JSON document.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated_devices

from repalign.parallel.mesh import (
    MeshConfig,
    arrange,
    batch_sharding,
    check_batch,
    make_mesh,
    state_shardings,
)
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import loop
from repalign.train.experiment import assemble

TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("fields", "devices", "sizes"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"fsdp": 4}, 8, (1, 2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
        ({"data": 2, "fsdp": 4}, 8, (1, 2, 4, 1)),
        ({"replica": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({}, 1, (1, 1, 1, 1)),
    ],
)
def test_sizes_use_every_device(fields, devices, sizes):
    assert MeshConfig(**fields).sizes(devices) == sizes


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"fsdp": 3}, 8, "does not use all 8 devices; the product must be 8"),
        ({"data": 2}, 8, "data=2, fsdp=1, tensor=1 does not use all 8 devices"),
        ({"fsdp": 16}, 8, r"data=-1 with replica \* fsdp \* tensor a divisor of 8"),
        ({"replica": 3}, 8, "mesh replica=3, data=-1, fsdp=1, tensor=1 does not use all 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(fields, devices, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**fields).sizes(devices)


@pytest.mark.parametrize("fields", [{"data": 0}, {"data": -2}, {"fsdp": 0}, {"replica": -1}])
def test_sizes_that_no_mesh_has_are_errors(fields):
    with pytest.raises(UserError, match="mesh sizes must be positive"):
        MeshConfig(**fields)


def test_a_mesh_of_one_device_copies_everything():
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    assert state_shardings(large, mesh, replicas=False).spec == jax.P()


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What `jax.experimental.mesh_utils` asks of a device that belongs to a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "simulated"
    platform: str = "simulated"


def test_slices_lie_along_the_axis_of_replicas():
    # JAX numbers devices by process, and the slices of one job may alternate.
    devices = [SliceDevice(id=number, slice_index=number % 2) for number in range(8)]
    array = arrange(devices, (2, 2, 2, 1))
    assert array.shape == (2, 2, 2, 1)
    for number in (0, 1):
        assert {device.slice_index for device in array[number].flat} == {number}
    with pytest.raises(UserError, match=r"form 2 slices: mesh\.replica must be 2, not 1"):
        arrange(devices, (1, 4, 2, 1))


def tiny_config():
    """Two steps of the aligned flow, its projector wide enough to be split."""
    return configs.override(
        configs.load_config(f"{TESTS / 'tiny_experiment.py'}:aligned_flow"),
        ["--config.objective.repa.projector_width=300", "--config.total_steps=2"],
    )


def measure():
    """Layouts on eight devices, and a run on a mesh of them."""
    sys.path.insert(0, str(TESTS))
    mesh = make_mesh(MeshConfig(fsdp=4))
    shapes = {
        "matrix": (1024, 512),
        "wide": (256, 4096),
        "odd": (1023, 511),
        "half_odd": (1023, 512),
        "small": (16, 16),
        "vector": (2**17,),
        "scalar": (),
    }

    def specs(shapes, *, replicas):
        leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return {
            name: [list(axis) if isinstance(axis, tuple) else axis for axis in sharding.spec]
            for name, sharding in state_shardings(leaves, mesh, replicas=replicas).items()
        }

    replicated = {name: (4, *shape) for name, shape in shapes.items()}
    report = {
        "specs": specs(shapes, replicas=False),
        "replica_specs": specs(replicated, replicas=True),
        "batch": list(batch_sharding(mesh, replicas=False).spec),
        "replica_batch": list(batch_sharding(mesh, replicas=True).spec),
    }
    try:
        check_batch(12, mesh)
    except UserError as error:
        report["batch_error"] = str(error)

    experiment = assemble(configs.override(tiny_config(), ["--config.mesh.fsdp=4"]))
    with tempfile.TemporaryDirectory() as directory:
        workdir = pathlib.Path(directory)
        result = loop.train(experiment, experiment.source(workdir), workdir)
    leaves = jax.tree.leaves(result.state.params)
    report["loss"] = float(result.metrics["loss"])
    report["norm"] = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)))
    report["split"] = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
    try:
        check_batch(16, mesh, accumulate_steps=3)
    except UserError as error:
        report["microbatch_error"] = str(error)
    return report


@pytest.fixture(scope="module")
def report():
    return json.loads(simulated_devices.output(__file__, optimize=False))


def test_large_arrays_are_split_along_their_largest_axis_that_divides(report):
    assert report["specs"] == {
        "matrix": ["fsdp"],
        "wide": [None, "fsdp"],
        "odd": [],
        "half_odd": [None, "fsdp"],
        "small": [],
        "vector": ["fsdp"],
        "scalar": [],
    }


def test_the_axis_of_replicas_is_never_split(report):
    assert report["replica_specs"] == {
        "matrix": [None, "fsdp"],
        "wide": [None, None, "fsdp"],
        "odd": [],
        "half_odd": [None, None, "fsdp"],
        "small": [],
        "vector": [None, "fsdp"],
        "scalar": [],
    }


def test_a_batch_is_split_over_data_and_fsdp(report):
    assert report["batch"] == [["replica", "data", "fsdp"]]
    assert report["replica_batch"] == [None, ["replica", "data", "fsdp"]]
    assert "batch_size 12 does not divide over the 8 devices" in report["batch_error"]
    assert "8 or 16 would" in report["batch_error"]
    assert "optimizer.accumulate_steps=3 microbatches and the 8" in report["microbatch_error"]
    assert "; 24 would" in report["microbatch_error"]


def test_a_sharded_run_gives_the_numbers_of_one_device(report, tmp_path):
    experiment = assemble(tiny_config())
    result = loop.train(experiment, experiment.source(tmp_path), tmp_path)
    leaves = jax.tree.leaves(result.state.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    np.testing.assert_allclose(report["loss"], result.metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(report["norm"], norm, rtol=1e-4)
    assert report["split"] == 1  # the projector's square matrix


if __name__ == "__main__":
    print(json.dumps(measure()))
