import numpy as np
import pytest
from sklearn import datasets

from repalign.data.digits import SIZES, digits
from repalign.data.sources import Column
from repalign.registry import UserError


def test_the_splits_are_scikit_learns_images_once_each():
    bundled = datasets.load_digits()
    parts = [digits(split) for split in ("train", "test")]
    assert [len(part) for part in parts] == list(SIZES.values())
    assert parts[0].columns == {
        "image": Column((8, 8, 1), np.dtype(np.uint8)),
        "label": Column((), np.dtype(np.int32)),
    }
    images = np.concatenate([part.arrays["image"] for part in parts])
    labels = np.concatenate([part.arrays["label"] for part in parts])
    ink = np.rint(images[..., 0] * (16 / 255)).astype(int)  # The scaling is undone exactly.
    found = sorted((int(y), tuple(x.ravel().tolist())) for x, y in zip(ink, labels, strict=True))
    expected = sorted(
        (int(y), tuple(x.ravel().astype(int).tolist()))
        for x, y in zip(bundled.images, bundled.target, strict=True)
    )
    assert found == expected
    assert images.min() == 0 and images.max() == 255


def test_a_quarter_of_every_class_is_held_out():
    counts = {split: np.bincount(digits(split).arrays["label"]) for split in SIZES}
    np.testing.assert_array_equal(counts["test"], -(-(counts["train"] + counts["test"]) // 4))
    first_of_each = [np.flatnonzero(datasets.load_digits().target == d)[0] for d in range(10)]
    test = digits("test")
    for digit, index in enumerate(first_of_each):
        image = test.arrays["image"][test.arrays["label"] == digit][0, ..., 0]
        np.testing.assert_array_equal(
            image, np.rint(datasets.load_digits().images[index] * 255 / 16)
        )


def test_a_subset_of_the_classes_keeps_its_labels():
    part = digits("train", classes=(7, 2))
    whole = digits("train")
    assert set(part.arrays["label"]) == {2, 7}
    assert len(part) == np.isin(whole.arrays["label"], (2, 7)).sum()


def test_the_first_examples_of_the_classes_that_are_kept():
    part = digits("train", classes=(7, 2), examples=9)
    whole = digits("train", classes=(2, 7))
    np.testing.assert_array_equal(part.arrays["image"], whole.arrays["image"][:9])


def test_mistakes_name_the_fix():
    with pytest.raises(UserError, match="Did you mean 'train'"):
        digits("trian")
    for classes in [(), (1, 1), (3, 10)]:
        with pytest.raises(UserError, match="distinct digits of 0..9"):
            digits("test", classes=classes)
    with pytest.raises(UserError, match="examples=1344 must be in 1..1343"):
        digits("train", examples=1344)
    with pytest.raises(ValueError, match="read-only"):
        digits("test").arrays["image"][0] = 1
