"""Losses with batch statistics: sharding over 8 devices changes neither value nor gradient."""

import simulated_devices

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from repalign.losses import clustering, joint_embedding, regularizers

rng = np.random.default_rng(0)
a = rng.normal(size=(16, 6)).astype(np.float32)
b = (a + rng.normal(size=(16, 6))).astype(np.float32)
center = np.ones(6, np.float32)
losses = {
    "barlow_twins": joint_embedding.barlow_twins,
    "vicreg": joint_embedding.vicreg,
    "tico": lambda a, b: joint_embedding.tico(a, b, jnp.zeros((6, 6))),
    "mmcr": lambda a, b: joint_embedding.mmcr(a[:, None], b[:, None]),
    "koleo": lambda a, b: regularizers.koleo(a),
    "sinkhorn": lambda a, b: clustering.sinkhorn(a),
    "swapped_assignment": lambda a, b: clustering.swapped_assignment([a, b], []),
    "dino": lambda a, b: clustering.dino([b], [b, a], center),
}

def everything(a, b):
    def loss(a, b):
        outputs = {name: function(a, b) for name, function in losses.items()}
        # Weighting sinkhorn's entries keeps its gradient from vanishing.
        weights = jnp.arange(96.0).reshape(16, 6)
        scalars = {
            name: jnp.sum(weights * value) if name == "sinkhorn" else jax.tree.leaves(value)[0]
            for name, value in outputs.items()
        }
        return scalars, outputs
    jacobian, outputs = jax.jacrev(loss, argnums=(0, 1), has_aux=True)(a, b)
    return jacobian, outputs

options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
alone = jax.jit(everything).lower(a, b).compile(options)(a, b)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, P("data"))
    sharded = [jax.device_put(x, rows) for x in (a, b)]
    assert len(sharded[0].sharding.device_set) == 8
    step = jax.jit(everything, in_shardings=(rows, rows)).lower(*sharded).compile(options)
    together = step(*sharded)
assert "all-reduce" in step.as_text() or "all-gather" in step.as_text()
for path, expected in jax.tree_util.tree_leaves_with_path(alone):
    result = together
    for entry in path:
        result = result[entry.idx if hasattr(entry, "idx") else entry.key]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        result, expected, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path)
    )
gradients = alone[0]
assert all(np.any(gradients[name][0]) for name in losses), "a gradient that says nothing"
print("compared", len(jax.tree.leaves(alone)))
"""


def test_sharded_batch_equals_one_device():
    printed = simulated_devices.output("-c", SCRIPT)
    # 8 losses with two gradients each, 8 outputs, and two states.
    assert printed.strip() == "compared 26"
