"""Stochastic and soft assignment."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.gumbel import (
    exponential_temperature,
    gumbel_quantize,
    gumbel_softmax,
    sample_indices,
    soft_quantize,
)


def test_hard_samples_are_one_hot_with_the_categorical_frequencies():
    logits = jnp.asarray([0.0, 1.0, -1.0])
    sample = jax.jit(partial(gumbel_softmax, temperature=0.5, hard=True))
    draws = np.asarray(sample(jax.random.key(0), jnp.broadcast_to(logits, (20_000, 3))))
    assert set(np.unique(draws)) == {0.0, 1.0}
    np.testing.assert_array_equal(np.sum(draws, axis=1), 1.0)
    p = np.asarray(jax.nn.softmax(logits))
    assert np.all(np.abs(np.mean(draws, axis=0) - p) < 4 * np.sqrt(p * (1 - p) / 20_000))


def test_hard_gradient_is_the_soft_one():
    logits = jax.random.normal(jax.random.key(0), (4, 5))
    weights = jnp.arange(5.0)

    @partial(jax.jit, static_argnames="hard")
    def gradient(logits, hard):
        def value(logits):
            sample = gumbel_softmax(jax.random.key(1), logits, temperature=0.7, hard=hard)
            return jnp.sum(sample * weights)

        return jax.grad(value)(logits)

    np.testing.assert_array_equal(gradient(logits, True), gradient(logits, False))
    assert np.linalg.norm(gradient(logits, True)) > 0.01


def test_temperature_schedule():
    schedule = exponential_temperature(initial=2.0, final=0.5, rate=0.1)
    np.testing.assert_allclose(schedule(jnp.arange(3)), 2.0 * np.exp([0.0, -0.1, -0.2]), rtol=1e-6)
    assert schedule(1000) == 0.5
    with pytest.raises(ValueError, match="final"):
        exponential_temperature(initial=0.1, final=0.5, rate=0.1)


def test_gumbel_quantize():
    logits = jnp.asarray([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    codebook = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    quantize = jax.jit(partial(gumbel_quantize, temperature=1.0))
    result = quantize(jax.random.key(0), logits, codebook)
    np.testing.assert_array_equal(result.indices[1:], [0, 1])
    np.testing.assert_allclose(result.quantized, codebook[result.indices], rtol=1e-6)
    np.testing.assert_allclose(result.kl, [0.0, np.log(2), np.log(2)], atol=1e-6)
    with pytest.raises(ValueError, match="2 logits for 3 codes"):
        gumbel_quantize(jax.random.key(0), logits, codebook.T, temperature=1.0)


def test_sampled_indices_follow_the_softmax_across_chunks():
    # 1,500 codes in two chunks, all but three far away.
    codebook = (
        jnp.full((1500, 1), 100.0)
        .at[jnp.asarray([2, 700, 1400]), 0]
        .set(jnp.asarray([0.0, 0.5, -1.0]))
    )
    z = jnp.full((50, 80, 1), 0.25)
    indices = np.asarray(
        jax.jit(partial(sample_indices, temperature=0.8))(jax.random.key(0), z, codebook)
    )
    weights = np.exp(-np.square(np.asarray([0.25, -0.25, 1.25])) / 0.8)
    p = weights / np.sum(weights)
    shares = np.asarray([np.mean(indices == code) for code in (2, 700, 1400)])
    assert indices.shape == (50, 80)
    assert np.all(np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / 4000))
    with pytest.raises(ValueError, match="belong together"):
        sample_indices(jax.random.key(0), z, codebook[:0], temperature=1.0)


def test_soft_quantize_tends_to_the_nearest_code():
    z = jax.random.normal(jax.random.key(0), (3, 4, 2))
    codebook = jax.random.normal(jax.random.key(1), (7, 2))
    squared = np.sum(np.square(z[..., None, :] - codebook), axis=-1)
    weights = np.exp(-squared / 0.5)
    expected = weights @ np.asarray(codebook) / np.sum(weights, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        soft_quantize(z, codebook, temperature=0.5), expected, rtol=1e-5, atol=1e-6
    )
    cold = soft_quantize(z, codebook, temperature=1e-5)
    np.testing.assert_allclose(cold, codebook[np.argmin(squared, axis=-1)], atol=1e-4)
