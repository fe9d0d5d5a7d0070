import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import masked
from repalign.models.transformer import patchify, unpatchify
from repalign.models.vit import ViT
from repalign.registry import UserError
from repalign.train.forward_masked import latent_prediction, masked_autoencoder

VIT = ViT(image_size=16, patch_size=4, width=16, depth=1, heads=2, position="sincos", taps=(1,))
FIELDS = {"mask_ratio": 0.7, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
IMAGES = jax.random.randint(jax.random.key(0), (4, 16, 16, 1), 0, 256).astype(jnp.uint8)
BATCH = {"image": IMAGES, "label": jnp.zeros((4,), jnp.int32)}
UNCHANGED = {"crop_scale": None, "flip": 0.0}
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
        "mae/visible": (4, 4),
        "mae/decoded": (4, 16, 8),
        "encoder/cls": (4, 16),
        "encoder/patches": (4, 4, 16),  # floor(16 * 0.3) visible ones
        "encoder/block_1": (4, 5, 16),
    }
    np.testing.assert_array_equal(features["mae/masked"].sum(axis=1), 12)
    hidden = np.take_along_axis(features["mae/masked"], features["mae/visible"], axis=1)
    assert not hidden.any()
    head = params["decoder"]["predictions"]
    linear = features["mae/decoded"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(linear, features["mae/predictions"], rtol=1e-4, atol=1e-5)
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


def test_without_crops_and_flips_the_patches_are_those_of_the_image():
    made = masked_autoencoder(VIT, view=UNCHANGED, **FIELDS)
    params, state = jax.jit(made.init)(jax.random.key(0), BATCH)
    features, _ = jax.jit(
        lambda params, batch: made.apply(
            params, batch, jax.random.key(1), average=None, frozen=None, state=state
        )
    )(params, {**BATCH, "teacher/patches": jnp.ones((4, 16, 3))})
    np.testing.assert_allclose(features["mae/patches"], patchify(IMAGES / 255.0, 4), rtol=1e-6)
    assert features["teacher/patches"].shape == (4, 16, 3)


@pytest.fixture(scope="module")
def latent():
    made = latent_prediction(
        VIT, view=UNCHANGED, mask_ratio=0.65, predicted=0.5, predictor_depth=1, predictor_heads=2
    )
    params, state = jax.jit(made.init)(jax.random.key(0), BATCH)
    average = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    apply = jax.jit(
        lambda params, average, images: made.apply(
            params,
            {"image": images},
            jax.random.key(1),
            average=average,
            frozen=None,
            state=state,
        )[0]
    )
    return made, params, average, apply


def test_latent_prediction_asks_for_hidden_patches_and_teaches_with_the_average(latent):
    made, params, average, apply = latent
    features = apply(params, average, IMAGES)
    shapes = {name: value.shape for name, value in features.items()}
    assert shapes == {
        "teacher/patches": (4, 16, 16),
        "predictor/patches": (4, 5, 16),  # half of floor(16 * 0.65) hidden ones
        "predictor/positions": (4, 5),
        "encoder/cls": (4, 16),
        "encoder/patches": (4, 6, 16),
        "encoder/block_1": (4, 7, 16),
    }
    code, taps = made.encode(average, {}, IMAGES)
    np.testing.assert_allclose(features["teacher/patches"], taps["patches"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        code,
        VIT.apply({"params": average["encoder"]}, IMAGES / 255.0)[0]["cls"],
        rtol=1e-4,
        atol=1e-5,
    )
    # What is asked for is hidden: other pixels there change the teacher and not the student.
    asked = np.zeros((4, 16), bool)
    np.put_along_axis(asked, np.asarray(features["predictor/positions"]), True, axis=1)
    assert asked.sum() == 4 * 5
    pixels = np.asarray(patchify(IMAGES.astype(jnp.float32), 4)).astype(np.uint8)
    pixels[asked] = 255 - pixels[asked]
    images = unpatchify(jnp.asarray(pixels, jnp.float32), 4, (4, 4)).astype(jnp.uint8)
    changed = apply(params, average, images)
    np.testing.assert_array_equal(changed["predictor/patches"], features["predictor/patches"])
    assert np.abs(changed["teacher/patches"] - features["teacher/patches"]).max() > 1e-2


def test_latent_prediction_needs_an_average_and_something_to_predict(latent):
    made, params, _, _ = latent
    with pytest.raises(UserError, match=r"set config\.optimizer\.average_decay"):
        made.apply(params, BATCH, jax.random.key(0), average=None, frozen=None, state={})
    nothing = latent_prediction(VIT, view=UNCHANGED, predicted=0.05)
    with pytest.raises(UserError, match="predicted=0.05 of 10 hidden patches is none"):
        nothing.init(jax.random.key(0), BATCH)


def test_a_wrong_key_of_the_view_is_named():
    with pytest.raises(UserError, match=r"config.forward.view.crop: no such key.*crop_scale"):
        masked_autoencoder(VIT, view={"crop": (0.2, 1.0)})
