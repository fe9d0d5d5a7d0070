import numpy as np
import pytest

from repalign.data.fashion_mnist import fashion_mnist
from repalign.data.garment_scenes import BACKGROUND, garment_scenes, majority
from repalign.registry import UserError


def test_scenes_are_a_function_of_split_and_seed():
    first, same = (garment_scenes("train", examples=6, seed=1) for _ in range(2))
    for name, column in first.arrays.items():
        np.testing.assert_array_equal(column, same.arrays[name])
    for other in (garment_scenes("train", examples=6), garment_scenes("test", examples=6, seed=1)):
        assert (first.arrays["image"] != other.arrays["image"]).any()
    shapes = {name: column.shape for name, column in first.columns.items()}
    assert shapes == {"image": (49, 49, 1), "label": (), "patch_labels": (49,)}


def test_a_single_garment_lies_where_its_label_says():
    # On a canvas of one garment's size with patches of one pixel, a scene is a garment.
    source = garment_scenes("test", examples=40, size=28, patch_size=1, garments=(1, 1))
    known = fashion_mnist("test").arrays
    places = {image.tobytes(): label for image, label in zip(*known.values(), strict=True)}
    for image, label, classes in zip(*source.arrays.values(), strict=True):
        assert places[image.tobytes()] == label
        expected = np.where(image[..., 0] > 0, label, BACKGROUND)
        np.testing.assert_array_equal(classes.reshape(28, 28), expected)
    assert len(set(source.arrays["label"])) > 5


def test_the_front_garment_hides_the_others_and_the_largest_gives_the_label():
    crowded = garment_scenes("train", examples=200, size=28, patch_size=1, garments=(2, 2))
    classes = crowded.arrays["patch_labels"]
    counts = np.stack([(classes == number).sum(1) for number in range(BACKGROUND)], axis=1)
    assert ((counts > 0).sum(1) == 2).mean() > 0.5  # both are seen, unless of one class
    of_label = counts[np.arange(200), crowded.arrays["label"]]
    np.testing.assert_array_equal(of_label, counts.max(1))
    many = garment_scenes("train", examples=50, garments=(1, 3)).arrays["image"]
    black = (many == 0).mean((1, 2, 3))
    assert black.max() - black.min() > 0.3


def test_majority_counts_pixels_of_a_patch():
    classes = np.full((1, 4, 4), BACKGROUND, np.uint8)
    classes[0, :2, :2] = [[3, 3], [3, 7]]
    classes[0, 2:, 2:] = [[5, 5], [4, 4]]
    classes[0, 0, 2] = 1
    np.testing.assert_array_equal(majority(classes, 2), [[3, BACKGROUND, BACKGROUND, 4]])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="size 20 must be at least 28"):
        garment_scenes("train", examples=1, size=20, patch_size=4)
    with pytest.raises(UserError, match="a multiple of patch_size 9"):
        garment_scenes("train", examples=1, patch_size=9)
    with pytest.raises(UserError, match="two numbers, 1 <= a <= b"):
        garment_scenes("train", examples=1, garments=(3, 2))
    with pytest.raises(UserError, match="split"):
        garment_scenes("trian", examples=1)
