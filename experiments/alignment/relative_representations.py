"""Relative representations (Moschella et al. 2022, arXiv:2209.15430): spaces that can be stitched.

Described by its cosine similarities to anchor images, an image has nearly the same code in every
encoder's space, so that a classifier trained on one encoder's codes works on another's. Two pairs
of encoders: two supervised networks on digits with different widths, depths and seeds; and SimCLR
on Fashion-MNIST with EfficientNet-Lite0, which ImageNet trained. A row trains the classifier (the
official decoder: lucmos/relreps@627ed13:experiments/sec:model-reusability-vision/
vision_stitching_imagenet.ipynb) on the first encoder's training images, in one space; the other
encoder comes in at the evaluation only. As many anchors as dimensions, as in the official files.

The seed of a row varies both encoders (EfficientNet is one fixed network), the anchors and the
classifier.
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

OTHER_SEEDS = 1000
"""What is added to the run's seed for the second encoder."""

DIGITS = {split: {"name": "data.digits.digits", "split": split} for split in ("train", "test")}
FASHION = {
    split: {"name": "data.fashion_mnist.fashion_mnist", "split": split}
    for split in ("train", "test")
}


def digits_encoder(*, widths: tuple[int, ...], blocks: int) -> ConfigDict:
    """A supervised convolutional network whose embedding has 64 dimensions."""
    return ConfigDict(
        {
            "data": {"source": dict(DIGITS["train"]), "batch_size": 128},
            "model": {"name": "models.convnet.ConvNet", "widths": widths, "blocks": blocks},
            "forward": {"name": "train.forward.supervised", "classes": 10, "shift": 1, "flip": 0.0},
            "objective": {"cross_entropy": cross_entropy()},
            "optimizer": adamw(3e-3, warmup_steps=20),
            "seed": 0,
            "total_steps": 600,
        }
    )


