"""Matryoshka representations (Kusupati et al. 2022, arXiv:2205.13147): prefixes that stand alone.

A classifier on every prefix of one embedding trains all of them at once. The table asks on digits
whether the first m dimensions of that one network are as good for 1-nearest-neighbour search as
the embedding of a network trained with m dimensions, and better than m dimensions of an ordinary
embedding, cut off or chosen by a singular value decomposition. Official code: RAIVNLab/MRL@7ccb42d.
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater
from repalign.tables.table import Column, Table

WIDTH = 64
PREFIXES = (2, 4, 8, 16, 32, 64)


def digits(
    *,
    width: int = WIDTH,
    prefixes: tuple[int, ...] = (WIDTH,),
    tied: bool = False,
    evaluated: tuple[int, ...] = PREFIXES,
    basis: str = "coordinates",
) -> ConfigDict:
    """An MLP encoder of ``width`` dimensions whose ``prefixes`` are trained by classification.

    One learning rate, the best of a grid for every row (docs/matryoshka/README.md).
    """
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.digits.digits", "split": "train"},
                "batch_size": 128,
            },
            "model": {"name": "models.mlp.MLP", "widths": (128, 128), "features": width},
            "forward": {"name": "train.forward_encoder.encoder"},
            "objective": {
                "classification": {
                    "term": "train.classifier_terms.matryoshka",
                    "embedding": "encoder/embedding",
                    "labels": "label",
                    "prefixes": prefixes,
                    "classes": 10,
                    "tied": tied,
                }
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-2,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-4,
            },
            "evaluation": {
                "metrics": {
                    "prefixes": {
                        "name": "train.evaluate_prefixes.nearest_neighbor_by_prefix",
                        "reference": {"name": "data.digits.digits", "split": "test"},
                        "classes": 10,
                        "prefixes": evaluated,
                        "basis": basis,
                    }
                }
            },
            "seed": 0,
            "total_steps": 1000,
        }
    )


def separate(width: int) -> ConfigDict:
    """A network of its own for one width, as the paper's fixed-feature baseline."""
    return digits(width=width, prefixes=(width,), evaluated=(width,))


VARIANTS = {
    "matryoshka": functools.partial(digits, prefixes=PREFIXES),
    "matryoshka_tied": functools.partial(digits, prefixes=PREFIXES, tied=True),
    "ordinary": digits,
    "ordinary_svd": functools.partial(digits, basis="singular_vectors"),
    **{f"separate_{width}": functools.partial(separate, width) for width in PREFIXES[:-1]},
}


def get_config(variant: str = "matryoshka") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of matryoshka")().lock()


TABLE = Table(
    paper=14,
    rows={
        "Matryoshka": "matryoshka",
        "Matryoshka, tied": "matryoshka_tied",
        "ordinary, cut off": "ordinary",
        "ordinary, SVD": "ordinary_svd",
        **{f"separate, {width}": f"separate_{width}" for width in PREFIXES[:-1]},
    },
    columns=tuple(
        Column(f"accuracy_{width}", title=f"1-NN, m = {width}", better="higher")
        for width in PREFIXES
    ),
    claims=(
        *(
            Greater(f"accuracy_{width}", "Matryoshka", f"separate, {width}", margin=-0.01)
            for width in PREFIXES[:-1]
        ),
        Greater("accuracy_64", "Matryoshka", "ordinary, cut off", margin=-0.01),
        *(
            Greater(f"accuracy_{width}", "Matryoshka", other)
            for other in ("ordinary, cut off", "ordinary, SVD")
            for width in (2, 4, 8)
        ),
    ),
    seeds=10,
)
