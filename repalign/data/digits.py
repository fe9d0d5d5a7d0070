"""Handwritten digits: 1,797 grey images of 8 x 8 pixels, bundled with scikit-learn.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, CC BY 4.0); each pixel counts the 0 to 16 ink dots of a 4 x 4
block. `sklearn.datasets.load_digits` reads them from its own package, without a download.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from sklearn import datasets

from repalign.data.sources import ArraySource
from repalign.registry import UserError, lookup

Images = UInt8[np.ndarray, "examples 8 8 1"]
Labels = Int[np.ndarray, " examples"]

SIZES = {"train": 1_343, "test": 454}


def digits(
    split: str = "train", *, classes: Sequence[int] | None = None, examples: int | None = None
) -> ArraySource:
    """Returns the images and labels of a split, in scikit-learn's order.

    Columns: ``image`` uint8 [8, 8, 1] (scikit-learn's 0..16 scaled to 0..255 and rounded; 0 is
    background), ``label`` int32, the digit.

    The data set has no split of its own: of the images of each digit, in scikit-learn's order, the
    first, fifth, ninth, ... are the test images, a quarter, and the others the training images.
    Writers are on both sides.

    Args:
        split: ``"train"`` (1,343 images) or ``"test"`` (454).
        classes: the digits to keep, labels unchanged; None keeps all ten.
        examples: keeps the first so many of these images; None keeps all.

    Raises:
        UserError: an unknown split, classes that are not distinct digits, or more examples than
            there are.
    """
    images, labels = lookup(_splits(), split, kind="split of digits")
    source = ArraySource({"image": images, "label": labels})
    if classes is not None:
        wanted = set(classes)
        if not wanted or len(wanted) < len(classes) or not wanted <= set(range(10)):
            raise UserError(
                f"digits: classes must be distinct digits of 0..9, not {list(classes)}."
            )
        source = source.select(np.flatnonzero(np.isin(labels, list(wanted))))
    if examples is not None:
        if not 1 <= examples <= len(source):
            raise UserError(f"digits: examples={examples} must be in 1..{len(source)}.")
        source = source.select(slice(0, examples))
    return source


@functools.lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[Images, Labels]]:
    bundled = datasets.load_digits()
    labels = bundled.target.astype(np.int32)
    images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)[..., None]
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[::4]] = True
    splits = {}
    for name, chosen in {"train": ~held_out, "test": held_out}.items():
        part = images[chosen], labels[chosen]
        for array in part:  # Cached and shared by every source: a write into them must fail.
            array.setflags(write=False)
        splits[name] = part
    return splits
