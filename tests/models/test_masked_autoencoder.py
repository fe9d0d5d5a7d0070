"""MAE: parameters, predictions and loss of the official code; hidden patches stay hidden."""

import formula_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import masked
from repalign.models.masked_autoencoder import MaskedAutoencoder
from repalign.models.transformer import heads_first, patchify, stack_blocks
from repalign.models.vit import SIZES, ViT

ENCODER = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
TINY = MaskedAutoencoder(ViT(**ENCODER, position="sincos"), width=8, depth=1, heads=2)
IMAGES = jnp.asarray(formula_weights.image((2, 16, 16, 3)))
# The smallest of the 16 numbers of image((2, 16)) are the patches that stay, as in the official
# random masking with that noise.
ORDER = np.argsort(formula_weights.image((2, 16)), axis=1)
VISIBLE, RESTORE = jnp.asarray(ORDER[:, :4]), jnp.asarray(np.argsort(ORDER, axis=1))


@pytest.mark.parametrize(
    ("size", "patch_size", "parameters"),
    # Trained scalars of the official models (positions are constants).
    [("B", 16, 111_655_680), ("L", 16, 329_239_296), ("H", 14, 656_613_964)],
)
def test_parameters_are_the_official_ones(size, patch_size, parameters):
    encoder = ViT(**SIZES[size], patch_size=patch_size, position="sincos", scan=True)
    tokens = (224 // patch_size) ** 2
    visible = jax.ShapeDtypeStruct((2, tokens // 4), jnp.int32)
    shapes = jax.eval_shape(
        MaskedAutoencoder(encoder).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
        visible,
        jax.ShapeDtypeStruct((2, tokens), jnp.int32),
    )["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


NAMES = {
    "encoder/class_token": "cls_token",
    "encoder/patch_embedding": "patch_embed.proj",
    "encoder/final_norm": "norm",
    "decoder/mask_token": "mask_token",
    "decoder/embedding": "decoder_embed",
    "decoder/norm": "decoder_norm",
    "decoder/predictions": "decoder_pred",
}


def official_name(path):
    part, *layers, leaf = path
    if leaf in ("class_token", "mask_token"):
        return NAMES[f"{part}/{leaf}"]
    if layers[0] != "blocks":
        return f"{NAMES[f'{part}/{layers[0]}']}.{formula_weights.LEAVES[leaf]}"
    number = int(layers[1].removeprefix("block_")) - 1
    layer = ".".join(layers[2:]).replace("attention", "attn").replace("norm_", "norm")
    blocks = "blocks" if part == "encoder" else "decoder_blocks"
    return f"{blocks}.{number}.{layer}.{formula_weights.LEAVES[leaf]}"


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), IMAGES, VISIBLE, RESTORE)["params"]
    params = formula_weights.filled(shapes, official_name)
    patch = formula_weights.torch_value("patch_embed.proj.weight", (16, 3, 4, 4))
    params["encoder"]["patch_embedding"]["kernel"] = patch.transpose(2, 3, 1, 0).reshape(48, 16)
    params["encoder"]["class_token"] = formula_weights.torch_value("cls_token", (1, 1, 16))[0]
    params["decoder"]["mask_token"] = formula_weights.torch_value("mask_token", (1, 1, 8))[0, 0]
    for part in params.values():
        for block in part["blocks"].values():
            qkv = block["attention"]["qkv"]
            for name, value in qkv.items():
                qkv[name] = heads_first(value, heads=2)
    return params


@pytest.fixture(scope="module")
def forward():
    return jax.jit(lambda params, images: TINY.apply({"params": params}, images, VISIBLE, RESTORE))


def test_predictions_and_loss_are_the_official_ones(params, forward):
    # facebookresearch/mae@efb2a80, embed_dim=16, depth=2, decoder 8, 1 block, norm_pix_loss=True,
    # filled by the formula; the noise of its random masking replaced by image((2, 16)).
    predictions, outputs = forward(params, IMAGES)
    expected = [
        [-0.36211473, 1.0215807, -0.2963446, -0.85383135],
        [-0.12578022, 0.5266214, -0.19859803, -0.42484778],
    ]
    np.testing.assert_allclose(predictions[:, 3, ::12], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(predictions), 44.81454086303711, rtol=2e-5)
    hidden = RESTORE >= 4
    loss = masked.mae(predictions, patchify(IMAGES, 4), hidden)
    np.testing.assert_allclose(np.mean(loss), 2.2716383934020996, rtol=2e-5)
    assert outputs["patches"].shape == (2, 4, 16) and outputs["cls"].shape == (2, 16)


def test_hidden_patches_reach_nothing(params, forward):
    patches = np.asarray(patchify(IMAGES, 4)).copy()
    patches[np.asarray(RESTORE) >= 4] = 7.0
    rows = patches.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)
    changed, _ = forward(params, jnp.asarray(rows))
    expected, _ = forward(params, IMAGES)
    np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-6)
    patches[0, ORDER[0, 0]] = 7.0
    rows = patches.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)
    changed, _ = forward(params, jnp.asarray(rows))
    assert np.abs(changed[0] - expected[0]).max() > 1e-2


def test_loop_and_scan_agree(params, forward):
    scanned = {
        part: {**values, "blocks": stack_blocks(values["blocks"])}
        for part, values in params.items()
    }
    encoder = ViT(**ENCODER, position="sincos", scan=True, remat="nothing_saveable", taps=(1,))
    module = MaskedAutoencoder(encoder, width=8, depth=1, heads=2)
    found, outputs = jax.jit(module.apply)({"params": scanned}, IMAGES, VISIBLE, RESTORE)
    np.testing.assert_allclose(found, forward(params, IMAGES)[0], rtol=1e-4, atol=1e-5)
    assert outputs["block_1"].shape == (2, 5, 16)
