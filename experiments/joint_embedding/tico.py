"""TiCo (Zhu et al. 2022, arXiv:2206.10698): agreement of views against a running covariance.

The table asks on Fashion-MNIST what the paper says of small batches: is TiCo, whose covariance
remembers earlier batches, better than SimCLR and Barlow Twins at batch 16, and less so at 256; and
does the covariance term alone prevent collapse? There is no code by the authors; the public one is
sayannag/TiCo-pytorch@2259b83:TiCo/main.py:64-77.
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

IMAGES = 24_000
"""Images that every run sees, two epochs of the packaged ones."""

DECAY_AT_16 = 0.99
"""Of the moving average at batch 16; at batch k * 16 it is this to the power of k
(Busbridge et al. 2023, arXiv:2307.13813), so that it reaches back over as many images."""


def tico(rho: float) -> dict:
    """TiCo's term; the gradient goes through this batch's part of the covariance too."""
    return {
        "term": "train.stateful_terms.tico",
        "a": "view_0/embedding",
        "b": "view_1/target",
        "beta": 0.9,
        "rho": rho,
        "detach": False,
    }


VIEWS = {"a": "view_0/embedding", "b": "view_1/embedding"}
TERMS = {
    "tico": tico(8.0),
    "no_covariance": tico(0.0),
    "simclr": {"term": "losses.contrastive.nt_xent", **VIEWS, "temperature": 0.2},
    "barlow_twins": {"term": "losses.joint_embedding.barlow_twins", **VIEWS, "lambda_param": 5e-3},
}


def fashion_mnist(
    method: str, *, batch_size: int, learning_rate: float, steps: int | None = None
) -> ConfigDict:
    """A convolutional encoder on the 12,000 packaged images; every row evaluates its average.

    The learning rate of each row is the best of one grid on one seed that the table does not use;
    without covariance it is TiCo's (docs/tico/README.md).
    """
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": batch_size,
            },
            "model": {"name": "models.convnet.ConvNet", "widths": (16, 32, 64), "blocks": 0},
            "forward": {
                "name": "train.forward.two_views",
                "view": {"crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "blur": 0.0},
                "head_hidden": 128,
                "head_features": 64,
                "head_norm": "batch",
                "momentum": TERMS[method]["term"].endswith("tico"),
            },
            "objective": {method: dict(TERMS[method])},
            "optimizer": {
                "name": "adamw",
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": IMAGES // batch_size // 10,
                "weight_decay": 1e-4,
                "average_decay": DECAY_AT_16 ** (batch_size // 16),
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
            "total_steps": steps or IMAGES // batch_size,
        }
    )


VARIANTS = {
    **{
        f"{method}_{batch_size}": functools.partial(
            fashion_mnist, method, batch_size=batch_size, learning_rate=rate
        )
        for method, rates in {
            "tico": (1e-2, 3e-2),
            "no_covariance": (1e-2, 3e-2),
            "simclr": (1e-2, 1e-2),
            "barlow_twins": (1e-2, 3e-2),
        }.items()
        for batch_size, rate in zip((16, 256), rates, strict=True)
    },
    # One step at the start of the warm-up, where the learning rate is 0.
    "untrained": functools.partial(
        fashion_mnist, "simclr", batch_size=16, learning_rate=1e-3, steps=1
    ),
}


def get_config(variant: str = "tico_16") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of tico")().lock()


TABLE = Table(
    paper=49,
    rows={
        "TiCo, batch 16": "tico_16",
        "SimCLR, batch 16": "simclr_16",
        "Barlow Twins, batch 16": "barlow_twins_16",
        "TiCo without covariance, batch 16": "no_covariance_16",
        "TiCo, batch 256": "tico_256",
        "SimCLR, batch 256": "simclr_256",
        "Barlow Twins, batch 256": "barlow_twins_256",
        "TiCo without covariance, batch 256": "no_covariance_256",
        "untrained": "untrained",
    },
    columns=(
        Column("linear_probe", better="higher"),
        Column("knn_probe", better="higher"),
        Column("projection_effective_rank", title="effective rank of the projection"),
        Column("projection_entropy", title="entropy of the projection"),
    ),
    claims=(
        Greater("linear_probe", "TiCo, batch 16", "SimCLR, batch 16"),
        Greater("linear_probe", "TiCo, batch 16", "Barlow Twins, batch 16"),
        Less("projection_effective_rank", "TiCo without covariance, batch 16", than=2.0),
        Less("projection_effective_rank", "TiCo without covariance, batch 256", than=2.0),
        Greater("projection_effective_rank", "TiCo, batch 16", than=2.0),
        Greater("projection_effective_rank", "TiCo, batch 256", than=2.0),
    ),
    seeds=3,
)
