"""Bottlenecks of several codes a vector, of bits, and continuous ones: each is its function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses.generative import gaussian_kl
from repalign.numerics import l2_normalize
from repalign.quantizers import (
    binary,
    composite_bottleneck,
    continuous_bottleneck,
    residual,
    scalar,
)

KEY = jax.random.key(0)
Z = jax.random.normal(jax.random.key(1), (2, 3, 3, 4))

SEVERAL = (
    composite_bottleneck.ProductQuantizer(2, 16),
    composite_bottleneck.ProductQuantizer(2, 16, distance="cosine"),
    composite_bottleneck.ResidualQuantizer(3, 8),
    composite_bottleneck.LatentQuantizer(5),
    composite_bottleneck.BinarySphericalQuantizer(group_size=2),
    composite_bottleneck.BernoulliQuantizer(),
)


@pytest.mark.parametrize("quantizer", SEVERAL, ids=repr)
def test_indices_name_the_quantized_vectors(quantizer):
    params, state = quantizer.init(KEY, 4)
    found, new = quantizer.apply(params, state, Z)
    named = quantizer.vectors(params, state, found.indices, 4)
    np.testing.assert_allclose(named, found.quantized, rtol=1e-6, atol=1e-6)
    assert found.indices.min() >= 0 and found.indices.max() < quantizer.codes(4)
    assert found.loss.shape == Z.shape[:-1] and new == state
    slope = jax.grad(lambda z: jnp.sum(quantizer.apply(params, state, z)[0].quantized))(Z)
    assert np.any(slope)


def test_product_and_residual_are_their_functions():
    product, levels = SEVERAL[0], SEVERAL[2]
    params, _ = product.init(KEY, 4)
    assert params["codebooks"].shape == (2, 16, 2)
    found, _ = product.apply(params, {}, Z)
    expected = residual.product_quantize(Z, params["codebooks"], codebook_weight=1.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    params, _ = levels.init(KEY, 4)
    found, _ = levels.apply(params, {}, Z)
    expected = residual.residual_vector_quantize(Z, params["codebooks"])
    np.testing.assert_array_equal(found.indices, expected.indices)
    losses = residual.residual_losses(Z, params["codebooks"], found.indices, codebook_weight=1.0)
    np.testing.assert_allclose(found.loss, losses.sum(axis=-1))
    with pytest.raises(ValueError, match="3 equal heads"):
        composite_bottleneck.ProductQuantizer(3, 8).init(KEY, 4)


def test_residual_dropout_leaves_out_last_levels_in_steps_only():
    quantizer = composite_bottleneck.ResidualQuantizer(3, 8, dropout=0.5)
    params, _ = quantizer.init(KEY, 4)
    many = jax.random.normal(KEY, (4000, 4))
    found, _ = quantizer.apply(params, {}, many, KEY)
    used = np.asarray(found.indices >= 0)
    assert (used[:, :-1] >= used[:, 1:]).all() and used[:, 0].all()
    # Half of the vectors draw 1, 2 or 3 levels: a sixth keeps one, a sixth two.
    share = np.bincount(used.sum(axis=1), minlength=4) / 4000
    np.testing.assert_allclose(share, [0, 1 / 6, 1 / 6, 2 / 3], atol=0.04)
    evaluated, _ = quantizer.apply(params, {}, many)
    assert (evaluated.indices >= 0).all()


def test_latent_and_binary_are_their_functions():
    latent = SEVERAL[3]
    params, _ = latent.init(KEY, 4)
    found, _ = latent.apply(params, {}, Z)
    expected = scalar.latent_quantize(Z, params["values"])
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(expected))
    found, _ = SEVERAL[4].apply({}, {}, Z)
    expected = binary.bsq(l2_normalize(Z), zeta=0.1, group_size=2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bernoulli_draws_in_steps_and_decides_in_evaluations():
    quantizer = composite_bottleneck.BernoulliQuantizer()
    logits = jnp.full((4000, 1), jnp.log(3.0))
    drawn, _ = quantizer.apply({}, {}, logits, KEY)
    assert abs(float(drawn.quantized.mean()) - 0.75) < 6 * np.sqrt(0.75 * 0.25 / 4000)
    decided, _ = quantizer.apply({}, {}, logits)
    assert (decided.indices == 1).all()


def test_a_gaussian_latent_draws_from_its_posterior():
    latent = continuous_bottleneck.GaussianLatent(kl_weight=0.5, initial_log_variance=-2.0)
    params, state = latent.init(KEY, 4)
    mean, _ = latent.apply(params, state, Z)
    np.testing.assert_allclose(mean.quantized, Z, rtol=1e-6)
    flat = Z.reshape(-1, 4)
    kl = gaussian_kl(flat, jnp.full_like(flat, -2.0)).reshape(2, 3, 3)
    np.testing.assert_allclose(mean.loss, 0.5 * kl / 4, rtol=1e-5)
    many = jnp.broadcast_to(Z[:1], (4000, 3, 3, 4))
    drawn, _ = latent.apply(params, state, many, KEY)
    deviation = np.std(drawn.quantized - many, axis=0)
    np.testing.assert_allclose(deviation, np.exp(-1.0), rtol=6 / np.sqrt(8000))
    gradient = jax.grad(lambda p: jnp.sum(latent.apply(p, {}, Z, KEY)[0].loss))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_sigma_latent_has_one_strength_of_noise_an_example():
    latent = continuous_bottleneck.SigmaLatent(scale=0.5, mean_weight=0.2)
    assert latent.init(KEY, 4) == ({}, {})
    still, _ = latent.apply({}, {}, Z)
    np.testing.assert_array_equal(still.quantized, Z)
    np.testing.assert_allclose(still.loss, 0.1 * np.mean(np.square(Z), axis=-1), rtol=1e-5)
    many = jnp.zeros((3000, 40, 4))
    noise = np.asarray(latent.apply({}, {}, many, KEY)[0].quantized)
    strength = np.sqrt(np.mean(noise**2, axis=(1, 2)))
    # sigma ~ N(0, 0.5^2): the strengths are |sigma| (nearly: 160 draws each).
    assert abs(np.mean(strength) - 0.5 * np.sqrt(2 / np.pi)) < 0.03
    assert np.quantile(strength, 0.1) < 0.1 < 0.7 < np.quantile(strength, 0.95)


@pytest.mark.parametrize("name", ["GaussianLatent", "SigmaLatent"])
def test_continuous_latents_have_no_codes(name):
    latent = getattr(continuous_bottleneck, name)()
    assert latent.codes(4) == 0
    with pytest.raises(ValueError, match="no codes"):
        latent.vectors({}, {}, jnp.zeros((2,), jnp.int32), 4)
