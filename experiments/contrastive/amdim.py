"""AMDIM (Bachman et al. 2019, arXiv:1906.00910): information across views, at several scales.

The table asks on canvases of 32 pixels with a garment and clutter whether contrasts between the
summary of one view and local features of another, at two scales, learn more than the same contrast
of whole views, and than that of local features with the summary of their own view (Deep InfoMax).
Official code: Philip-Bachman/amdim-public@0333f6b: costs.py, model.py (scales of 1, 5 and 7 pixels;
here 1, 4 and 8).
"""

import functools

from ml_collections import ConfigDict

from repalign.registry import lookup
from repalign.tables.claims import Greater
from repalign.tables.table import Column, Table

TRAIN = {"name": "data.cluttered.cluttered_fashion_mnist", "split": "train"}
TEST = {"name": "data.cluttered.cluttered_fashion_mnist", "split": "test"}
GLOBAL, COARSE, FINE = "embedding", "map", "stage_2"
"""What the head makes of the whole image; the last map, 4x4; the one before, 8x8."""

BOTH_WAYS = ((0, 1), (1, 0))
SAME_VIEW = ((0, 0), (1, 1))
MULTI_SCALE = ((GLOBAL, COARSE), (GLOBAL, FINE), (COARSE, COARSE))


def small(
    scales: tuple[tuple[str, str], ...],
    *,
    views: tuple[tuple[int, int], ...] = BOTH_WAYS,
) -> ConfigDict:
    """One small convolutional encoder, loss form and number of steps for all rows.

    The learning rate is one for all rows and was not searched. Projections of maps, where a row has
    them, are parameters that only training uses.

    Args:
        scales: pairs of what predicts and what is predicted.
        views: pairs of the views that these are of.
    """
    local = sorted({target for _, target in scales} - {GLOBAL})
    return ConfigDict(
        {
            "data": {"source": dict(TRAIN), "batch_size": 128},
            "model": {
                "name": "models.convnet.ConvNet",
                "widths": (16, 32, 64),
                "taps": (2,),
            },
            "forward": {
                "name": "train.forward_views.views",
                "groups": (
                    {
                        "count": 2,
                        "crop_scale": (0.3, 1.0),
                        "brightness": 0.4,
                        "contrast": 0.4,
                        "blur": 0.0,
                    },
                ),
                "head_hidden": 128,
                "head_features": 64,
                "head_norm": "batch",
                "head_norm_last": True,
                "maps": dict.fromkeys(local, 64),
            },
            "objective": {
                "local_global": {
                    "term": "train.local_global_terms.local_global",
                    "pairs": tuple(
                        (f"view_{i}/{source}", f"view_{j}/{target}")
                        for source, target in scales
                        for i, j in views
                    ),
                    "weight": 0.5,
                }
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_steps": 20,
                "weight_decay": 1e-4,
            },
            "evaluation": {
                "metrics": {
                    "encoder": {
                        "name": "train.evaluate.encoder_probe",
                        "reference": dict(TEST),
                        "classes": 10,
                    }
                }
            },
            "seed": 0,
            "total_steps": 300,
        }
    )


VARIANTS = {
    "multi_scale": functools.partial(small, MULTI_SCALE),
    "global_only": functools.partial(small, ((GLOBAL, GLOBAL),)),
    "same_view": functools.partial(small, ((GLOBAL, COARSE), (GLOBAL, FINE)), views=SAME_VIEW),
}


def get_config(variant: str = "multi_scale") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of amdim")().lock()


TABLE = Table(
    paper=433,
    rows={
        "multi-scale, across views (AMDIM)": "multi_scale",
        "global only, across views": "global_only",
        "local-global, same view (Deep InfoMax)": "same_view",
    },
    columns=(
        Column("linear_probe", better="higher"),
        Column("knn_probe", title="k-NN probe", better="higher"),
    ),
    claims=(
        Greater("linear_probe", "multi-scale, across views (AMDIM)", "global only, across views"),
        Greater(
            "linear_probe",
            "multi-scale, across views (AMDIM)",
            "local-global, same view (Deep InfoMax)",
        ),
    ),
    seeds=3,
)
