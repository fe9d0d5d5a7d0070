"""The audit of parameters that lie whole on every device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from repalign.parallel.audit import audit, check_replication
from repalign.parallel.mesh import state_shardings
from repalign.parallel.rules import MESH_AXES, ShardingRules
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import loop
from repalign.train.experiment import assemble

PARAMS = {
    "even": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
    "odd": jax.ShapeDtypeStruct((301, 333), jnp.float32),
    "odder": jax.ShapeDtypeStruct((401, 333), jnp.float32),
    "half": jax.ShapeDtypeStruct((1001, 333), jnp.bfloat16),
    "small": jax.ShapeDtypeStruct((101,), jnp.float32),
}


def shardings(params, *, fsdp=1, tensor=1, replicas=False, **rules):
    mesh = AbstractMesh((1, 2, fsdp, tensor), MESH_AXES)
    return state_shardings(params, mesh, replicas=replicas, rules=ShardingRules(**rules))


def test_lists_what_no_axis_splits_with_bytes():
    found = audit(PARAMS, shardings(PARAMS, fsdp=4), replicas=False)
    assert [(array.path, array.shape, array.size) for array in found.replicated] == [
        ("half", (1001, 333), 1001 * 333 * 2),
        ("odder", (401, 333), 401 * 333 * 4),
        ("odd", (301, 333), 301 * 333 * 4),
    ]
    assert found.total == 4 * (1024**2 + 333 * (301 + 401) + 101) + 2 * 1001 * 333
    expected = sum(array.size for array in found.replicated) / found.total
    assert found.share == pytest.approx(expected) and expected > 0.2


def test_too_much_replication_is_an_error_that_names_the_largest():
    layout = shardings(PARAMS, fsdp=4)
    message = (
        r"27\.\d% of the parameter bytes lie whole on every device of the mesh data=2, fsdp=4, and "
        r"2\.0% may.*Largest: half \(1001, 333\), odder \(401, 333\), odd \(301, 333\)\..*"
        r"max_replicated=0\.28"
    )
    with pytest.raises(UserError, match=message):
        check_replication(PARAMS, layout, replicas=False)
    allowed = check_replication(
        PARAMS, layout, replicas=False, rules=ShardingRules(max_replicated=0.28)
    )
    assert len(allowed.replicated) == 3


def test_copies_on_purpose_are_no_accident():
    # No axis of the mesh is there to split parameters.
    assert check_replication(PARAMS, shardings(PARAMS), replicas=False).share == 0
    # 300 layers of a small array are still small arrays; so are 300 seeds.
    stacked = {"layers": {"bias": jax.ShapeDtypeStruct((300, 999), jnp.float32)}}
    assert check_replication(stacked, shardings(stacked, fsdp=4), replicas=False).share == 0
    layout = shardings(stacked["layers"], fsdp=4, replicas=True)
    assert check_replication(stacked["layers"], layout, replicas=True).share == 0
    assert audit(stacked["layers"], shardings(stacked["layers"], fsdp=7), replicas=False).share == 1


def test_a_module_without_a_rule_on_a_tensor_mesh_is_found():
    conv = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 256, 256), jnp.float32)}}
    with pytest.raises(UserError, match=r"100\.0% .* tensor=2.* conv/kernel \(3, 3, 256, 256\)"):
        check_replication(conv, shardings(conv, tensor=2), replicas=False)
    assert check_replication(conv, shardings(conv, fsdp=2, tensor=2), replicas=False).share == 0


def test_the_largest_repa_model_divides_over_128_but_not_over_256():
    experiment = assemble(configs.load_config("repa:imagenet256_xl2"))
    spec = loop.batch_spec(experiment, experiment.example_spec())
    params = loop.abstract_state(experiment, 1000, spec).params
    assert audit(params, shardings(params, fsdp=128), replicas=False).replicated == ()
    with pytest.raises(UserError, match=r"22\.1% .*attention/qkv/kernel \(28, 1152, 3456\)"):
        check_replication(params, shardings(params, fsdp=256), replicas=False)
