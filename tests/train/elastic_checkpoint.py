"""Run on eight simulated devices: writes a checkpoint on one mesh, reads it on others.

Prints ``read MESH`` for each mesh on which every value came back the same.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repalign.parallel.mesh import MeshConfig, make_mesh, state_shardings
from repalign.parallel.rules import ShardingRules
from repalign.train.checkpoint import Checkpoints
from repalign.train.state import TrainState

RULES = ShardingRules(smallest=1)
MESHES = (MeshConfig(data=8), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2))


def make_state():
    """A state with arrays that FSDP and tensor parallelism split, and a key."""
    keys = jax.random.split(jax.random.key(3), 2)
    kernels = {
        "fc1": {"kernel": jax.random.normal(keys[0], (16, 32))},
        "fc2": {"kernel": jax.random.normal(keys[1], (32, 16))},
    }
    params = {"model": {"mlp": kernels}, "objective": {}}
    fields = {field.name: None for field in dataclasses.fields(TrainState)}
    return TrainState(
        **fields
        | {
            "step": jnp.asarray(7, jnp.int32),
            "key": jax.random.key(11),
            "params": params,
            "optimizer": optax.adam(0.1).init(params),
            "average": jax.tree.map(lambda leaf: 2 * leaf, params["model"]),
        }
    )


def targets(state, mesh):
    """The state's shapes with the shardings that training gives them on a mesh."""
    abstract = jax.eval_shape(lambda: state)
    shardings = state_shardings(abstract, mesh, replicas=False, rules=RULES)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def assert_equal(one, other):
    """Compares two states, keys by their data."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def main(directory):
    state = make_state()
    mesh = make_mesh(MESHES[2])
    placed = jax.tree.map(
        lambda leaf, target: jax.device_put(leaf, target.sharding), state, targets(state, mesh)
    )
    split = placed.params["model"]["mlp"]["fc1"]["kernel"]
    assert split.sharding.shard_shape(split.shape) == (8, 16)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(7, placed, {"step": 7})
        checkpoints.wait()
        for config in MESHES:
            wanted = targets(state, make_mesh(config))
            restored, _ = checkpoints.restore(wanted)
            assert_equal(restored, state)
            kernel = restored.params["model"]["mlp"]["fc1"]["kernel"]
            assert kernel.sharding == wanted.params["model"]["mlp"]["fc1"]["kernel"].sharding
            print("read", config.sizes(8))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
