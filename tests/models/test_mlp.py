import jax
import jax.numpy as jnp
import numpy as np

from repalign.models.mlp import MLP


def test_mlp_embeds_flattened_images():
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    module = MLP(widths=(6, 5), features=7)
    (out, taps), variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
    params = jax.tree.map(np.asarray, variables["params"])
    hidden = np.asarray(x).reshape(3, -1)
    for number in (1, 2):
        layer = params[f"linear_{number}"]
        hidden = np.maximum(hidden @ layer["kernel"] + layer["bias"], 0.0)
    np.testing.assert_allclose(taps["hidden"], hidden, rtol=1e-5, atol=1e-6)
    last = params["linear_3"]
    np.testing.assert_allclose(out, hidden @ last["kernel"] + last["bias"], rtol=1e-5, atol=1e-6)
    channels_first = module.apply(variables, jnp.moveaxis(x, 3, 1), data_format="NCHW")[0]
    np.testing.assert_allclose(channels_first, out, rtol=1e-5, atol=1e-6)
