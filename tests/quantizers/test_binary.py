"""Binary quantizers."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.binary import bernoulli_quantize, bsq, lfq, sign_codes, soft_entropies


def test_lfq_matches_the_reference(golden_losses):
    meta = json.loads(str(golden_losses["meta"]))["lfq"]
    z = jnp.asarray(golden_losses["lfq/in/z"])
    quantize = partial(
        lfq,
        entropy_weight=meta["entropy_loss_weight"],
        diversity_gamma=meta["diversity_gamma"],
        commitment_weight=meta["commitment_loss_weight"],
        inv_temperature=meta["inv_temperature"],
    )
    result = jax.jit(quantize)(z)
    np.testing.assert_array_equal(result.indices, golden_losses["lfq/indices"])
    np.testing.assert_array_equal(result.quantized, golden_losses["lfq/quantized"])
    np.testing.assert_allclose(jnp.mean(result.loss), golden_losses["lfq/aux_loss"], rtol=2e-5)
    np.testing.assert_array_equal(sign_codes(8)[result.indices], result.quantized)


def test_bsq_matches_the_reference(golden_losses):
    meta = json.loads(str(golden_losses["meta"]))["bsq"]
    z = jnp.asarray(golden_losses["bsq/in/z"])
    quantize = jax.jit(partial(bsq, **{name: meta[name] for name in meta if name != "bits"}))
    result = quantize(z)
    np.testing.assert_array_equal(result.indices, golden_losses["bsq/indices"])
    np.testing.assert_allclose(result.quantized, golden_losses["bsq/quantized"], rtol=2e-5)
    np.testing.assert_allclose(jnp.mean(result.loss), golden_losses["bsq/loss"], rtol=2e-5)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(quantize(z).quantized)))(z)
    np.testing.assert_allclose(gradient, z.shape[-1] ** -0.5, rtol=1e-6)


def test_entropies_of_one_group_equal_the_sum_over_bits():
    # Signs are independent given z, so the entropy of all bits is the sum of the bits' entropies.
    z = 0.3 * jax.random.normal(jax.random.key(0), (10, 6))
    entropies_of = jax.jit(
        partial(soft_entropies, inv_temperature=1.5), static_argnames="group_size"
    )
    whole = entropies_of(z, group_size=6).per_vector
    p = np.asarray(jax.nn.sigmoid(4.0 * 1.5 * z), np.float64)
    expected = -np.sum(p * np.log(p) + (1 - p) * np.log(1 - p), axis=1)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    for group_size in (1, 3):
        entropies = entropies_of(z, group_size=group_size)
        np.testing.assert_allclose(entropies.per_vector, expected, rtol=1e-5)


def test_entropy_gradient_is_finite_where_probabilities_underflow():
    z = jnp.full((3, 4), 50.0)
    gradient = jax.jit(jax.grad(lambda z: jnp.mean(lfq(z, group_size=4).loss)))(z)
    assert np.all(np.isfinite(gradient))
    gradient = jax.jit(jax.grad(lambda z: jnp.mean(bsq(z, group_size=2).loss)))(z)
    assert np.all(np.isfinite(gradient))


def test_bernoulli_bits_have_the_mean_and_the_gradient_of_the_sigmoid():
    logits = jnp.asarray([-2.0, 0.0, 1.0])
    draws = bernoulli_quantize(jax.random.key(0), jnp.broadcast_to(logits, (20_000, 3)))
    assert set(np.unique(draws)) == {0.0, 1.0}
    p = np.asarray(jax.nn.sigmoid(logits))
    # Four standard errors.
    assert np.all(np.abs(np.mean(draws, axis=0) - p) < 4 * np.sqrt(p * (1 - p) / 20_000))
    np.testing.assert_array_equal(bernoulli_quantize(None, logits), [0.0, 0.0, 1.0])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(bernoulli_quantize(jax.random.key(1), x))))(
        logits
    )
    np.testing.assert_allclose(gradient, p * (1 - p), rtol=1e-5)


def test_degenerate_input():
    z = jnp.asarray([[0.0, jnp.nan, -0.0, 2.0]])
    result = jax.jit(lfq)(z)
    np.testing.assert_array_equal(result.indices, [1])
    assert np.isnan(result.quantized[0, 1]) and np.isnan(result.loss[0])
    assert jax.jit(lfq)(jnp.ones((1, 1))).indices.shape == (1,)
    with pytest.raises(ValueError, match="must divide the 4"):
        bsq(z, group_size=3)
    with pytest.raises(ValueError, match="at most 16"):
        lfq(jnp.zeros((1, 18)))
    with pytest.raises(ValueError, match="overflows"):
        lfq(jnp.zeros((1, 32)), group_size=8)
