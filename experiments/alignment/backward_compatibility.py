"""Backward compatibility through an orthogonal layer (Ricci et al. 2024, arXiv:2408.08793; OCA).

A new encoder's embedding is wider than the old one's and passes a learned orthogonal layer, whose
first dimensions are aligned with the old space; angles, hence the new model's own searches, stay
as they were. The table asks on digits whether new queries then search a gallery that the old
encoder indexed better than old queries do, what that costs the new encoder, and whether it was the
layer: rows without a layer, with an unconstrained linear one, and without any alignment. Two old
models: one that saw half of the classes, and one that saw a tenth of the images of all classes.

No official code could be read. The paper aligns with fixed prototypes of the old classes; here a
cross-entropy does, as in backward-compatible training (Shen et al. 2020). One more row pulls every
image to its own old embedding instead (the cosine term of BT^2). The classifier is linear and
learned. The layer turns the encoder's own output, an average after a ReLU: behind a linear layer
it would add nothing.

The seed of a row varies the new encoder and its old one.
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

OLD_WIDTH, NEW_WIDTH = 16, 32
OLD_SEEDS = 1000
"""What is added to the run's seed for the old encoder."""

TRAIN = {"name": "data.digits.digits", "split": "train"}
TEST = {"name": "data.digits.digits", "split": "test"}
OLD_DATA = {
    "half_classes": {**TRAIN, "classes": (0, 1, 2, 3, 4)},
    "fewer_images": {**TRAIN, "examples": 134},
}


def old_encoder(data: str) -> ConfigDict:
    """A small supervised encoder that saw a part of the training images."""
    return ConfigDict(
        {
            "data": {"source": dict(OLD_DATA[data]), "batch_size": 64},
            "model": {"name": "models.convnet.ConvNet", "widths": (16, OLD_WIDTH)},
            "forward": {"name": "train.forward.supervised", "classes": 10, "shift": 1, "flip": 0.0},
            "objective": {
                "cross_entropy": {
                    "term": "optax:softmax_cross_entropy_with_integer_labels",
                    "logits": "classifier/logits",
                    "labels": "label",
                }
            },
            "optimizer": adamw(3e-3),
            "seed": 0,
            "total_steps": 600,
        }
    )


def new_encoder(
    data: str,
    *,
    transformation: str = "none",
    alignment: str | None = "prototypes",
    learning_rate: float = 1e-2,
) -> ConfigDict:
    """A wider encoder on all training images, aligned with the old one or not.

    One rate for all rows; how it was chosen is in docs/backward_compatibility/README.md.
    """
    old = {
        "encoder": "trained",
        "config": f"backward_compatibility:old_{data}",
        "seed_offset": OLD_SEEDS,
    }
    # One prefix, the whole width: an ordinary linear classifier.
    classification = {
        "term": "train.classifier_terms.matryoshka",
        "embedding": "encoder/embedding",
        "labels": "label",
        "prefixes": (NEW_WIDTH,),
        "classes": 10,
    }
    columns, objective = {}, {"classification": classification}
    if alignment == "prototypes":
        columns["old/prototypes"] = {
            "name": "train.latent_spaces.class_means",
            "classes": 10,
            **old,
        }
        objective["alignment"] = {
            "term": "losses.backward_compatibility.old_prototype_cross_entropy",
            "new": "encoder/embedding",
            "prototypes": "old/prototypes",
            "labels": "label",
        }
    elif alignment == "same_image":
        columns["old/embedding"] = {"name": "train.latent_spaces.representation", **old}
        objective["alignment"] = {
            "term": "losses.backward_compatibility.old_prefix_cosine",
            "new": "encoder/embedding",
            "old": "old/embedding",
        }
    return ConfigDict(
        {
            "data": {"source": dict(TRAIN), "batch_size": 128, "columns": columns},
            "model": {
                "name": "models.transformed.transformed_encoder",
                "encoder": {"name": "models.convnet.ConvNet", "widths": (32, NEW_WIDTH)},
                "transformation": transformation,
            },
            "forward": {"name": "train.forward_encoder.encoder", "shift": 1},
            "objective": objective,
            "optimizer": adamw(learning_rate),
            "evaluation": {
                "final_metrics": {
                    "compatibility": {
                        "name": "train.latent_spaces.compatibility",
                        "old": old,
                        "reference": dict(TEST),
                    }
                }
            },
            "seed": 0,
            "total_steps": 600,
        }
    )


def adamw(learning_rate: float) -> dict:
    return {
        "name": "adamw",
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": 20,
        "weight_decay": 1e-3,
    }


VARIANTS = {
    **{
        f"{data}_{name}": functools.partial(new_encoder, data, **arguments)
        for data in OLD_DATA
        for name, arguments in {
            "independent": {"alignment": None},
            "aligned": {},
            "orthogonal": {"transformation": "orthogonal"},
            "linear": {"transformation": "linear"},
            "same_image": {"transformation": "orthogonal", "alignment": "same_image"},
        }.items()
    },
    **{f"old_{data}": functools.partial(old_encoder, data) for data in OLD_DATA},
}


def get_config(variant: str = "half_classes_orthogonal") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of backward_compatibility")().lock()


SETTINGS = {"half_classes": "half the classes", "fewer_images": "fewer images"}

TABLE = Table(
    paper=73,
    rows={
        f"{setting}: {title}": f"{data}_{variant}"
        for data, setting in SETTINGS.items()
        for title, variant in {
            "independent": "independent",
            "aligned, no layer": "aligned",
            "aligned, orthogonal layer": "orthogonal",
            "aligned, linear layer": "linear",
            "orthogonal layer, same image": "same_image",
        }.items()
    },
    columns=(
        Column("cross_test", better="higher"),
        Column("old_self_test"),
        Column("compatibility_gain", better="higher"),
        Column("new_self_test", better="higher"),
        Column("cross_test_top_1", better="higher"),
        Column("new_self_test_top_1", better="higher"),
    ),
    claims=tuple(
        claim
        for setting in SETTINGS.values()
        for orthogonal, linear, independent in [
            (
                f"{setting}: aligned, orthogonal layer",
                f"{setting}: aligned, linear layer",
                f"{setting}: independent",
            )
        ]
        for claim in (
            Greater("compatibility_gain", orthogonal, than=0.0),
            Less("compatibility_gain", independent, than=0.0),
            Greater("new_self_test", orthogonal, independent, margin=-0.01),
            Less("cross_test", linear, orthogonal),
            Less("new_self_test", linear, orthogonal),
            Greater("cross_test", orthogonal, f"{setting}: aligned, no layer"),
        )
    ),
    seeds=3,
)
