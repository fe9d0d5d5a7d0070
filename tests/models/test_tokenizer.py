"""The convolutional autoencoder: parameters and outputs of VQGAN's."""

import re

import formula_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.tokenizer import Tokenizer

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = {"dim": 4, "width": 32, "multipliers": (1, 2), "blocks": 1}


@pytest.mark.parametrize(("dim", "parameters"), [(256, 71_879_555), (128, 70_601_219)])
def test_parameters_are_those_of_the_official_f16_model(dim, parameters):
    # CompVis/taming-transformers@3ba01b2, configs/imagenet_vqgan.yaml without its codebook; the
    # second count with embed_dim = z_channels = 128.
    module = Tokenizer(dim=dim)
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    (out, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert out.shape == image.shape and taps["latent"].shape == (2, 16, 16, dim)


PARTS = {
    "to_latent": "quant_conv",
    "from_latent": "post_quant_conv",
}
ATTENTION = {"query": "q", "key": "k", "value": "v", "proj": "proj_out", "norm": "norm"}


def official_name(path):
    part, *layers, leaf = path
    leaf = formula_weights.LEAVES[leaf]
    if layers[0] in PARTS:
        return f"{PARTS[layers[0]]}.{leaf}"
    if len(layers) == 1 and not layers[0].startswith("level"):
        return f"{part}.{layers[0]}.{leaf}"
    inner = layers[-1]
    if "attention" in layers[0]:
        inner = ATTENTION[inner]
    else:
        inner = inner.replace("norm_", "norm").replace("conv_", "conv")
        inner = inner.replace("shortcut", "nin_shortcut")
    if layers[0].startswith("middle"):
        block = layers[0].removeprefix("middle_").replace("attention", "attn_1")
        return f"{part}.mid.{block}.{inner}.{leaf}"
    level, kind, number = re.fullmatch(r"level_(\d)_([a-z]+)_?(\d?)", layers[0]).groups()
    place = f"{part}.{'down' if part == 'encoder' else 'up'}.{int(level) - 1}"
    if kind in ("down", "up"):
        return f"{place}.{kind}sample.conv.{leaf}"
    kind = kind.replace("attention", "attn")
    return f"{place}.{kind}.{int(number) - 1}.{inner}.{leaf}"


def test_latents_and_reconstructions_are_the_official_ones():
    module = Tokenizer(**SMALL)
    x = jnp.asarray(formula_weights.image((2, 16, 16, 3)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = formula_weights.filled(shapes, official_name)
    compiled = jax.jit(module.apply).lower({"params": params}, x).compile(compiler_options=QUICK)
    decoded, taps = compiled({"params": params}, x)
    # CompVis/taming-transformers@3ba01b2: Encoder and Decoder with ch=32, ch_mult=[1, 2],
    # num_res_blocks=1, attn_resolutions=[8], z_channels=4, filled by the formula.
    z = [[-2.964982, 3.3384047, -2.986442, 2.526588]]
    z += [[-1.9461645, 1.5675927, -0.66826284, -0.07108111]]
    np.testing.assert_allclose(taps["latent"][:, 1, 2], z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(taps["latent"]), 56.28128433227539, rtol=2e-5)
    y = [[-0.20043325, -0.47164148, -0.5925012], [-0.14345416, -0.11827916, -0.04261666]]
    np.testing.assert_allclose(decoded[:, 3, 5], y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(decoded), 64.69029998779297, rtol=2e-5)


def test_remat_without_attention_and_half_precision_keep_the_interface():
    module = Tokenizer(**SMALL, attention=False, remat="nothing_saveable", dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    (out, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    plain = jax.eval_shape(Tokenizer(**SMALL, attention=False).init, jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(plain)
    assert not any("attention" in name for name in variables["params"]["encoder"])
    assert (out.dtype, taps["latent"].dtype) == (jnp.float32, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("shape", [(1, 15, 16, 3), (1, 16, 16, 1)])
def test_images_that_do_not_fit_are_named(shape):
    module = Tokenizer(**SMALL)
    with pytest.raises(ValueError, match="do not fit a tokenizer of 3 channels .* divisible by 2"):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
