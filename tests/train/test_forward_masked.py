import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import masked
from repalign.models.transformer import patchify
from repalign.models.vit import ViT
from repalign.registry import UserError
from repalign.train.forward_masked import masked_autoencoder

VIT = ViT(image_size=16, patch_size=4, width=16, depth=1, heads=2, position="sincos", taps=(1,))
FIELDS = {"mask_ratio": 0.7, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
IMAGES = jax.random.randint(jax.random.key(0), (4, 16, 16, 1), 0, 256).astype(jnp.uint8)
BATCH = {"image": IMAGES, "label": jnp.zeros((4,), jnp.int32)}
PLAIN = {"crop_scale": (1.0, 1.0), "flip": 0.0}


@pytest.fixture(scope="module")
def run():
    made = masked_autoencoder(VIT, view=PLAIN, mean=(0.5,), std=(0.25,), **FIELDS)
    params, state = jax.jit(made.init)(jax.random.key(0), BATCH)
    apply = jax.jit(
        lambda key: made.apply(params, BATCH, key, average=None, frozen=None, state=state)
    )
    return made, params, state, apply


def test_features(run):
    _, params, state, apply = run
    features, new = apply(jax.random.key(1))
    assert state == new == {} and set(params) == {"encoder", "decoder"}
    shapes = {name: value.shape for name, value in features.items()}
    assert shapes == {
        "mae/predictions": (4, 16, 16),
        "mae/patches": (4, 16, 16),
        "mae/masked": (4, 16),
        "encoder/cls": (4, 16),
        "encoder/patches": (4, 4, 16),  # floor(16 * 0.3) visible ones
        "encoder/block_1": (4, 5, 16),
    }
    np.testing.assert_array_equal(features["mae/masked"].sum(axis=1), 12)
    assert np.any(features["mae/masked"] != apply(jax.random.key(2))[0]["mae/masked"])
    loss = masked.mae(features["mae/predictions"], features["mae/patches"], features["mae/masked"])
    assert loss.shape == (4,) and np.all(loss > 0.1)


def test_patches_are_those_of_the_normalized_view(run):
    # A crop of the whole image with its own aspect ratio is the image up to its borders.
    _, _, _, apply = run
    features, _ = apply(jax.random.key(1))
    found = np.asarray(features["mae/patches"])
    assert found.min() >= -2.0 - 1e-5 and found.max() <= 2.0 + 1e-5
    expected = patchify((IMAGES / 255.0 - 0.5) / 0.25, 4)
    correlation = np.corrcoef(found.reshape(4, -1), np.asarray(expected).reshape(4, -1))
    assert np.all(np.diag(correlation[:4, 4:]) > 0.5)


def test_the_encoder_alone_sees_all_patches_normalized(run):
    made, params, state, _ = run
    code, taps = jax.jit(made.encode)(params, state, IMAGES)
    outputs, _ = VIT.apply({"params": params["encoder"]}, (IMAGES / 255.0 - 0.5) / 0.25)
    np.testing.assert_allclose(code, outputs["cls"], rtol=1e-4, atol=1e-5)
    assert taps["patches"].shape == (4, 16, 16) and taps["block_1"].shape == (4, 17, 16)


def test_a_wrong_key_of_the_view_is_named():
    with pytest.raises(UserError, match=r"config.forward.view.crop: no such key.*crop_scale"):
        masked_autoencoder(VIT, view={"crop": (0.2, 1.0)})
