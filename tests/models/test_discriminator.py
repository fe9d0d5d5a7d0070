import formula_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.discriminator import PatchDiscriminator


def official_name(path):
    layer, leaf = path
    kind, number = layer.split("_")
    # The official layers stand in one sequence: convolution, norm, activation; the norm's names
    # were read as ``bn`` there, so that the formula knows them.
    position = 0 if number == "1" else 3 * int(number) - 4
    place = f"main.{position}" if kind == "conv" else f"bn.{position + 1}"
    return f"{place}.{formula_weights.LEAVES[leaf]}"


def test_logits_are_the_official_ones():
    module = PatchDiscriminator(width=8, layers=2)
    x = jnp.asarray(formula_weights.image((2, 16, 16, 3)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = formula_weights.filled(shapes, official_name)
    logits, taps = jax.jit(module.apply)({"params": params}, x)
    # CompVis/taming-transformers@3ba01b2: NLayerDiscriminator(ndf=8, n_layers=2) in training.
    expected = [
        [[0.35044783, 0.3858325], [-0.1034648, -0.2046003]],
        [[0.27586347, 0.17504236], [-0.11313595, -0.0510397]],
    ]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert taps == {}


def test_parameters_and_precision_at_full_scale():
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    module = PatchDiscriminator(dtype=jnp.bfloat16)
    (logits, _), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 2_765_633
    assert (logits.shape, logits.dtype) == ((2, 30, 30), jnp.float32)


def test_an_image_smaller_than_a_patch_is_named():
    module = PatchDiscriminator(layers=3)
    shapes = [jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32) for side in (23, 24)]
    with pytest.raises(ValueError, match=r"\(23, 23\) are too small .* 3 layers, .* 24 pixels"):
        jax.eval_shape(module.init, jax.random.key(0), shapes[0])
    assert jax.eval_shape(module.init_with_output, jax.random.key(0), shapes[1])[0][0].shape == (
        1,
        1,
        1,
    )
