from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.data.captioned_shapes import FACTORS, captioned_shapes
from repalign.registry import UserError
from repalign.train.evaluate import EvaluationContext
from repalign.train.evaluate_captions import modality_gap, zero_shot
from repalign.train.state import Forward, TrainState

SHAPES, COLORS = len(FACTORS["shape"]), len(FACTORS["color"])


def source(examples, split="test"):
    return {
        "name": "data.captioned_shapes.captioned_shapes",
        "examples": examples,
        "seed": 3,
        "size": 8,
        "held_out": (("circle", "red"),),
        "split": split,
    }


def context(apply):
    """An experiment whose forward pass is the function of a batch that a test gives."""

    def forward(params, batch, key, *, average, frozen, state):
        del params, key, average, frozen
        return apply(batch), state

    return EvaluationContext(SimpleNamespace(forward=Forward(None, forward)), None, None)


KEY = jax.random.key(0)
STATE = TrainState(0, None, {"model": {}, "objective": {}}, {}, {}, {}, None, None)


def from_factors(batch):
    """Two embeddings of the brightness and of the tokens, on different sides of a plane."""
    pixels = batch["image"].reshape(len(batch["image"]), -1)[:, ::7].astype(jnp.float32) / 255.0
    words = jnp.sum(jnp.eye(40)[batch["tokens"]], axis=1)
    ones = jnp.ones((len(pixels), 1))
    return {
        "image/embedding": 3.0 * jnp.concatenate([pixels, ones], axis=1),
        "text/embedding": jnp.concatenate([words[:, : pixels.shape[1]], -ones], axis=1),
        "same/embedding": jnp.concatenate([pixels, ones], axis=1),
    }


def test_the_gap_of_two_sides_of_a_plane():
    evaluate = modality_gap(context(from_factors), reference=source(150))
    metrics, arrays = evaluate(STATE, KEY)
    assert arrays == {} and metrics["linear_separability"] == 1.0
    examples = captioned_shapes(
        150, seed=3, size=8, held_out=(("circle", "red"),), split="test"
    ).arrays
    features = from_factors({name: jnp.asarray(column) for name, column in examples.items()})
    unit = [
        np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (features["image/embedding"], features["text/embedding"])
    ]
    gap = np.linalg.norm(unit[0].mean(0) - unit[1].mean(0))
    np.testing.assert_allclose(metrics["modality_gap"], gap, rtol=1e-5)
    distance = ((unit[0] - unit[1]) ** 2).sum(1).mean()
    np.testing.assert_allclose(metrics["pair_distance"], distance, rtol=1e-5)


def test_equal_features_have_no_gap_and_cannot_be_told_apart():
    evaluate = modality_gap(context(from_factors), reference=source(100), second="same/embedding")
    metrics, _ = evaluate(STATE, KEY)
    assert metrics["modality_gap"] < 1e-6 and metrics["pair_distance"] < 1e-10
    assert metrics["linear_separability"] == 0.5
    wrong = modality_gap(context(from_factors), reference=source(10), second="texts/embedding")
    with pytest.raises(UserError, match="texts/embedding.*text/embedding"):
        wrong(STATE, KEY)


def class_of_tokens(batch):
    """The text's class in one-hot: the words of color and shape are tokens 3 and 4 of a caption."""
    from repalign.data.captioned_shapes import VOCABULARY

    shape, color = (
        jnp.array([VOCABULARY.index(word) for word in FACTORS[name]]) for name in ("shape", "color")
    )
    shapes = jnp.argmax(batch["tokens"][:, 3, None] == shape, axis=1)
    colors = jnp.argmax(batch["tokens"][:, 2, None] == color, axis=1)
    return jnp.eye(SHAPES * COLORS)[shapes * COLORS + colors]


def test_zero_shot_names_the_class_of_the_nearest_caption():
    def knowing(batch):
        known = class_of_tokens(batch)
        # An embedding of the image that knows the class of all but every third example.
        lost = (jnp.arange(len(known)) % 3 == 0)[:, None]
        image = jnp.where(lost, jnp.roll(known, 1, axis=1), known)
        noise = 0.3 * jnp.sin(jnp.sum(batch["tokens"], axis=1)[:, None] * jnp.arange(1, 49))
        return {"image/embedding": 5.0 * image, "text/embedding": known + noise}

    references = {"seen": source(90), "unseen": source(60, "held_out")}
    evaluate = zero_shot(context(knowing), references=references)
    metrics, _ = evaluate(STATE, KEY)
    assert metrics == {
        "zero_shot_seen": pytest.approx(2 / 3),
        "zero_shot_unseen": pytest.approx(2 / 3),
    }