def fashion_encoder() -> ConfigDict:
    """SimCLR with a convolutional network whose embedding is as wide as EfficientNet's, 112."""
    return ConfigDict(
        {
            "data": {"source": dict(FASHION["train"]), "batch_size": 256},
            "model": {"name": "models.convnet.ConvNet", "widths": (16, 32, 112)},
            "forward": {
                "name": "train.forward.two_views",
                "view": {"crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "blur": 0.0},
                "head_hidden": 128,
                "head_features": 64,
            },
            "objective": {
                "nt_xent": {
                    "term": "losses.contrastive.nt_xent",
                    "a": "view_0/embedding",
                    "b": "view_1/embedding",
                    "temperature": 0.2,
                }
            },
            "optimizer": adamw(2e-3, warmup_steps=50),
            "seed": 0,
            "total_steps": 300,
        }
    )


PAIRS = {
    "digits": {
        "data": DIGITS,
        "width": 64,
        "first": {"encoder": "trained", "config": "relative_representations:digits_encoder_a"},
        "second": {"encoder": "trained", "config": "relative_representations:digits_encoder_b"},
    },
    "untrained": {
        "data": DIGITS,
        "width": 64,
        "first": {"encoder": "random", "config": "relative_representations:digits_encoder_a"},
        "second": {"encoder": "random", "config": "relative_representations:digits_encoder_b"},
    },
    "fashion": {
        "data": FASHION,
        "width": 112,
        "first": {"encoder": "trained", "config": "relative_representations:fashion_encoder"},
        "second": {"encoder": "efficientnet_lite0"},
    },
}


def stitched(
    pair: str,
    *,
    space: str = "absolute",
    alignment: str = "none",
    pairs: int = 0,
    shuffled: bool = False,
    learning_rate: float = 3e-3,
) -> ConfigDict:
    """A classifier on the first encoder of a pair, evaluated on the second; one rate for all."""
    chosen = lookup(PAIRS, pair, kind="pair of encoders")
    relative = {"space": "relative", "anchors": chosen["width"]}
    column = "latent/representation"
    return ConfigDict(
        {
            "data": {
                "source": dict(chosen["data"]["train"]),
                "batch_size": 256,
                "columns": {
                    column: {
                        "name": "train.latent_spaces.representation",
                        **chosen["first"],
                        **(relative if space == "relative" else {}),
                    }
                },
            },
            "model": {
                "name": "models.decoders.LatentClassifier",
                "classes": 10,
                "hidden": chosen["width"],
            },
            "forward": {"name": "train.forward_latent.latent_classifier", "representation": column},
            "objective": {"cross_entropy": cross_entropy()},
            "optimizer": adamw(learning_rate, warmup_steps=20),
            "evaluation": {
                "final_metrics": {
                    "stitching": {
                        "name": "train.latent_spaces.stitching",
                        "column": column,
                        "other": {**chosen["second"], "seed_offset": OTHER_SEEDS},
                        "reference": dict(chosen["data"]["test"]),
                        "alignment": alignment,
                        "pairs": pairs,
                        "shuffled": shuffled,
                    }
                }
            },
            "seed": 0,
            "total_steps": 600,
        }
    )


def cross_entropy() -> dict:
    return {
        "term": "optax:softmax_cross_entropy_with_integer_labels",
        "logits": "classifier/logits",
        "labels": "label",
    }


def adamw(learning_rate: float, *, warmup_steps: int) -> dict:
    return {
        "name": "adamw",
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": warmup_steps,
        "weight_decay": 1e-3,
    }


VARIANTS = {
    "digits_absolute": functools.partial(stitched, "digits"),
    "digits_relative": functools.partial(stitched, "digits", space="relative"),
    "digits_procrustes": functools.partial(stitched, "digits", alignment="procrustes", pairs=64),
    "digits_affine": functools.partial(stitched, "digits", alignment="affine"),
    "digits_shuffled": functools.partial(stitched, "digits", space="relative", shuffled=True),
    "untrained_relative": functools.partial(stitched, "untrained", space="relative"),
    "fashion_absolute": functools.partial(stitched, "fashion"),
    "fashion_relative": functools.partial(stitched, "fashion", space="relative"),
    "fashion_procrustes": functools.partial(stitched, "fashion", alignment="procrustes", pairs=112),
    "fashion_affine": functools.partial(stitched, "fashion", alignment="affine"),
    "digits_encoder_a": functools.partial(digits_encoder, widths=(32, 64), blocks=0),
    "digits_encoder_b": functools.partial(digits_encoder, widths=(48, 64), blocks=1),
    "fashion_encoder": fashion_encoder,
}


def get_config(variant: str = "digits_relative") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of relative_representations")().lock()


TABLE = Table(
    paper=20,
    rows={
        "digits, absolute": "digits_absolute",
        "digits, relative": "digits_relative",
        "digits, relative, shuffled anchors": "digits_shuffled",
        "digits, relative, untrained encoders": "untrained_relative",
        "digits, Procrustes on the anchors": "digits_procrustes",
        "digits, affine on all images": "digits_affine",
        "Fashion, absolute": "fashion_absolute",
        "Fashion, relative": "fashion_relative",
        "Fashion, Procrustes on the anchors": "fashion_procrustes",
        "Fashion, affine on all images": "fashion_affine",
    },
    columns=(
        Column("stitched_accuracy", better="higher"),
        Column("unstitched_accuracy", better="higher"),
        Column("stitching_gap", better="lower"),
        Column("neighbor_jaccard", better="higher"),
        Column("mean_reciprocal_rank", better="higher"),
        Column("other_probe"),
    ),
    claims=tuple(
        claim
        for data in ("digits", "Fashion")
        for claim in (
            Greater("stitched_accuracy", f"{data}, relative", f"{data}, absolute"),
            Less("stitching_gap", f"{data}, relative", than=0.05),
            Less("stitched_accuracy", f"{data}, absolute", than=0.2),
            Greater("neighbor_jaccard", f"{data}, relative", f"{data}, absolute"),
            Greater("mean_reciprocal_rank", f"{data}, relative", f"{data}, absolute"),
        )
    ),
    seeds=3,
)
