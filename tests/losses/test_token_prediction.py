"""Cross-entropies of tokens against the formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from repalign.losses.token_prediction import masked_token_cross_entropy, token_cross_entropy

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.standard_normal((3, 4, 5)).astype(np.float32)
TOKENS = GENERATOR.integers(0, 5, (3, 4))
MASKED = np.array([[True, False, True, False], [True] * 4, [False] * 4])


def expected(smoothing):
    log_probabilities = scipy.special.log_softmax(LOGITS.astype(np.float64), axis=2)
    target = np.full(LOGITS.shape, smoothing / 5)
    target += (1 - smoothing) * np.eye(5)[TOKENS]
    return -(target * log_probabilities).sum(axis=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies(smoothing):
    entropies = expected(smoothing)
    got = token_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TOKENS), label_smoothing=smoothing)
    np.testing.assert_allclose(got, entropies.mean(axis=1), rtol=2e-5)
    got = masked_token_cross_entropy(
        jnp.asarray(LOGITS), jnp.asarray(TOKENS), jnp.asarray(MASKED), label_smoothing=smoothing
    )
    hidden = [entropies[0, [0, 2]].mean(), entropies[1].mean(), 0.0]
    np.testing.assert_allclose(got, hidden, rtol=2e-5)


def test_the_gradient_is_probability_minus_target():
    gradient = jax.grad(lambda x: token_cross_entropy(x, jnp.asarray(TOKENS)).sum())(
        jnp.asarray(LOGITS)
    )
    probabilities = scipy.special.softmax(LOGITS, axis=2)
    np.testing.assert_allclose(gradient, (probabilities - np.eye(5)[TOKENS]) / 4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_logits_stay_finite(dtype):
    logits = jnp.asarray(1e4 * LOGITS, dtype)
    value, gradient = jax.value_and_grad(
        lambda x: masked_token_cross_entropy(x, jnp.asarray(TOKENS), jnp.asarray(MASKED)).sum()
    )(logits)
    assert np.isfinite(value) and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_a_token_beyond_the_codes_is_nan():
    assert np.isnan(token_cross_entropy(jnp.asarray(LOGITS), jnp.full((3, 4), 5))).all()
