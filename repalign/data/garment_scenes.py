"""Scenes of several Fashion-MNIST garments on one canvas, with a class for every patch.

Segmentation with known masks and without a download: garments lie at random places, later ones in
front of earlier ones. A scene is a pure function of (split, seed, number of scenes).
"""

import numpy as np
from jaxtyping import Int, UInt8

from repalign.data.fashion_mnist import LABELS, fashion_mnist
from repalign.data.sources import ArraySource
from repalign.registry import UserError

BACKGROUND = len(LABELS)
"""The class of a patch that is mostly background; garments have Fashion-MNIST's labels."""

_SPLITS = ("train", "test")
_SIDE = 28


def garment_scenes(
    split: str,
    *,
    examples: int,
    size: int = 49,
    patch_size: int = 7,
    garments: tuple[int, int] = (2, 3),
    seed: int = 0,
) -> ArraySource:
    """Returns a source of scenes made of the packaged garments of a split.

    Columns: ``image`` uint8 [size, size, 1]; ``label`` int32, the class of the garment of which
    most is seen (the front one of equals); ``patch_labels`` int32 [patches], row by row: the class
    to which most of a patch's pixels belong, ``BACKGROUND`` included (the lower of equals). A pixel
    belongs to the front garment that is not black there.

    Args:
        split: ``"train"`` or ``"test"``; they share no garment.
        examples: number of scenes.
        size: height and width, at least 28.
        patch_size: side of a patch.
        garments: fewest and most garments of a scene, each number equally likely; their classes
            and places are drawn independently and uniformly.
        seed: of what is drawn.

    Raises:
        UserError: unknown split, a canvas that garments do not fit or patches do not fill, or no
            garments.
    """
    source = fashion_mnist(split)
    fewest, most = garments
    if size < _SIDE or size % patch_size:
        raise UserError(
            f"garment_scenes: size {size} must be at least {_SIDE} and a multiple of patch_size "
            f"{patch_size}."
        )
    if not 1 <= fewest <= most:
        raise UserError(f"garment_scenes: garments {garments} must be two numbers, 1 <= a <= b.")
    rng = np.random.default_rng((seed, _SPLITS.index(split)))
    counts = rng.integers(fewest, most + 1, examples)
    chosen = rng.integers(len(source), size=(examples, most))
    corners = rng.integers(size - _SIDE + 1, size=(examples, most, 2))
    pixels, labels = source.arrays["image"][..., 0], source.arrays["label"]
    images = np.zeros((examples, size, size), np.uint8)
    # Which garment of the scene a pixel shows; -1 is background.
    shown = np.full((examples, size, size), -1, np.int8)
    for scene in range(examples):
        for number in range(counts[scene]):
            row, column = corners[scene, number]
            place = (scene, slice(row, row + _SIDE), slice(column, column + _SIDE))
            garment = pixels[chosen[scene, number]]
            np.copyto(images[place], garment, where=garment > 0)
            np.copyto(shown[place], number, where=garment > 0)
    areas = np.stack([(shown == number).sum((1, 2)) for number in range(most)], axis=1)
    largest = most - 1 - np.argmax(areas[:, ::-1], axis=1)
    classes = np.where(
        shown < 0,
        BACKGROUND,
        np.take_along_axis(
            labels[chosen], np.maximum(shown, 0).reshape(examples, -1), axis=1
        ).reshape(shown.shape),
    )
    return ArraySource(
        {
            "image": images[..., None],
            "label": labels[chosen[np.arange(examples), largest]].astype(np.int32),
            "patch_labels": majority(classes.astype(np.uint8), patch_size),
        }
    )


def majority(
    classes: UInt8[np.ndarray, "examples height width"], patch_size: int
) -> Int[np.ndarray, "examples patches"]:
    """Returns the most frequent class of each patch, row by row; the lowest of equals."""
    examples, height, width = classes.shape
    blocks = (examples, height // patch_size, patch_size, width // patch_size, patch_size)
    classes = classes.reshape(blocks)
    counts = [(classes == number).sum((2, 4), dtype=np.int32) for number in range(BACKGROUND + 1)]
    return np.argmax(np.stack(counts, axis=-1), axis=-1).reshape(examples, -1).astype(np.int32)
