"""The latent predictor: what a prediction may depend on, and cross-attention by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.predictor import CrossAttention, LatentPredictor
from repalign.models.transformer import patchify, stack_blocks, unpatchify
from repalign.models.vit import ViT

ENCODER = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
VISIBLE = jnp.asarray([[0, 5, 7], [9, 3, 1]])
HIDDEN = jnp.asarray([[2, 15, 4, 8], [0, 2, 4, 14]])


@pytest.fixture(scope="module")
def run():
    module = LatentPredictor(ViT(**ENCODER, position="sincos"), depth=2, heads=2)
    params = jax.jit(module.init)(jax.random.key(1), IMAGES, VISIBLE, HIDDEN)["params"]
    apply = jax.jit(
        lambda images, hidden: module.apply({"params": params}, images, VISIBLE, hidden)
    )
    return params, apply


def test_a_prediction_depends_on_visible_patches_and_its_own_place(run):
    _, apply = run
    predictions, outputs = apply(IMAGES, HIDDEN)
    assert predictions.shape == (2, 4, 16) and outputs["patches"].shape == (2, 3, 16)
    # Another order of the questions is another order of the answers, no more.
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(
        apply(IMAGES, HIDDEN[:, order])[0], predictions[:, order], rtol=1e-4, atol=1e-5
    )
    assert np.abs(predictions[0, 0] - predictions[0, 1]).max() > 1e-2
    pixels = np.asarray(patchify(IMAGES, 4)).copy()
    pixels[0, np.asarray(HIDDEN[0])] = 7.0
    pixels[1, 9] = 7.0
    changed, _ = apply(unpatchify(jnp.asarray(pixels), 4, (4, 4)), HIDDEN)
    np.testing.assert_allclose(changed[0], predictions[0], rtol=1e-5, atol=1e-6)
    assert np.abs(changed[1] - predictions[1]).max() > 1e-2


def test_loop_and_scan_agree(run):
    params, apply = run
    scanned = {**params, "predictor": stack_blocks(params["predictor"])}
    scanned["encoder"] = {**params["encoder"], "blocks": stack_blocks(params["encoder"]["blocks"])}
    encoder = ViT(**ENCODER, position="sincos", scan=True, remat="nothing_saveable")
    module = LatentPredictor(encoder, depth=2, heads=2)
    found, _ = jax.jit(module.apply)({"params": scanned}, IMAGES, VISIBLE, HIDDEN)
    np.testing.assert_allclose(found, apply(IMAGES, HIDDEN)[0], rtol=1e-4, atol=1e-5)


def test_cross_attention_by_hand():
    module = CrossAttention(heads=2)
    x, context = (jax.random.normal(jax.random.key(n), (1, 2 + n, 4)) for n in (0, 1))
    params = module.init(jax.random.key(2), x, context)["params"]
    query = (x @ params["query"]["kernel"])[0]
    key, value = ((context @ params[name]["kernel"])[0] for name in ("key", "value"))
    heads = [
        jax.nn.softmax(query[:, part] @ key[:, part].T / np.sqrt(2)) @ value[:, part]
        for part in (slice(0, 2), slice(2, 4))
    ]
    expected = jnp.concatenate(heads, axis=1) @ params["proj"]["kernel"]
    found = module.apply({"params": params}, x, context)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="width of 4 cannot be split over 3 heads"):
        CrossAttention(heads=3).init(jax.random.key(0), x, context)
