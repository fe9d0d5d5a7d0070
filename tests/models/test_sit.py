"""SiT: sizes, loop against scan, taps, labels, initialisation and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.sit import SIZES, SiT
from repalign.models.transformer import stack_blocks, unstack_blocks

TINY = {
    "image_size": 4,
    "patch_size": 2,
    "channels": 3,
    "width": 16,
    "depth": 3,
    "heads": 2,
    "classes": 5,
    "taps": (1, 3),
}


def inputs(seed: int = 0):
    x = jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))
    return x, jnp.array([0.1, 0.9]), jnp.array([4, 5])


def perturbed(variables):
    """Adds noise, so that nothing is zero."""
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


@pytest.mark.parametrize(("name", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_papers(name, millions):
    module = SiT(**SIZES[name], patch_size=2, scan=True)
    x, t, y = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(millions * 1e6, rel=0.01)


@pytest.fixture(scope="module")
def variables():
    return perturbed(SiT(**TINY).init(jax.random.key(0), *inputs()))


def as_scan(params):
    return {**params, "blocks": stack_blocks(params["blocks"])}


def loss_and_taps(params, module):
    out, taps = module.apply({"params": params}, *inputs())
    return jnp.sum(jnp.square(out)) + jnp.sum(taps["block_1"] ** 3), (out, taps)


@functools.partial(jax.jit, static_argnums=1)
def value_and_grad(params, module):
    return jax.value_and_grad(loss_and_taps, has_aux=True)(params, module)


def test_loop_scan_and_remat_agree_in_values_taps_and_gradients(variables):
    params = variables["params"]
    (_, (out, taps)), grads = value_and_grad(params, SiT(**TINY))
    assert set(taps) == {"block_1", "block_3"}
    assert float(jnp.abs(out).max()) > 0.1
    (_, (scan_out, scan_taps)), scan_grads = value_and_grad(
        as_scan(params), SiT(**TINY, scan=True, remat="nothing_saveable")
    )
    assert set(scan_taps) == set(taps)
    np.testing.assert_allclose(scan_out, out, rtol=1e-4, atol=1e-5)
    for name, tap in taps.items():
        np.testing.assert_allclose(scan_taps[name], tap, rtol=1e-4, atol=1e-5)
    for expected, actual in zip(
        jax.tree.leaves(as_scan(grads)), jax.tree.leaves(scan_grads), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_loop_and_scan_parameters_convert_into_each_other(variables):
    params = variables["params"]
    scanned = as_scan(params)
    x, t, y = inputs()
    shapes = jax.eval_shape(SiT(**TINY, scan=True).init, jax.random.key(0), x, t, y)["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, shapes)
    back = {**scanned, "blocks": unstack_blocks(scanned["blocks"])}
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


def test_untrained_model_returns_zero_and_initialisation_is_the_official():
    params = SiT(**{**TINY, "width": 64}).init(jax.random.key(0), *inputs())["params"]
    out, _ = SiT(**{**TINY, "width": 64}).apply({"params": params}, *inputs())
    assert not out.any()
    block = params["blocks"]["block_2"]
    assert not block["modulation"]["kernel"].any()
    assert not params["final"]["kernel"].any()
    qkv = block["attention"]["qkv"]["kernel"]
    assert float(jnp.abs(qkv).max()) == pytest.approx((6 / (64 + 192)) ** 0.5, rel=0.01)
    assert float(params["label_embedding"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params["time_1"]["kernel"].std()) == pytest.approx(0.02, rel=0.1)
    # The position table is a constant.
    assert not any("position" in name for name in params)


def test_null_label_data_format_and_time_change_the_output_as_they_should(variables):
    module = SiT(**TINY)
    x, t, y = inputs()
    apply = jax.jit(lambda x, t, y: module.apply(variables, x, t, y)[0])
    out = apply(x, t, y)
    assert np.abs(apply(x, t, jnp.array([5, 5]))[0] - out[0]).max() > 1e-3
    np.testing.assert_allclose(apply(x, t, jnp.array([5, 5]))[1], out[1], rtol=1e-5, atol=1e-6)
    assert np.abs(apply(x, t + 0.05, y) - out).max() > 1e-3
    channels_first, _ = module.apply(variables, x.transpose(0, 3, 1, 2), t, y, data_format="NCHW")
    np.testing.assert_allclose(channels_first.transpose(0, 2, 3, 1), out, rtol=1e-5, atol=1e-5)


def test_unconditional_model_has_no_labels():
    module = SiT(**{**TINY, "classes": 0})
    x, t, _ = inputs()
    variables = module.init(jax.random.key(0), x, t)
    assert "label_embedding" not in variables["params"]
    assert module.apply(variables, x, t)[0].shape == x.shape


def test_bfloat16_computes_in_bfloat16_and_returns_the_inputs_dtype(variables):
    x, t, y = inputs()
    exact, _ = SiT(**TINY).apply(variables, x, t, y)
    out, taps = SiT(**TINY, dtype=jnp.bfloat16).apply(variables, x, t, y)
    assert out.dtype == jnp.float32
    assert taps["block_1"].dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) < 0.05


def test_mistakes_are_named(variables):
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"taps \[4\] are no blocks of 1..3"):
        SiT(**{**TINY, "taps": (4,)}).apply(variables, x, t, y)
    with pytest.raises(ValueError, match="pass labels"):
        SiT(**TINY).apply(variables, x, t)
    with pytest.raises(ValueError, match=r"takes images of \(4, 4, 3\)"):
        SiT(**TINY).apply(variables, x[:, :2], t, y)
