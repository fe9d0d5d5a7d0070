"""MAE (He et al. 2021, arXiv:2111.06377): predict the pixels of the patches that were hidden.

Variant ``fashion_mnist`` trains on two cores in minutes; ``imagenet224_b16``, ``_l16`` and ``_h14``
hold the official hyper-parameters (facebookresearch/mae@efb2a80: PRETRAIN.md, main_pretrain.py).
"""

import functools

from ml_collections import ConfigDict

from repalign.data.augment import IMAGENET_MEAN, IMAGENET_STD
from repalign.models.vit import SIZES
from repalign.registry import lookup

STEPS_PER_EPOCH = 1_281_167 // 4096
"""The official loader drops the last batch of an epoch."""

OBJECTIVE = {
    "mae": {
        "term": "losses.masked.mae",
        "predictions": "mae/predictions",
        "patches": "mae/patches",
        "masked": "mae/masked",
        "normalize_patches": True,
    }
}


def fashion_mnist() -> ConfigDict:
    """An encoder of 0.2 M parameters on the 12,000 packaged images, 49 patches of 4x4 pixels."""
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 128,
            },
            "model": {
                "name": "models.vit.ViT",
                "image_size": 28,
                "patch_size": 4,
                "width": 64,
                "depth": 4,
                "heads": 4,
                "position": "sincos",
            },
            "forward": {
                "name": "train.forward_masked.masked_autoencoder",
                "view": {"crop_scale": (0.5, 1.0)},
                "mask_ratio": 0.75,
                "decoder_width": 32,
                "decoder_depth": 2,
                "decoder_heads": 2,
            },
            "objective": OBJECTIVE,
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 100,
                "b2": 0.95,
                "weight_decay": 0.05,
                "no_decay": ("bias", "scale"),
            },
            "evaluation": {
                "metrics": {
                    "encoder": {
                        "name": "train.evaluate.encoder_probe",
                        "reference": {"name": "data.fashion_mnist.fashion_mnist", "split": "test"},
                        "classes": 10,
                    }
                }
            },
            "seed": 0,
            "total_steps": 2000,
        }
    )


def imagenet224(size: str, *, patch_size: int) -> ConfigDict:
    """ViT-``size`` on ImageNet for 800 epochs, as the official recipe has it.

    The data set ``imagenet256`` is prepared by the user with TFDS: ``image`` uint8 [256, 256, 3],
    the shorter side resized and the centre cut out, ``label``. Random crops to 224 pixels are cut
    out of these (bilinearly) where the official loader crops the original files (bicubically). The
    official run computes in half precision with a scaled loss, this one in bfloat16 with float32
    parameters; no average of the parameters is kept.
    """
    return ConfigDict(
        {
            "data": {
                "source": {
                    "name": "data.sources.tfds_source",
                    "dataset": "imagenet256",
                    "split": "train",
                    "keys": ("image", "label"),
                    "data_dir": "",
                },
                "batch_size": 4096,
                "spec": {"image": ((256, 256, 3), "uint8"), "label": ((), "int32")},
            },
            "model": {
                "name": "models.vit.ViT",
                **SIZES[size],
                "image_size": 224,
                "patch_size": patch_size,
                "position": "sincos",
                "scan": True,
                "remat": "dots_with_no_batch_dims_saveable",
                "dtype": "bfloat16",
            },
            "forward": {
                "name": "train.forward_masked.masked_autoencoder",
                "view": {"size": 224, "crop_scale": (0.2, 1.0), "flip": 0.5},
                "mask_ratio": 0.75,
                "decoder_width": 512,
                "decoder_depth": 8,
                "decoder_heads": 16,
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
            },
            "objective": OBJECTIVE,
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1.5e-4 * 4096 / 256,
                "schedule": "cosine",
                "warmup_steps": 40 * STEPS_PER_EPOCH,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "no_decay": ("bias", "scale"),
            },
            "seed": 0,
            "total_steps": 800 * STEPS_PER_EPOCH,
            "checkpoint_every": 20 * STEPS_PER_EPOCH,
        }
    )


VARIANTS = {
    "fashion_mnist": fashion_mnist,
    **{
        f"imagenet224_{size.lower()}{patch_size}": functools.partial(
            imagenet224, size, patch_size=patch_size
        )
        for size, patch_size in (("B", 16), ("L", 16), ("H", 14))
    },
}


def get_config(variant: str = "fashion_mnist") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of mae")().lock()
