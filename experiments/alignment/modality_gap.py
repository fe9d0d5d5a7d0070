"""It's Not a Modality Gap (Fahim et al. 2024, arXiv:2405.18570): contrastive losses leave a gap.

CLIP trained on captioned shapes, with the paper's three terms together and each alone, at CLIP's
learned temperature (from 0.07) and at the paper's fixed 0.01; and two image encoders that read the
same images: if these lie apart too, the gap does not come from there being two modalities. Each
term has the weight 1 of the official code (abrar-fahim/contrastive-gap@8c1a17b:
clips/hf_clip.py:383-417, 652-672), which fine-tunes a pretrained CLIP where this trains from
scratch.
"""

import functools
import math

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

HELD_OUT = (
    ("circle", "red"),
    ("square", "green"),
    ("triangle", "blue"),
    ("cross", "yellow"),
    ("star", "purple"),
    ("ring", "orange"),
)
"""Combinations of shape and colour that no row trains on."""


def source(examples: int, split: str) -> dict:
    """A section of captioned shapes."""
    return {
        "name": "data.captioned_shapes.captioned_shapes",
        "examples": examples,
        "seed": 0,
        "held_out": HELD_OUT,
        "split": split,
    }


def shapes(
    *, terms: tuple[str, ...] = (), learned_temperature: bool = True, captions: bool = True
) -> ConfigDict:
    """A convolutional and a text encoder (or two convolutional ones) on 12,000 shapes.

    One learning rate for all rows: see docs/modality_gap/README.md.
    """
    other = "text/embedding" if captions else "copy/embedding"
    pair = {"a": "image/embedding", "b": other}
    contrastive = {"term": "train.stateful_terms.clip"}
    if not learned_temperature:
        contrastive = {"term": "losses.contrastive.clip", "logit_scale": math.log(100.0)}
    added = {
        "alignment": {"alignment": {"term": "losses.uniformity.alignment", **pair}},
        "uniformity": {
            f"uniformity_{side}": {
                "term": "losses.uniformity.uniformity",
                "x": feature,
                "weight": 0.5,
            }
            for side, feature in pair.items()
        },
        "cross_uniformity": {
            "cross_uniformity": {"term": "losses.uniformity.cross_uniformity", **pair}
        },
    }
    objective = {"clip": {**contrastive, **pair}}
    for term in terms:
        objective |= added[term]
    metrics = {
        "gap": {
            "name": "train.evaluate_captions.modality_gap",
            "reference": source(2000, "test"),
            "second": other,
        }
    }
    if captions:
        metrics["zero_shot"] = {
            "name": "train.evaluate_captions.zero_shot",
            "references": {"seen": source(2000, "test"), "unseen": source(1000, "held_out")},
        }
    text = {"vocabulary": 31, "length": 10, "width": 64, "depth": 1, "heads": 4}
    return ConfigDict(
        {
            "data": {"source": source(12_000, "train"), "batch_size": 64},
            "model": {"name": "models.convnet.ConvNet", "widths": (16, 32, 64)},
            "forward": {
                "name": "train.forward_captions.dual_encoder",
                "text": text if captions else None,
                "head_features": 128,
            },
            "objective": objective,
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 1e-4,
            },
            "evaluation": {"metrics": metrics},
            "seed": 0,
            "total_steps": 1200,
        }
    )


ALL = ("alignment", "uniformity", "cross_uniformity")

VARIANTS = {
    "clip": shapes,
    **{f"clip_{term}": functools.partial(shapes, terms=(term,)) for term in ALL},
    "clip_all": functools.partial(shapes, terms=ALL),
    "clip_cold": functools.partial(shapes, learned_temperature=False),
    "clip_all_cold": functools.partial(shapes, terms=ALL, learned_temperature=False),
    "same_images": functools.partial(shapes, captions=False),
    "same_images_all": functools.partial(shapes, terms=ALL, captions=False),
}


def get_config(variant: str = "clip_all") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of modality_gap")().lock()


TABLE = Table(
    paper=517,
    rows={
        "CLIP": "clip",
        "CLIP + alignment": "clip_alignment",
        "CLIP + uniformity": "clip_uniformity",
        "CLIP + cross-uniformity": "clip_cross_uniformity",
        "CLIP + all three": "clip_all",
        "CLIP, temperature 0.01": "clip_cold",
        "CLIP + all three, temperature 0.01": "clip_all_cold",
        "same images": "same_images",
        "same images + all three": "same_images_all",
    },
    columns=(
        Column("modality_gap", better="lower"),
        Column("linear_separability", better="lower"),
        Column("pair_distance", better="lower"),
        Column("zero_shot_seen", better="higher"),
        Column("zero_shot_unseen", better="higher"),
    ),
    claims=(
        Greater("modality_gap", "CLIP", than=0.1),
        Greater("linear_separability", "CLIP", than=0.95),
        Greater("modality_gap", "CLIP, temperature 0.01", than=0.1),
        Greater("linear_separability", "CLIP, temperature 0.01", than=0.95),
        Greater("modality_gap", "same images", than=0.1),
        Greater("linear_separability", "same images", than=0.95),
        Less("modality_gap", "CLIP + all three", "CLIP"),
        Less("linear_separability", "CLIP + all three", "CLIP"),
        Less("modality_gap", "CLIP + all three, temperature 0.01", "CLIP, temperature 0.01"),
        Less("modality_gap", "same images + all three", "same images"),
        Greater("zero_shot_seen", "CLIP + all three", "CLIP"),
        Greater("zero_shot_unseen", "CLIP + all three", "CLIP"),
    ),
)
