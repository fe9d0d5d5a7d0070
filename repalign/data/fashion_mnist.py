"""Fashion-MNIST: 28 x 28 grey images of ten kinds of clothing (MIT licence, Zalando SE).

The package carries the first 12,000 training and the first 4,000 test images, exactly; the whole
set is read from Debian's ``dataset-fashion-mnist``, from a folder of the original IDX files, or
from TFDS. Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv:1708.07747, and
zalandoresearch/fashion-mnist.

``python -m repalign.data.fashion_mnist --idx_dir DIR --out_dir DIR`` writes the packaged files anew
from the original four ``*-ubyte.gz`` files.
"""

import argparse
import functools
import gzip
import importlib.resources
import lzma
import pathlib

import numpy as np
from jaxtyping import Int, UInt8

from repalign.data.sources import ArraySource, TfdsSource
from repalign.registry import UserError, lookup

LABELS = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

PACKAGED_SIZES = {"train": 12_000, "test": 4_000}

DEBIAN_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")

_IDX_PREFIX = {"train": "train", "test": "t10k"}
_PIXELS = 28 * 28

Images = UInt8[np.ndarray, "examples 28 28 1"]
Labels = Int[np.ndarray, " examples"]


def fashion_mnist(
    split: str, *, subset: str = "packaged", data_dir: str | pathlib.Path | None = None
) -> ArraySource:
    """Returns the images and labels of a split, in the official order.

    Columns: ``image`` uint8 [28, 28, 1] (0 is background), ``label`` int32 (index in ``LABELS``).

    Args:
        split: ``"train"`` or ``"test"``.
        subset: ``"packaged"`` is the part inside this package (12,000 and 4,000 images);
            ``"full"`` is everything (60,000 and 10,000).
        data_dir: for ``"full"``: a folder that holds the original ``*-ubyte.gz`` files, or a TFDS
            folder in which ``fashion_mnist`` is prepared. ``None`` tries Debian's folder, then
            TFDS's default.

    Raises:
        UserError: unknown split or subset, or the full set is in none of the places.
    """
    lookup(_IDX_PREFIX, split, kind="split of fashion_mnist")
    read = lookup({"packaged": _packaged, "full": _full}, subset, kind="subset of fashion_mnist")
    if subset == "packaged":
        if data_dir is not None:
            raise UserError("fashion_mnist: data_dir is only read with subset='full'.")
        images, labels = read(split)
    else:
        images, labels = read(split, data_dir)
    return ArraySource({"image": images, "label": labels})


def encode(images: Images, labels: Labels) -> bytes:
    """Packs images and labels without loss: xz over the labels, then each image's transpose.

    Column order is 4 % smaller than row order; predicting pixels from their neighbours is larger.
    """
    planes = np.ascontiguousarray(images[..., 0].transpose(0, 2, 1))
    raw = labels.astype(np.uint8).tobytes() + planes.tobytes()
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def decode(packed: bytes) -> tuple[Images, Labels]:
    """The inverse of ``encode``."""
    raw = np.frombuffer(lzma.decompress(packed), np.uint8)
    size = len(raw) // (1 + _PIXELS)
    planes = raw[size:].reshape(size, 28, 28, 1)
    images = np.ascontiguousarray(planes.transpose(0, 2, 1, 3))
    labels = raw[:size].astype(np.int32)
    # The arrays are cached and shared by every source: a write into them must fail.
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@functools.lru_cache(maxsize=2)
def _packaged(split: str) -> tuple[Images, Labels]:
    folder = importlib.resources.files("repalign.data") / "packaged"
    return decode((folder / f"fashion_mnist_{split}.xz").read_bytes())


def _full(split: str, data_dir: str | pathlib.Path | None) -> tuple[Images, Labels]:
    folder = DEBIAN_DIR if data_dir is None else pathlib.Path(data_dir)
    if (folder / f"{_IDX_PREFIX[split]}-images-idx3-ubyte.gz").is_file():
        return read_idx(folder, split)
    try:
        source = TfdsSource("fashion_mnist", split, data_dir=data_dir)
    except UserError as error:
        raise UserError(
            f"fashion_mnist(subset='full'): no {_IDX_PREFIX[split]}-images-idx3-ubyte.gz in "
            f"{folder}, and {error}\nOr install Debian's package dataset-fashion-mnist, or put the "
            "four original *-ubyte.gz files in a folder and name it as data_dir."
        ) from error
    columns = source.gather(np.arange(len(source)))
    return columns["image"], columns["label"]


def read_idx(folder: pathlib.Path, split: str) -> tuple[Images, Labels]:
    """Reads the original gzipped IDX files of a split.

    Raises:
        UserError: a file is missing or is not what its header says.
    """
    prefix = _IDX_PREFIX[split]
    images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape != (len(labels), 28, 28):
        raise UserError(f"{folder}: {images.shape} images do not fit {labels.shape} labels.")
    return images[..., None], labels.astype(np.int32)


def _idx(path: pathlib.Path, *, dimensions: int) -> UInt8[np.ndarray, "..."]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is one of Fashion-MNIST's four original files.")
    raw = gzip.decompress(path.read_bytes())
    header = np.frombuffer(raw, ">u4", count=1 + dimensions)
    shape = tuple(int(size) for size in header[1:])
    data = np.frombuffer(raw, np.uint8, offset=header.nbytes)
    # The magic number is 0, 0, 8 (unsigned byte), number of dimensions.
    if header[0] != 0x0800 + dimensions or data.size != np.prod(shape):
        raise UserError(f"{path}: not an IDX file of unsigned bytes in {dimensions} dimensions.")
    return data.reshape(shape)


def write_packaged(idx_dir: pathlib.Path, out_dir: pathlib.Path) -> None:
    """Writes ``fashion_mnist_{train,test}.xz`` from the original files."""
    for split, size in PACKAGED_SIZES.items():
        images, labels = read_idx(idx_dir, split)
        (out_dir / f"fashion_mnist_{split}.xz").write_bytes(encode(images[:size], labels[:size]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the packaged part of Fashion-MNIST.")
    parser.add_argument("--idx_dir", type=pathlib.Path, default=DEBIAN_DIR)
    parser.add_argument("--out_dir", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    write_packaged(arguments.idx_dir, arguments.out_dir)
