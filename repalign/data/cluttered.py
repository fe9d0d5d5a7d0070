"""Cluttered Fashion-MNIST: a small garment somewhere on a canvas among pieces of other garments.

After cluttered MNIST (Mnih, Heess, Graves, Kavukcuoglu 2014, arXiv:1406.6247). Deterministic: the
same arguments give the same bytes.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

from repalign.data.fashion_mnist import fashion_mnist
from repalign.data.sources import ArraySource
from repalign.registry import UserError


def cluttered_fashion_mnist(
    split: str,
    *,
    size: int = 32,
    garment: int = 20,
    pieces: int = 6,
    piece: int = 7,
    seed: int = 0,
) -> ArraySource:
    """Returns the packaged images of a split, each shrunk, moved and surrounded by clutter.

    Columns: ``image`` uint8 [size, size, 1], ``label`` int32 of the garment. Where things overlap,
    the brighter pixel is seen.

    Args:
        split: ``"train"`` or ``"test"``.
        size: side of the canvas.
        garment: side to which the image of the garment is shrunk (bilinear, antialiased); its place
            is uniform over those in which it fits.
        pieces: pieces of clutter on each canvas, each cut out at random of a random shrunk image of
            the same split, and put at a random place.
        piece: side of a piece.
        seed: of all of that; the splits draw different numbers.

    Raises:
        UserError: an unknown split, or parts that do not fit: ``piece <= garment <= size`` and
            ``garment <= 28``.
    """
    if not 1 <= piece <= garment <= min(size, 28):
        raise UserError(
            f"cluttered_fashion_mnist: a piece of {piece} pixels, a garment of {garment} (of 28) "
            f"and a canvas of {size} do not fit into each other."
        )
    source = fashion_mnist(split)
    generator = np.random.default_rng([seed, len(source)])
    garments = shrink(source.arrays["image"][..., 0], garment)
    count = len(garments)
    canvas = np.zeros((count, size, size), np.uint8)
    _put(canvas, garments, _places(generator, count, size - garment))
    for _ in range(pieces):
        origins = generator.integers(0, count, count)
        corners = _places(generator, count, garment - piece)
        cut = garments[_window(origins, corners, piece)]
        _put(canvas, cut, _places(generator, count, size - piece))
    return ArraySource({"image": canvas[..., None], "label": source.arrays["label"]})


def shrink(
    images: UInt8[np.ndarray, "images side side"], side: int
) -> UInt8[np.ndarray, "images {side} {side}"]:
    """Shrinks square images bilinearly with antialiasing."""
    old = images.shape[1]
    step = old / side
    centres = (np.arange(side) + 0.5) * step - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(old) - centres[:, None]) / step)
    weights: Float[np.ndarray, "side old"] = weights / weights.sum(axis=1, keepdims=True)
    weights = weights.astype(np.float32)
    rows = np.matmul(weights, images.astype(np.float32))
    return np.rint(np.matmul(rows, weights.T)).astype(np.uint8)


def _places(generator: np.random.Generator, count: int, last: int) -> Int[np.ndarray, "count 2"]:
    """Returns a row and a column for each image, uniform in [0, last]."""
    return generator.integers(0, last + 1, (count, 2))


def _window(
    images: Int[np.ndarray, " count"], corners: Int[np.ndarray, "count 2"], side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the index of a square window of each image."""
    along = np.arange(side)
    rows = (corners[:, :1] + along)[:, :, None]
    columns = (corners[:, 1:] + along)[:, None, :]
    return images[:, None, None], rows, columns


def _put(
    canvas: UInt8[np.ndarray, "count size size"],
    things: UInt8[np.ndarray, "count side side"],
    corners: Int[np.ndarray, "count 2"],
) -> None:
    """Draws things onto canvases in place; the brighter pixel is seen."""
    window = _window(np.arange(len(canvas)), corners, things.shape[1])
    canvas[window] = np.maximum(canvas[window], things)
