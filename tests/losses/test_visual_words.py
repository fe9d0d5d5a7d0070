import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from repalign.losses import visual_words
from repalign.registry import UserError

RNG = np.random.default_rng(5)
FEATURES = jnp.asarray(RNG.normal(size=(4, 6, 3)), jnp.float32)
WORDS = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_histograms_and_the_running_distance(pool):
    histograms, mean = jax.jit(
        functools.partial(visual_words.bag_of_visual_words, pool=pool, momentum=0.9)
    )(FEATURES, WORDS, jnp.float32(0.5))
    distances = ((np.asarray(FEATURES)[:, :, None] - np.asarray(WORDS)) ** 2).sum(-1)
    expected_mean = 0.9 * 0.5 + 0.1 * distances.min(-1).mean()
    np.testing.assert_allclose(mean, expected_mean, rtol=2e-5)
    codes = scipy.special.softmax(-15.0 / expected_mean * distances, axis=-1)
    pooled = getattr(codes, pool)(axis=1)
    np.testing.assert_allclose(
        histograms, pooled / pooled.sum(1, keepdims=True), rtol=1e-4, atol=1e-7
    )


def test_blocks_of_images_give_the_same(monkeypatch):
    monkeypatch.setattr("repalign.numerics.MATRIX_ENTRIES", 60)
    blocks, mean = visual_words.bag_of_visual_words(FEATURES, WORDS, jnp.float32(0.5))
    monkeypatch.undo()
    whole, whole_mean = visual_words.bag_of_visual_words(FEATURES, WORDS, jnp.float32(0.5))
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(mean, whole_mean, rtol=1e-6)


def test_targets_carry_no_gradient():
    def total(features, words):
        return jnp.sum(visual_words.bag_of_visual_words(features, words, jnp.float32(0.5))[0] ** 2)

    for gradient in jax.jit(jax.grad(total, (0, 1)))(FEATURES, WORDS):
        np.testing.assert_array_equal(gradient, 0.0)


def test_new_words_are_averages_of_neighbourhoods():
    maps = RNG.normal(size=(200, 4, 5, 2)).astype(np.float32)
    words = np.asarray(jax.jit(visual_words.draw_visual_words)(jax.random.key(0), maps))
    places = set()
    for word, one in zip(words, maps, strict=True):
        means = np.array(
            [[one[i : i + 3, j : j + 3].mean((0, 1)) for j in range(3)] for i in range(2)]
        )
        found = np.argwhere(np.abs(means - word).max(-1) < 1e-5)
        assert len(found) == 1
        places.add(tuple(found[0]))
    assert len(places) == 6
    with pytest.raises(ValueError, match="2x5 has no 3x3 neighbourhood"):
        visual_words.draw_visual_words(jax.random.key(0), jnp.ones((1, 2, 5, 2)))


def test_word_prediction_is_a_divergence():
    logits = RNG.normal(size=(4, 5)).astype(np.float32)
    targets = RNG.dirichlet(np.ones(5), size=4).astype(np.float32)
    targets[0] = [0.0, 1.0, 0.0, 0.0, 0.0]
    value, gradients = jax.jit(
        jax.value_and_grad(lambda *x: visual_words.word_prediction(*x).sum(), (0, 1))
    )(logits, targets)
    probabilities = scipy.special.softmax(logits, axis=1)
    expected = scipy.stats.entropy(targets.T, probabilities.T).sum()
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(gradients[0], probabilities - targets, atol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_a_wrong_pool_is_named():
    with pytest.raises(UserError, match="pool 'avg'"):
        visual_words.bag_of_visual_words(FEATURES, WORDS, jnp.float32(0.5), pool="avg")
