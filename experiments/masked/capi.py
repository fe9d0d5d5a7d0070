"""CAPI (Darcet et al. 2025, arXiv:2502.08769): predict which online cluster a hidden patch's latent
falls into.

The table compares it with MAE at equal steps on scenes of several garments, by linear probes of
the whole scene and of single patches, and asks what becomes of the clusters without Sinkhorn's
balancing. Hyper-parameters follow facebookresearch/capi@98b4fa1:default_pretrain_config.yaml where
the size allows: temperatures, iterations, mask ratio and shape, crops, a predictor of half the
encoder's depth, as many clusters as images in a batch.
"""

import functools

from ml_collections import ConfigDict

from repalign.data.augment import FASHION_MNIST_MEAN, FASHION_MNIST_STD
from repalign.data.garment_scenes import BACKGROUND
from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

TEST = {"name": "data.garment_scenes.garment_scenes", "split": "test", "examples": 2000}
INPUT = {
    "view": {"crop_scale": (0.6, 1.0)},
    "mean": FASHION_MNIST_MEAN,
    "std": FASHION_MNIST_STD,
}
MAE = {
    "forward": {
        "name": "train.forward_masked.masked_autoencoder",
        **INPUT,
        "mask_ratio": 0.75,
        "decoder_width": 32,
        "decoder_depth": 2,
        "decoder_heads": 2,
    },
    "objective": {
        "mae": {
            "term": "losses.masked.mae",
            "predictions": "mae/predictions",
            "patches": "mae/patches",
            "masked": "mae/masked",
        }
    },
    "metrics": {},
}
LATENT = {
    "name": "train.forward_masked.latent_prediction",
    **INPUT,
    "mask_ratio": 0.65,
    "predicted": 0.35,
    "predictor_depth": 2,
    "predictor_heads": 4,
}
CAPI = {
    "term": "train.masked_terms.capi",
    "teacher": "teacher/patches",
    "student": "predictor/patches",
    "positions": "predictor/positions",
    "clusters": 128,
}
CLUSTERS = {
    "clusters": {
        "name": "train.evaluate_objective.objective_metrics",
        "reference": TEST,
        "metrics": {
            "usage_entropy": "capi/usage_entropy",
            "target_entropy": "capi/target_entropy",
        },
    }
}


def latent(**options: bool) -> dict:
    """The sections of CAPI that MAE has others of."""
    return {
        "forward": LATENT,
        "objective": {"capi": {**CAPI, **options}},
        "metrics": CLUSTERS,
    }


def scenes(sections: dict, *, learning_rate: float = 2e-3, steps: int = 330) -> ConfigDict:
    """An encoder of 0.2 M parameters on 12,000 scenes of 49 patches, two or three garments each.

    Evaluated are the averaged weights, whatever the row. One learning rate for all rows, that of
    ``mae:fashion_mnist``; none was tuned.
    """
    return ConfigDict(
        {
            "data": {
                "source": {
                    "name": "data.garment_scenes.garment_scenes",
                    "split": "train",
                    "examples": 12_000,
                },
                "batch_size": 128,
            },
            "model": {
                "name": "models.vit.ViT",
                "image_size": 49,
                "patch_size": 7,
                "width": 64,
                "depth": 3,
                "heads": 4,
                "class_token": False,
                "position": "sincos",
            },
            "forward": sections["forward"],
            "objective": sections["objective"],
            "optimizer": {
                "name": "adamw",
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": 33,
                "b2": 0.95,
                "weight_decay": 0.1,
                "no_decay": ("bias", "scale"),
                "average_decay": 0.99,
            },
            "evaluation": {
                "metrics": {
                    "encoder": {
                        "name": "train.evaluate.encoder_probe",
                        "reference": TEST,
                        "classes": 10,
                    },
                    "patches": {
                        "name": "train.evaluate_segmentation.patch_segmentation",
                        "reference": TEST,
                        "classes": BACKGROUND + 1,
                    },
                    **sections["metrics"],
                },
            },
            "seed": 0,
            "total_steps": steps,
        }
    )


VARIANTS = {
    "mae": functools.partial(scenes, MAE),
    "capi": functools.partial(scenes, latent()),
    "without_sinkhorn": functools.partial(scenes, latent(balanced=False)),
    "not_positionwise": functools.partial(scenes, latent(positionwise=False)),
    # The rate of the only step is the warm-up's first, 0.
    "random_encoder": functools.partial(scenes, MAE, steps=1),
}


def get_config(variant: str = "capi") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of capi")().lock()


TABLE = Table(
    paper=454,
    rows={
        "MAE": "mae",
        "CAPI": "capi",
        "CAPI without Sinkhorn": "without_sinkhorn",
        "random encoder": "random_encoder",
    },
    columns=(
        Column("patch_miou", title="patch mIoU", better="higher"),
        Column("patch_accuracy", better="higher"),
        Column("linear_probe", better="higher"),
        Column("knn_probe", better="higher"),
        Column("usage_entropy", unit="nats"),
        Column("target_entropy", unit="nats"),
    ),
    claims=(
        Greater("patch_miou", "CAPI", "MAE"),
        Greater("linear_probe", "CAPI", "MAE"),
        Greater("patch_miou", "CAPI", "random encoder"),
        Less("usage_entropy", "CAPI without Sinkhorn", "CAPI"),
        Greater("patch_miou", "CAPI", "CAPI without Sinkhorn"),
    ),
    reported={
        "CAPI": {"ADE20K mIoU, linear": 32.1, "ImageNet, ViT-L": 83.8},
    },
    seeds=3,
)
