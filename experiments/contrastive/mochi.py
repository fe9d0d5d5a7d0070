"""MoCHi (Kalantidis et al. 2020, arXiv:2010.01028): mixtures of hard negatives in MoCo's queue.

MoCo v2 with a queue of 1,024 keys and a momentum encoder, symmetric over the two views, against
the same with synthetic negatives: of pairs of each query's hardest queue entries (h), of these and
the query (h'), or both. The paper's numbers (N, s, s') = (1024, 1024, 128) and (128, 1024, 512),
for a queue of 16,384, are divided by 16 here.
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater, Less
from repalign.tables.table import Column, Table

TRAIN = {"name": "data.fashion_mnist.fashion_mnist", "split": "train"}
TEST = {"name": "data.fashion_mnist.fashion_mnist", "split": "test"}
PROBE = {
    "name": "train.evaluate.encoder_probe",
    "reference": TEST,
    "classes": 10,
    "spectrum": True,
}


def fashion_mnist(*, hardest: int = 64, mixed: int = 0, query_mixed: int = 0) -> ConfigDict:
    """A small convolutional encoder on the 12,000 packaged images, 3.2 epochs.

    The learning rate of all rows is the best of 1e-3, 2e-3 and 4e-3 for MoCo after 200 steps of one
    seed that the table does not use (docs/mochi/README.md).

    Args:
        hardest: queue entries that mixtures are made of, N of the paper.
        mixed: mixtures of two of them, s.
        query_mixed: mixtures of one of them and the query, s'.
    """
    return ConfigDict(
        {
            "data": {"source": dict(TRAIN), "batch_size": 128},
            "model": {"name": "models.convnet.ConvNet", "widths": (16, 32, 64)},
            "forward": {
                "name": "train.forward.two_views",
                "view": {"crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "blur": 0.0},
                "head_hidden": 128,
                "head_features": 64,
                "momentum": True,
            },
            "objective": {
                "mochi": {
                    "term": "train.stateful_terms.mochi",
                    "queries": ("view_0/embedding", "view_1/embedding"),
                    "keys": ("view_1/target", "view_0/target"),
                    "temperature": 0.2,
                    "queue_size": 1024,
                    "hardest": hardest,
                    "mixed": mixed,
                    "query_mixed": query_mixed,
                }
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 4e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-4,
                "average_decay": 0.99,
            },
            "evaluation": {
                "metrics": {
                    "encoder": dict(PROBE),
                    "projection": {**PROBE, "tap": "projection", "prefix": "projection_"},
                    "proxy_task": {
                        "name": "train.evaluate_objective.objective_metrics",
                        "reference": dict(TEST),
                        "examples": 512,
                        "metrics": {
                            "proxy_accuracy": "mochi/accuracy",
                            "queue_accuracy": "mochi/queue_accuracy",
                        },
                    },
                }
            },
            "seed": 0,
            "total_steps": 300,
        }
    )


VARIANTS = {
    "moco": fashion_mnist,
    "mochi": functools.partial(fashion_mnist, mixed=64, query_mixed=8),
    "mochi_harder": functools.partial(fashion_mnist, hardest=8, mixed=64, query_mixed=32),
    "pairs_only": functools.partial(fashion_mnist, mixed=64),
    "query_only": functools.partial(fashion_mnist, query_mixed=8),
}


def get_config(variant: str = "mochi") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of mochi")().lock()


MOCO, MOCHI, HARDER = "MoCo", "MoCHi (64, 64, 8)", "MoCHi (8, 64, 32)"
PAIRS, QUERY = "only h (64, 64, 0)", "only h' (64, 0, 8)"

TABLE = Table(
    paper=515,
    rows={
        MOCO: "moco",
        MOCHI: "mochi",
        HARDER: "mochi_harder",
        PAIRS: "pairs_only",
        QUERY: "query_only",
    },
    columns=(
        Column("linear_probe", better="higher"),
        Column("knn_probe", better="higher"),
        Column("proxy_accuracy", title="proxy-task accuracy"),
        Column("queue_accuracy", title="the same without mixtures"),
        Column("projection_uniformity", title="uniformity of the head's output", better="lower"),
        Column("uniformity", title="uniformity of the embedding", better="lower"),
        Column("projection_effective_rank", title="effective rank of the head's output"),
    ),
    claims=(
        Greater("linear_probe", MOCHI, MOCO),
        Greater("linear_probe", HARDER, MOCO),
        Greater("linear_probe", MOCHI, MOCO, margin=-0.01),
        Less("proxy_accuracy", MOCHI, MOCO),
        Less("proxy_accuracy", HARDER, MOCO),
        Less("projection_uniformity", MOCHI, MOCO),
        Less("projection_uniformity", HARDER, MOCO),
        Less("projection_uniformity", PAIRS, MOCO),
        Less("projection_uniformity", QUERY, MOCO),
    ),
)
