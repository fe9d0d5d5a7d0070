"""How well predicted segments agree with given ones."""

import jax.numpy as jnp

from repalign.typing import Array, Float, Int, Scalar


def confusion(
    predicted: Int[Array, "*shape"], labels: Int[Array, "*shape"], *, classes: int
) -> Float[Array, "classes classes"]:
    """Returns how often each class (row) was predicted as each (column); float32 counts.

    Counts of batches add up. A label or prediction outside ``[0, classes)`` is not counted.
    """
    predicted, labels = predicted.reshape(-1), labels.reshape(-1)
    counted = (labels >= 0) & (labels < classes) & (predicted >= 0) & (predicted < classes)
    cell = jnp.where(counted, labels * classes + predicted, 0)
    counts = jnp.zeros(classes * classes).at[cell].add(counted.astype(jnp.float32))
    return counts.reshape(classes, classes)


def mean_iou(counts: Float[Array, "classes classes"]) -> Scalar:
    """Mean over classes of intersection over union, in [0, 1], from `confusion`.

    Classes that neither occur nor are predicted are left out, as by scikit-learn's
    ``jaccard_score(average="macro")``; 0 if nothing was counted. Source:
    facebookresearch/capi@98b4fa1:eval_segmentation.py:57-61.
    """
    intersection = jnp.diagonal(counts)
    union = jnp.sum(counts, axis=0) + jnp.sum(counts, axis=1) - intersection
    present = union > 0
    ratio = jnp.where(present, intersection / jnp.where(present, union, 1.0), 0.0)
    return jnp.sum(ratio) / jnp.maximum(jnp.sum(present), 1)
