"""VNE (Kim et al. 2023, arXiv:2304.01434): the entropy of the eigenvalues as the only repulsion.

I-VNE+ is the agreement of two views plus the von Neumann entropy of the embeddings' autocorrelation
matrix. The table asks on Fashion-MNIST whether agreement alone collapses, whether entropy and rank
rise with the coefficient of the entropy, and whether the representation is as good as VICReg's.
Official code: jaeill/CVPR23-VNE@ff4fa0d:examples/i-vne+/train_ivne_imagenet100.py:125-129,176-290.
"""

import functools
import itertools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

VIEWS = {"a": "view_0/embedding", "b": "view_1/embedding"}
AGREEMENT = 4.16
"""alpha_1, log 64: 64 is the batch in the official code, the width of the embedding here."""

COEFFICIENTS = (0.0, 0.25, 1.0, 4.0)
"""alpha_2; 1 is the official one."""


def i_vne_plus(coefficient: float) -> dict:
    """``-alpha_1 mean cos(z, z') - alpha_2 (S(z) + S(z')) / 2``, without the second part if 0."""
    objective = {
        "agreement": {
            "term": "losses.joint_embedding.negative_cosine",
            **VIEWS,
            "weight": AGREEMENT,
        }
    }
    if coefficient:
        for view in (0, 1):
            objective[f"entropy_{view}"] = {
                "term": "losses.regularizers.von_neumann_entropy",
                "x": f"view_{view}/embedding",
                "weight": -coefficient / 2,
            }
    return objective


def fashion_mnist(objective: dict, *, learning_rate: float, steps: int | None = None) -> ConfigDict:
    """A convolutional encoder on the 12,000 packaged images.

    The learning rate is the best of one grid on one seed that the table does not use, for I-VNE+
    with coefficient 1 and for VICReg each (docs/vne/README.md).
    """
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 256,
            },
            "model": {"name": "models.convnet.ConvNet", "widths": (16, 32, 64), "blocks": 0},
            "forward": {
                "name": "train.forward.two_views",
                "view": {"crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "blur": 0.0},
                "head_hidden": 128,
                "head_features": 64,
                "head_norm": "batch",
            },
            "objective": objective,
            "optimizer": {
                "name": "adamw",
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": 15,
                "weight_decay": 1e-4,
            },
            "evaluation": {
                "metrics": {
                    name: {
                        "name": "train.evaluate.encoder_probe",
                        "reference": {"name": "data.fashion_mnist.fashion_mnist", "split": "test"},
                        "classes": 10,
                        **options,
                    }
                    for name, options in {
                        "encoder": {},
                        "projection": {
                            "tap": "projection",
                            "spectrum": True,
                            "prefix": "projection_",
                        },
                    }.items()
                }
            },
            "seed": 0,
            "total_steps": steps or 150,
        }
    )


VICREG = {"vicreg": {"term": "losses.joint_embedding.vicreg", **VIEWS}}

VARIANTS = {
    **{
        f"vne_{coefficient:g}": functools.partial(
            fashion_mnist, i_vne_plus(coefficient), learning_rate=3e-2
        )
        for coefficient in COEFFICIENTS
    },
    "vicreg": functools.partial(fashion_mnist, VICREG, learning_rate=3e-2),
    # One step at the start of the warm-up, where the learning rate is 0.
    "untrained": functools.partial(fashion_mnist, VICREG, learning_rate=3e-2, steps=1),
}


def get_config(variant: str = "vne_1") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of vne")().lock()


ROWS = {
    "agreement alone": "vne_0",
    **{f"I-VNE+, coefficient {c:g}": f"vne_{c:g}" for c in COEFFICIENTS[1:]},
}

TABLE = Table(
    paper=166,
    rows={**ROWS, "VICReg": "vicreg", "untrained": "untrained"},
    columns=(
        Column("linear_probe", better="higher"),
        Column("knn_probe", better="higher"),
        Column("projection_entropy", title="entropy of the projection"),
        Column("projection_effective_rank", title="effective rank of the projection"),
    ),
    claims=(
        Less("projection_entropy", "agreement alone", than=0.1),
        Greater("linear_probe", "I-VNE+, coefficient 1", "agreement alone"),
        *(
            Greater(metric, higher, lower)
            for metric in ("projection_entropy", "projection_effective_rank")
            for lower, higher in itertools.pairwise(ROWS)
        ),
        Greater("linear_probe", "I-VNE+, coefficient 1", "VICReg", margin=-0.01),
    ),
    seeds=3,
)
