import dataclasses
import pathlib

import elastic_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulated_devices

from repalign.parallel.mesh import MeshConfig, make_mesh
from repalign.registry import UserError
from repalign.train.checkpoint import Checkpoints
from repalign.train.state import TrainState


def make_state(scale, *, frozen=None):
    params = {"model": {"w": scale * jnp.arange(6.0).reshape(2, 3)}, "objective": {}}
    return TrainState(
        step=jnp.asarray(7, jnp.int32),
        key=jax.random.key(11),
        params=params,
        forward={"mean": scale * jnp.ones(3)},
        objective={"queue": {"rows": scale * jnp.ones((2, 2), jnp.bfloat16)}},
        optimizer=optax.adamw(0.1).init(params),
        average={"w": scale * jnp.ones((2, 3))},
        frozen=frozen,
    )


def abstract(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state
    )


def test_a_state_comes_back_whole_but_for_its_frozen_parameters(tmp_path):
    state = make_state(1.0, frozen={"teacher": jnp.ones(3)})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, state, {"step": 7, "seeds": [0]})
        checkpoints.wait()
        target = dataclasses.replace(abstract(state), frozen=state.frozen)
        restored, iterator = checkpoints.restore(target)
    assert iterator == {"step": 7, "seeds": [0]}
    assert restored.frozen is state.frozen
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    assert jax.random.bits(restored.key) == jax.random.bits(state.key)
    for field in ("step", "params", "objective", "optimizer", "average"):
        one, other = getattr(restored, field), getattr(state, field)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(float(step)), {"step": step})
        checkpoints.wait()
        restored, iterator = checkpoints.restore(abstract(make_state(0.0)))
    assert iterator == {"step": 3} and float(restored.average["w"][0, 0]) == 3.0
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "3"}


def test_a_directory_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_checkpoint_of_one_mesh_is_read_on_others(tmp_path):
    """Written by eight devices that split it, read by eight in other ways and by this one."""
    script = pathlib.Path(elastic_checkpoint.__file__)
    printed = simulated_devices.output(script, tmp_path / "checkpoints")
    assert printed.count("read") == len(elastic_checkpoint.MESHES)
    state = elastic_checkpoint.make_state()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored, iterator = checkpoints.restore(
            elastic_checkpoint.targets(state, make_mesh(MeshConfig()))
        )
    elastic_checkpoint.assert_equal(restored, state)
    assert iterator == {"step": 7}
