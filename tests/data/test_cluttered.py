import numpy as np
import pytest

from repalign.data import cluttered
from repalign.data.cluttered import cluttered_fashion_mnist
from repalign.data.fashion_mnist import fashion_mnist
from repalign.registry import UserError


def test_one_garment_on_each_canvas_and_pieces_around_it():
    original = fashion_mnist("test")
    garments = cluttered.shrink(original.arrays["image"][..., 0], 20)
    plain = cluttered_fashion_mnist("test", pieces=0)
    assert plain.arrays["image"].shape == (4000, 32, 32, 1)
    assert plain.arrays["image"].dtype == np.uint8
    np.testing.assert_array_equal(plain.arrays["label"], original.arrays["label"])
    canvas = plain.arrays["image"][..., 0]
    np.testing.assert_array_equal(canvas.sum(axis=(1, 2)), garments.sum(axis=(1, 2)))
    # There are 13 places, and garments that begin below the upper edge of their image.
    assert len(np.unique(canvas.any(axis=2).argmax(axis=1))) >= 13
    full = cluttered_fashion_mnist("test").arrays["image"][..., 0]
    # The place of the garment is drawn first: clutter only adds to the canvas.
    assert np.all(full >= canvas) and np.mean(np.any(full > canvas, axis=(1, 2))) > 0.99
    np.testing.assert_array_equal(full, cluttered_fashion_mnist("test").arrays["image"][..., 0])
    assert np.any(full != cluttered_fashion_mnist("test", seed=1).arrays["image"][..., 0])


def test_shrinking_keeps_the_mean():
    images = fashion_mnist("test").arrays["image"][:50, ..., 0]
    small = cluttered.shrink(images, 14)
    np.testing.assert_allclose(small.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=2.0)
    flat = np.full((1, 28, 28), 77, np.uint8)
    np.testing.assert_array_equal(cluttered.shrink(flat, 20), np.full((1, 20, 20), 77))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="a canvas of 16 do not fit"):
        cluttered_fashion_mnist("test", size=16)
