"""Scalar quantizers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.scalar import fsq, fsq_codes, latent_quantize, latent_values
from repalign.registry import UserError


def test_fsq_matches_the_reference(golden_losses):
    levels = json.loads(str(golden_losses["meta"]))["fsq"]["levels"]
    z = jnp.asarray(golden_losses["fsq/in/z"])
    result = fsq(z, levels=levels)
    np.testing.assert_array_equal(result.indices, golden_losses["fsq/indices"])
    np.testing.assert_allclose(result.quantized, golden_losses["fsq/quantized"], rtol=2e-5)
    np.testing.assert_allclose(
        fsq_codes(result.indices, levels=levels), result.quantized, rtol=1e-6
    )
    weights = jnp.arange(1.0, len(levels) + 1.0)
    gradient = jax.grad(lambda z: jnp.sum(fsq(z, levels=levels).quantized * weights))(z)
    expected = golden_losses["fsq/grad_weighted_sum"]
    # Where tanh saturates, 1 - tanh^2 has few digits in either implementation.
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * np.max(expected))


def test_fsq_official_convention():
    # The authors' formula in numpy (fsq.ipynb): half_l = (L - 1)(1 - eps) / 2, shift = tan(o / h).
    levels = np.asarray([8, 5, 2])
    z = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    expected = np.round(np.tanh(z + np.tan(offset / half)) * half - offset) / (levels // 2)
    official = fsq(jnp.asarray(z), levels=[8, 5, 2], convention="one_minus_eps")
    np.testing.assert_allclose(official.quantized, expected, rtol=1e-6)
    basis = np.asarray([1, 8, 40])
    np.testing.assert_array_equal(
        official.indices, np.sum((expected * (levels // 2) + levels // 2) * basis, axis=1)
    )
    popular = fsq(jnp.asarray(z), levels=[8, 5, 2])
    assert np.any(np.asarray(popular.indices) != official.indices)


@pytest.mark.parametrize("convention", ["one_plus_eps", "one_minus_eps"])
def test_fsq_reaches_every_code(convention):
    levels = (2, 3, 4)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 3)) * 3.0, jnp.float32)
    result = fsq(z, levels=levels, convention=convention)
    assert set(np.asarray(result.indices).tolist()) == set(range(24))
    np.testing.assert_allclose(
        fsq_codes(result.indices, levels=levels), result.quantized, rtol=1e-6
    )


def test_fsq_nan_is_marked():
    result = fsq(jnp.asarray([[0.0, jnp.nan], [0.0, jnp.inf]]), levels=(3, 3))
    np.testing.assert_array_equal(result.indices, [-1, 7])
    np.testing.assert_array_equal(np.isnan(result.quantized), [[False, True], [False, False]])


def test_latent_quantize():
    values = latent_values(2, num_values=3) * jnp.asarray([[1.0], [4.0]])
    z = jnp.asarray([[0.3, -3.0], [-0.25, 0.9], [0.1, jnp.nan]])
    result = latent_quantize(z, values, quantization_weight=1.0, commitment_weight=0.5)
    np.testing.assert_array_equal(result.indices[:2], [[2, 0], [0, 1]])  # -0.25: tie, lower
    assert result.indices[2, 1] == -1 and np.isnan(result.loss[2])
    quantized = np.asarray([[0.5, -2.0], [-0.5, 0.0]])
    np.testing.assert_allclose(result.quantized[:2], quantized, rtol=1e-6)
    squares = np.mean(np.square(z[:2] - quantized), axis=1)
    np.testing.assert_allclose(result.loss[:2], 1.5 * squares, rtol=1e-6)

    def loss(z, values):
        result = latent_quantize(z, values, quantization_weight=1.0, commitment_weight=0.5)
        return jnp.sum(result.loss)

    d_z, d_values = jax.grad(loss, argnums=(0, 1))(z[:2], values)
    np.testing.assert_allclose(d_z, 0.5 * (z[:2] - quantized), rtol=1e-5)
    np.testing.assert_allclose(d_values[0], [-0.25, 0.0, 0.2], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: fsq(z, levels=(8, 1)), "at least 2 levels"),
        (lambda z: fsq(z, levels=(8, 5, 5)), "3 levels for 2 dimensions"),
        (lambda z: fsq(z, levels=(2**16, 2**16)), "overflows"),
        (lambda z: latent_quantize(z, jnp.zeros((3, 4))), "3 dimensions"),
        (lambda z: latent_values(2, num_values=1), "at least 2"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((4, 2)))
    with pytest.raises(UserError, match="one_minus_eps"):
        fsq(jnp.zeros((4, 2)), levels=(8, 5), convention="eps")


def test_no_vectors():
    assert fsq(jnp.zeros((0, 2)), levels=(3, 3)).indices.shape == (0,)
    assert latent_quantize(jnp.zeros((0, 2)), latent_values(2, num_values=3)).loss.shape == (0,)
