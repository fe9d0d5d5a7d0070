import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.convnet import ConvNet
from repalign.models.text import TextEncoder
from repalign.registry import UserError
from repalign.train.forward_captions import dual_encoder

MODEL = ConvNet(widths=(8,), groups=0)
TEXT = {"vocabulary": 9, "length": 4, "width": 8, "depth": 1, "heads": 2}
BATCH = {
    "image": jax.random.randint(jax.random.key(0), (3, 8, 8, 3), 0, 256).astype(jnp.uint8),
    "tokens": jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [8, 3, 1, 0]]),
    "given/column": jnp.arange(3.0),
}


def run(text):
    forward = dual_encoder(MODEL, text=text, head_features=6)

    def both(key):
        params, state = forward.init(key, BATCH)
        features, new = forward.apply(params, BATCH, key, average=None, frozen=None, state=state)
        return params, state, features, new

    return forward, *jax.jit(both)(jax.random.key(1))


def test_an_image_and_a_text_meet_in_one_space():
    forward, params, state, features, new = run(TEXT)
    assert set(features) == {"image/embedding", "text/embedding", "given/column"}
    assert jax.tree.structure(state) == jax.tree.structure(new)
    encodings = {
        "image": MODEL.apply({"params": params["image"]}, BATCH["image"] / 255.0)[0],
        "text": TextEncoder(**TEXT).apply({"params": params["text"]}, BATCH["tokens"])[0],
    }
    for name, encoded in encodings.items():
        projected = encoded @ params[f"{name}_head"]["kernel"]
        expected = projected / jnp.linalg.norm(projected, axis=1, keepdims=True)
        np.testing.assert_allclose(features[f"{name}/embedding"], expected, rtol=1e-4, atol=1e-5)
    embedded, taps = forward.encode(params, state, BATCH["image"])
    np.testing.assert_allclose(embedded, encodings["image"], rtol=1e-4, atol=1e-5)
    assert "map" in taps


def test_without_text_a_second_encoder_reads_the_same_images():
    _, params, _, features, _ = run(None)
    assert set(features) == {"image/embedding", "copy/embedding", "given/column"}
    shapes = [jax.tree.map(jnp.shape, params[name]) for name in ("image", "copy")]
    assert shapes[0] == shapes[1]
    first, second = (params[name]["stage_1_conv_0"]["kernel"] for name in ("image", "copy"))
    assert np.any(first != second)
    assert np.any(features["image/embedding"] != features["copy/embedding"])


def test_a_wrong_key_of_the_text_encoder_is_named():
    with pytest.raises(UserError, match=r"config.forward.text.vocabular: no such key.*vocabulary"):
        dual_encoder(MODEL, text={"vocabular": 9, "length": 4})
