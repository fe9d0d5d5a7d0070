"""State of a forward pass on 8 devices: batch statistics and an EMA codebook are those of the whole
batch, as on one device.
"""

import simulated_devices

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from repalign.models.resnet import BatchNorm
from repalign.quantizers.bottleneck import EmaVectorQuantizer
from repalign.train.modules import apply_module

rng = np.random.default_rng(0)
# Every device's examples have a mean of their own: local statistics would be others.
x = rng.normal(size=(16, 3, 3, 4)) + np.arange(16).reshape(16, 1, 1, 1) // 2
x = x.astype(np.float32)
norm, quantizer = BatchNorm(), EmaVectorQuantizer(12, decay=0.9)
variables = norm.init(jax.random.key(0), x)
statistics = {"batch_stats": variables["batch_stats"]}
_, codebook = quantizer.init(jax.random.key(1), 4)

def step(x, params, statistics, codebook):
    def loss(x, params):
        normalized, new_statistics = apply_module(norm, params, statistics, x)
        quantized, new_codebook = quantizer.apply({}, codebook, normalized)
        value = jnp.mean(quantized.loss) + jnp.mean(jnp.sin(quantized.quantized))
        return value, (quantized, new_statistics, new_codebook)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)

arguments = (x, variables["params"], statistics, codebook)
alone = jax.jit(step)(*arguments)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
with jax.set_mesh(mesh):
    rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    compiled = jax.jit(step, in_shardings=(rows, copies, copies, copies)).lower(*arguments)
    compiled = compiled.compile()
    together = compiled(jax.device_put(x, rows), *jax.device_put(arguments[1:], copies))
assert "all-reduce" in compiled.as_text()
moved = np.abs(alone[0][1][1]["batch_stats"]["mean"])
assert np.all(moved > 0.1), moved
def compare(found, expected):
    atol = 2e-5 * max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)
jax.tree.map(compare, together, alone)
np.testing.assert_array_equal(together[0][1][0].indices, alone[0][1][0].indices)
print("compared", len(jax.tree.leaves(alone)))
"""


def test_statistics_and_codebook_are_those_of_the_global_batch():
    printed = simulated_devices.output("-c", SCRIPT, optimize=False)
    # Value, three of the quantizer, mean and variance, three of the codebook, three gradients.
    assert printed.strip() == "compared 12"
