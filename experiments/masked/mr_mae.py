"""MR-MAE (Gao et al. 2023, arXiv:2303.05475): mimic a frozen teacher at the visible tokens, and
reconstruct pixels at the masked ones.

The table asks on Fashion-MNIST what mimicking gives a masked autoencoder, whether it matters that
it happens at the tokens that are not reconstructed, and how much of it the teacher's training has
to do with. The teacher, a convolutional encoder trained by SimCLR without labels, has seen the
images whole and unaugmented; so no row crops or mirrors them.
"""

import functools

from ml_collections import ConfigDict

from repalign.data.augment import FASHION_MNIST_MEAN, FASHION_MNIST_STD
from repalign.registry import lookup
from repalign.tables.claims import Greater
from repalign.tables.table import Column, Table

RECONSTRUCT = {
    "mae": {
        "term": "losses.masked.mae",
        "predictions": "mae/predictions",
        "patches": "mae/patches",
        "masked": "mae/masked",
    }
}
MIMIC_VISIBLE = {
    "mimic": {
        "term": "train.masked_terms.mimic",
        "student": "encoder/patches",
        "teacher": "teacher/patches",
        "positions": "mae/visible",
    }
}
MIMIC_MASKED = {
    "mimic": {
        "term": "train.masked_terms.mimic",
        "student": "mae/decoded",
        "teacher": "teacher/patches",
        "where": "mae/masked",
    }
}


def small(
    objective: dict, *, encoder: str = "trained", learning_rate: float = 2e-3, steps: int = 300
) -> ConfigDict:
    """An encoder of 0.2 M parameters on 12,000 images of 16 patches, 4 of them visible.

    The embedding is the mean of the patches, which is what mimicking trains. One learning rate for
    all rows, that of ``mae:fashion_mnist``; none was tuned.
    """
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 128,
                "columns": {
                    "teacher/patches": {
                        "name": "train.encoders.tokens",
                        "encoder": encoder,
                        "config": "simclr:fashion_mnist",
                        "seed": 7,
                    }
                },
            },
            "model": {
                "name": "models.vit.ViT",
                "image_size": 28,
                "patch_size": 7,
                "width": 64,
                "depth": 4,
                "heads": 4,
                "class_token": False,
                "position": "sincos",
            },
            "forward": {
                "name": "train.forward_masked.masked_autoencoder",
                "view": {"crop_scale": None, "flip": 0.0},
                "mask_ratio": 0.75,
                "decoder_width": 32,
                "decoder_depth": 2,
                "decoder_heads": 2,
                "mean": FASHION_MNIST_MEAN,
                "std": FASHION_MNIST_STD,
            },
            "objective": objective,
            "optimizer": {
                "name": "adamw",
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": 30,
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
                },
            },
            "seed": 0,
            "total_steps": steps,
        }
    )


BOTH = {**RECONSTRUCT, **MIMIC_VISIBLE}
VARIANTS = {
    "mae": functools.partial(small, RECONSTRUCT),
    "mr_mae": functools.partial(small, BOTH),
    "mimic_only": functools.partial(small, MIMIC_VISIBLE),
    "features_at_masked": functools.partial(small, MIMIC_MASKED),
    "both_at_masked": functools.partial(small, {**RECONSTRUCT, **MIMIC_MASKED}),
    "random_teacher": functools.partial(small, BOTH, encoder="random"),
    # The rate of the only step is the warm-up's first, 0.
    "random_encoder": functools.partial(small, RECONSTRUCT, steps=1),
}


def get_config(variant: str = "mr_mae") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of mr_mae")().lock()


TABLE = Table(
    paper=533,
    rows={
        "MAE": "mae",
        "MR-MAE": "mr_mae",
        "mimic at visible only": "mimic_only",
        "teacher's features at masked": "features_at_masked",
        "pixels and features at masked": "both_at_masked",
        "MR-MAE, random teacher": "random_teacher",
        "random encoder": "random_encoder",
    },
    columns=(Column("linear_probe", better="higher"), Column("knn_probe", better="higher")),
    claims=(
        Greater("linear_probe", "MR-MAE", "MAE"),
        Greater("linear_probe", "MR-MAE", "teacher's features at masked"),
        Greater("linear_probe", "MR-MAE", "pixels and features at masked"),
        Greater("linear_probe", "MR-MAE", "mimic at visible only"),
        Greater("linear_probe", "MR-MAE", "MR-MAE, random teacher"),
        Greater("linear_probe", "MAE", "random encoder"),
    ),
    reported={
        "MAE": {"fine-tuned on ImageNet, ViT-B": 83.6},
        "MR-MAE": {"fine-tuned on ImageNet, ViT-B": 85.8},
    },
    seeds=3,
)
