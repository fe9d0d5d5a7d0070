"""Forward passes of masked image modelling."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repalign.data import augment
from repalign.data.pixels import to_unit_range
from repalign.losses.masked import Masking, inverse_block_masking, random_masking
from repalign.models.masked_autoencoder import MaskedAutoencoder
from repalign.models.predictor import LatentPredictor
from repalign.models.transformer import patchify
from repalign.registry import UserError, from_section
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
    `repalign.losses.masked.mae` reads), ``mae/visible`` [batch, visible] (indices of the visible
    patches), ``mae/decoded`` [batch, tokens, decoder_width] (what the predictions are read from),
    and the encoder's ``encoder/cls``, ``encoder/patches`` (of the visible patches, in the order of
    ``mae/visible``) and taps.

    Args:
        model: the encoder, a `repalign.models.vit.ViT`.
        view: the fields of `repalign.data.augment.ViewRecipe` that differ from MAE's: no colour,
            crops of 0.2 to 1 of the area. A column of tokens (``teacher/patches``) is of the same
            patches without crops and mirror images only (``crop_scale`` None, ``flip`` 0).
        mask_ratio: share of hidden patches.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mean, std: of the pixels, one a channel or one for all; images enter as
            ``(image - mean) / std``, in training and when the encoder is used alone.

    Source: He et al. (arXiv:2111.06377); facebookresearch/mae@efb2a80:models_mae.py.
    """
    prepare = _preparation(view, mean=mean, std=std)
    autoencoder = MaskedAutoencoder(model, decoder_width, decoder_depth, decoder_heads)

    def views(images: Array, key: Key[Array, ""]) -> tuple[Array, Masking]:
        view_key, mask_key = jax.random.split(key)
        images = prepare(images, view_key)
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
            "mae/visible": masking.visible,
            "mae/decoded": encoded.pop("decoded"),
            **{f"encoder/{name}": values for name, values in encoded.items()},
        }
        return features, state

    return Forward(init, apply, encode=_encoder_alone(model, mean=mean, std=std))


def latent_prediction(
    model: Any,
    *,
    view: Mapping[str, Any],
    mask_ratio: float = 0.65,
    predicted: float = 0.05,
    predictor_depth: int = 12,
    predictor_heads: int = 16,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Forward:
    """CAPI: from the visible patches, predict what an averaged encoder makes of hidden ones.

    The averaged encoder sees the whole image, the trained one a block of it (see
    `repalign.losses.masked.inverse_block_masking`). Features: ``teacher/patches`` [batch, tokens,
    width], stop-gradiented, ``predictor/patches`` [batch, hidden, width], ``predictor/positions``
    [batch, hidden] (which tokens those are), and the trained encoder's ``encoder/patches`` (of the
    visible patches) and taps. The term that compares them is `repalign.train.masked_terms.capi`.

    Args:
        model: the encoder, a `repalign.models.vit.ViT` of fixed (``sincos``) positions.
            ``optimizer.average_decay`` has to be set.
        view: as in `masked_autoencoder`, where MAE's stands for CAPI's (crops of 0.6 to 1).
        mask_ratio: share of hidden patches.
        predicted: share of the hidden patches that are predicted, drawn at random.
        predictor_depth, predictor_heads: see `repalign.models.predictor.LatentPredictor`.
        mean, std: as in `masked_autoencoder`.

    Raises:
        UserError: no patch is left to predict, or no parameters are averaged.

    Source: Darcet et al. (arXiv:2502.08769); facebookresearch/capi@98b4fa1:train_capi.py:67-108,
    data.py:449-474, default_pretrain_config.yaml.
    """
    prepare = _preparation(view, mean=mean, std=std)
    student = LatentPredictor(model, predictor_depth, predictor_heads)

    def views(images: Array, key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        view_key, mask_key = jax.random.split(key)
        images = prepare(images, view_key)
        grid = (images.shape[1] // model.patch_size, images.shape[2] // model.patch_size)
        masking = inverse_block_masking(mask_key, len(images), grid, mask_ratio=mask_ratio)
        seen = masking.visible.shape[1]
        asked = int(predicted * (masking.masked.shape[1] - seen))
        if asked < 1:
            raise UserError(
                f"config.forward.predicted={predicted} of {masking.masked.shape[1] - seen} hidden "
                "patches is none; raise it or mask_ratio."
            )
        order = jnp.argsort(masking.restore, axis=1)
        return images, masking.visible, order[:, seen : seen + asked]

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        return student.init(key, *views(batch["image"], key))["params"], {}

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del frozen
        if average is None:
            raise UserError(
                "config.forward: latent_prediction needs averaged parameters: set "
                "config.optimizer.average_decay."
            )
        images, visible, hidden = views(batch["image"], key)
        predictions, encoded = student.apply({"params": params}, images, visible, hidden)
        teacher, _ = model.apply({"params": average["encoder"]}, images)
        features = {
            **given_features(batch),
            "teacher/patches": jax.lax.stop_gradient(teacher["patches"]),
            "predictor/patches": predictions,
            "predictor/positions": hidden,
            **{f"encoder/{name}": values for name, values in encoded.items()},
        }
        return features, state

    return Forward(init, apply, encode=_encoder_alone(model, mean=mean, std=std))


def _preparation(view: Mapping[str, Any], *, mean: Any, std: Any):
    """Returns what makes the encoder's input of images: the view, normalised."""
    recipe = from_section(augment.ViewRecipe, {**_VIEW, **view}, place="config.forward.view")

    def prepare(images: Array, key: Key[Array, ""]) -> Array:
        return augment.normalize(recipe(key, to_unit_range(images)), mean=mean, std=std)

    return prepare


def _encoder_alone(model: Any, *, mean: Any, std: Any):
    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, Features]:
        normalized = augment.normalize(to_unit_range(images), mean=mean, std=std)
        return encode_images(model, params["encoder"], state, normalized)

    return encode
