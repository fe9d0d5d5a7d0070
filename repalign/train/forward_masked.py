"""Forward passes of masked image modelling."""

from collections.abc import Mapping
from typing import Any

import jax

from repalign.data import augment
from repalign.data.pixels import to_unit_range
from repalign.losses.masked import Masking, random_masking
from repalign.models.masked_autoencoder import MaskedAutoencoder
from repalign.models.transformer import patchify
from repalign.registry import from_section
from repalign.train.modules import encode_images, given_features
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree

_VIEW = {"crop_scale": (0.2, 1.0), "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}


def masked_autoencoder(
    model: Any,
    *,
    view: Mapping[str, Any],
    mask_ratio: float = 0.75,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Forward:
    """MAE: a transformer encodes the visible patches, a small one predicts the pixels of all.

    Every image hides the same number of patches, drawn uniformly. Features: ``mae/predictions`` and
    ``mae/patches`` [batch, tokens, patch_size^2 * channels], ``mae/masked`` [batch, tokens] (what
    `repalign.losses.masked.mae` reads), and the encoder's ``encoder/cls``, ``encoder/patches`` (of
    the visible patches) and taps.

    Args:
        model: the encoder, a `repalign.models.vit.ViT`.
        view: the fields of `repalign.data.augment.ViewRecipe` that differ from MAE's: no colour,
            crops of 0.2 to 1 of the area.
        mask_ratio: share of hidden patches.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mean, std: of the pixels, one a channel or one for all; images enter as
            ``(image - mean) / std``, in training and when the encoder is used alone.

    Source: He et al. (arXiv:2111.06377); facebookresearch/mae@efb2a80:models_mae.py.
    """
    recipe = from_section(augment.ViewRecipe, {**_VIEW, **view}, place="config.forward.view")
    autoencoder = MaskedAutoencoder(model, decoder_width, decoder_depth, decoder_heads)

    def views(images: Array, key: Key[Array, ""]) -> tuple[Array, Masking]:
        view_key, mask_key = jax.random.split(key)
        images = augment.normalize(recipe(view_key, to_unit_range(images)), mean=mean, std=std)
        tokens = images.shape[1] * images.shape[2] // model.patch_size**2
        return images, random_masking(mask_key, len(images), tokens, mask_ratio=mask_ratio)

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        images, masking = views(batch["image"], key)
        return autoencoder.init(key, images, masking.visible, masking.restore)["params"], {}

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del average, frozen
        images, masking = views(batch["image"], key)
        predictions, encoded = autoencoder.apply(
            {"params": params}, images, masking.visible, masking.restore
        )
        features = {
            **given_features(batch),
            "mae/predictions": predictions,
            "mae/patches": patchify(images, model.patch_size),
            "mae/masked": masking.masked,
            **{f"encoder/{name}": values for name, values in encoded.items()},
        }
        return features, state

    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, Features]:
        normalized = augment.normalize(to_unit_range(images), mean=mean, std=std)
        return encode_images(model, params["encoder"], state, normalized)

    return Forward(init, apply, encode=encode)
