"""ViT: sizes, tokens, position tables on other grids, loop against scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.transformer import stack_blocks
from repalign.models.vit import ENCODERS, ViT
from repalign.registry import UserError

TINY = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "registers": 2,
    "layer_scale": 0.5,
    "taps": (1,),
}
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.fixture(scope="module")
def variables():
    return ViT(**TINY).init(jax.random.key(0), IMAGES)


def test_dinov2_b_has_the_published_parameters():
    module = ViT(**ENCODERS["dinov2_b"], scan=True)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    # The published ViT-B/14 without registers has 86,580,480, of which 768 are the mask token.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_580_480 - 768
    out, _ = jax.eval_shape(module.apply, shapes, images)
    assert out["patches"].shape == (1, 256, 768)


def test_loop_and_scan_agree_and_tokens_are_separated(variables):
    out, taps = ViT(**TINY).apply(variables, IMAGES)
    assert {name: value.shape for name, value in out.items()} == {
        "cls": (2, 16),
        "patches": (2, 4, 16),
    }
    assert taps["block_1"].shape == (2, 1 + 2 + 4, 16)
    params = variables["params"]
    scanned = {"params": {**params, "blocks": stack_blocks(params["blocks"])}}
    scan_out, scan_taps = ViT(**TINY, scan=True).apply(scanned, IMAGES)
    for expected, actual in zip(
        jax.tree.leaves((out, taps)), jax.tree.leaves((scan_out, scan_taps)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_visible_patches_keep_their_positions(variables):
    def encode(images, visible):
        return ViT(**TINY).apply(variables, images, visible=visible)[0]

    order = jnp.asarray([[2, 0], [1, 3]])
    found = jax.jit(encode)(IMAGES, order)
    # What the other patches show does not matter; where the visible ones lie does.
    rows = jnp.arange(8)[:, None] // 4 * 2 + jnp.arange(8)[None] // 4
    seen = jnp.any(rows == order[:, :, None, None], axis=1)[..., None]
    hidden = jax.jit(encode)(jnp.where(seen, IMAGES, 9.0), order)
    np.testing.assert_allclose(hidden["patches"], found["patches"], rtol=1e-4, atol=1e-5)
    swapped = jax.jit(encode)(IMAGES, order[:, ::-1])
    np.testing.assert_allclose(swapped["patches"], found["patches"][:, ::-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(swapped["cls"], found["cls"], rtol=1e-4, atol=1e-5)
    moved = jax.jit(encode)(jnp.roll(IMAGES, 4, axis=1), (order + 2) % 4)
    assert np.abs(moved["cls"] - found["cls"]).max() > 1e-3


def test_other_grids_resample_the_learned_table(variables):
    out, _ = ViT(**TINY).apply(variables, jnp.zeros((1, 12, 16, 3)))
    assert out["patches"].shape == (1, 3 * 4, 16)


def test_mae_clip_and_mean_pooled_forms():
    mae = ViT(**{**TINY, "position": "sincos", "registers": 0, "layer_scale": None})
    params = mae.init(jax.random.key(0), IMAGES)["params"]
    assert set(params) == {"patch_embedding", "class_token", "blocks", "final_norm"}
    clip = ViT(**{**TINY, "activation": "quick_gelu", "pre_norm": True, "patch_bias": False})
    params = clip.init(jax.random.key(0), IMAGES)["params"]
    assert "pre_norm" in params
    assert set(params["patch_embedding"]) == {"kernel"}
    pooled = ViT(**{**TINY, "class_token": False, "registers": 0})
    out, _ = pooled.init_with_output(jax.random.key(0), IMAGES)[0]
    np.testing.assert_allclose(out["cls"], out["patches"].mean(axis=1), rtol=1e-5, atol=1e-6)


def test_unknown_activation_is_named():
    with pytest.raises(UserError, match="unknown activation 'gelu_tan'"):
        ViT(**{**TINY, "activation": "gelu_tan"}).init(jax.random.key(0), IMAGES)
