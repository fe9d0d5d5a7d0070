import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import visual_words
from repalign.registry import UserError
from repalign.train.visual_word_terms import obow

RNG = np.random.default_rng(2)
FEATURES = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {
        "average/map": (3, 6, 5, 4),
        "crop_0/encoder": (3, 7),
        "crop_1/encoder": (3, 7),
    }.items()
}
TERM = obow(teacher="average/map", students=("crop_0/encoder", "crop_1/encoder"), words=6)


@pytest.fixture(scope="module")
def steps():
    params, state = TERM.init(jax.random.key(0), FEATURES)
    apply = jax.jit(lambda state: TERM.apply(params, state, FEATURES, jax.random.key(1)))
    first = apply(state)
    return params, state, first, apply(first.state)


def test_the_loss_is_predicted_with_the_vocabulary_before_the_step(steps):
    params, state, first, _ = steps
    queue = np.asarray(state["vocabulary"]["queue"], np.float64)
    inner = FEATURES["average/map"][:, 1:-1, 1:-1].reshape(3, -1, 4)
    targets, mean = visual_words.bag_of_visual_words(
        inner, state["vocabulary"]["queue"], jnp.float32(0.5)
    )
    np.testing.assert_allclose(first.state["mean_distance"], mean, rtol=1e-5)
    layers = params["generator"]
    x = queue / np.linalg.norm(queue, axis=1, keepdims=True) @ layers["linear_1"]["kernel"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * layers["norm_1"]["scale"] + layers["norm_1"]["bias"], 0.0)
    x = x @ layers["linear_2"]["kernel"] + layers["linear_2"]["bias"]
    weights = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.mean(
        [
            visual_words.word_prediction(jnp.asarray(8.0 * FEATURES[crop] @ weights.T), targets)
            for crop in ("crop_0/encoder", "crop_1/encoder")
        ],
        axis=0,
    )
    np.testing.assert_allclose(first.loss, expected, rtol=1e-3, atol=1e-5)
    assert 1.0 <= first.metrics["perplexity"] <= 6.0


def test_the_oldest_words_are_replaced(steps):
    _, state, first, second = steps
    before, after, last = (
        np.asarray(one["vocabulary"]["queue"]) for one in (state, first.state, second.state)
    )
    assert np.all(np.any(after[:3] != before[:3], axis=1))
    np.testing.assert_array_equal(after[3:], before[3:])
    np.testing.assert_array_equal(last[:3], after[:3])
    assert np.all(np.any(last[3:] != after[3:], axis=1))
    assert int(second.state["vocabulary"]["oldest"]) == 0


def test_a_vocabulary_that_the_batch_does_not_divide_is_named():
    term = obow(teacher="average/map", students="crop_0/encoder", words=7)
    with pytest.raises(
        UserError, match=r"objective.obow.words 7 is not a multiple of the batch, 3"
    ):
        term.init(jax.random.key(0), FEATURES)
