"""Heads and the convolutional encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.convnet import ConvNet
from repalign.models.heads import LinearClassifier, MLPHead, Projector


def test_projector_is_three_linears_with_silu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    out, variables = Projector(5, hidden=16).init_with_output(jax.random.key(1), x)
    params = variables["params"]
    expected = x
    for number in (1, 2, 3):
        layer = params[f"linear_{number}"]
        expected = expected @ layer["kernel"] + layer["bias"]
        if number < 3:
            expected = expected / (1 + jnp.exp(-expected))
    assert out.shape == (2, 3, 5)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_mlp_head_norms():
    x = jax.random.normal(jax.random.key(0), (6, 8))
    for norm, count in ((None, 0), ("batch", 2), ("layer", 2)):
        head = MLPHead(4, hidden=16, layers=3, norm=norm)
        out, variables = head.init_with_output(jax.random.key(1), x)
        assert out.shape == (6, 4)
        assert sum(name.startswith("norm") for name in variables["params"]) == count
    # A batch norm takes away what all examples share; a layer norm does not.
    batch = MLPHead(4, hidden=16, norm="batch")
    variables = batch.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        batch.apply(variables, x + 1.0), batch.apply(variables, x), rtol=1e-3, atol=1e-4
    )


def test_a_last_batch_norm_has_no_bias_and_the_layers_before_one_neither():
    x = jax.random.normal(jax.random.key(0), (6, 8))
    head = MLPHead(4, hidden=16, norm="batch", norm_last=True)
    out, variables = head.init_with_output(jax.random.key(1), x)
    # SimCLR's head: two matrices, scale and bias of the first norm, scale of the last.
    shapes = {
        "linear_1": {"kernel": (8, 16)},
        "linear_2": {"kernel": (16, 4)},
        "norm_1": {"scale": (16,), "bias": (16,)},
        "norm_2": {"scale": (4,)},
    }
    assert jax.tree.map(jnp.shape, variables["params"]) == shapes
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=0), 1, rtol=1e-3)


def test_linear_classifier_starts_uniform():
    out, _ = LinearClassifier(3).init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    assert out.shape == (2, 3)
    assert not out.any()


@pytest.mark.parametrize(("side", "groups"), [(28, 8), (32, 0)])
def test_convnet_maps_small_images_to_four_by_four(side, groups):
    x = jax.random.normal(jax.random.key(0), (2, side, side, 1))
    module = ConvNet((8, 16, 24), groups=groups, taps=(1,))
    (out, taps), variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
    assert set(variables) == {"params"}
    assert taps["map"].shape == (2, 4, 4, 24)
    assert taps["stage_1"].shape == (2, side // 2, side // 2, 8)
    np.testing.assert_allclose(out, taps["map"].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    assert np.abs(out[0] - out[1]).max() > 1e-3


def test_convnet_names_a_wrong_tap():
    with pytest.raises(ValueError, match=r"taps \[4\]"):
        ConvNet(taps=(4,)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
