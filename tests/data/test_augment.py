import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.data import augment
from repalign.data.fashion_mnist import fashion_mnist

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(size=(6, 12, 10, 3)).astype(np.float32)


def apply(function, images=IMAGES, **options):
    return np.asarray(jax.jit(functools.partial(function, **options))(KEY, jnp.asarray(images)))


def test_full_window_crop_is_the_image_and_windows_differ():
    square = IMAGES[:, :10]
    same = apply(augment.random_resized_crop, square, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(same, square, atol=1e-5)


def test_crop_is_a_bilinear_window():
    # Bilinear interpolation reproduces an image that is linear in its coordinates.
    rows, columns = np.meshgrid(np.arange(24.0), np.arange(24.0), indexing="ij")
    ramp = np.stack([np.stack([rows, columns], -1)] * 6).astype(np.float32)[..., [0, 1, 1]]
    out = apply(augment.random_resized_crop, ramp, size=16, scale=(0.1, 0.3))[:, 2:-2, 2:-2]
    steps = np.diff(out[..., 0], axis=1)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1, :1], steps.shape), atol=1e-3)
    height = steps.mean((1, 2)) * 16
    width = np.diff(out[..., 1], axis=2).mean((1, 2)) * 16
    area = height * width / 24**2
    assert (area > 0.09).all() and (area < 0.31).all()
    assert ((width / height > 0.74) & (width / height < 1.34)).all()
    assert len(set(np.round(area, 4))) == 6


def test_flip_and_translate_move_whole_pixels():
    flipped = apply(augment.horizontal_flip)
    mirrored = [(f == i[:, ::-1]).all() for f, i in zip(flipped, IMAGES, strict=True)]
    kept = [(f == i).all() for f, i in zip(flipped, IMAGES, strict=True)]
    assert all(np.array(mirrored) ^ np.array(kept)) and any(mirrored) and any(kept)
    moved = apply(augment.translate, pixels=2)
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = set()
    for number, image in enumerate(moved):
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.allclose(padded[number, y : y + 12, x : x + 10], image, atol=1e-6)
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 2


def test_each_color_operation_matches_its_definition():
    luma = IMAGES @ np.array([0.2989, 0.587, 0.114], np.float32)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "probability": 1.0}
    blends = {
        "brightness": np.zeros_like(IMAGES),
        "contrast": np.broadcast_to(luma.mean((1, 2))[:, None, None, None], IMAGES.shape),
        "saturation": np.broadcast_to(luma[..., None], IMAGES.shape),
    }
    for name, other in blends.items():
        out = apply(augment.color_jitter, **{**off, name: 0.5})
        for image, start, result in zip(IMAGES, other, out, strict=True):
            inside = (result > 0.001) & (result < 0.999) & (np.abs(image - start) > 0.05)
            factors = ((result - start) / np.where(inside, image - start, 1))[inside]
            assert np.ptp(factors) < 1e-3 and 0.5 <= factors.mean() <= 1.5
    assert apply(augment.grayscale, probability=1.0) == pytest.approx(
        np.repeat(luma[..., None], 3, -1), abs=1e-6
    )


def test_hue_turns_the_wheel():
    red = np.tile(np.array([0.9, 0.1, 0.1], np.float32), (1, 2, 2, 1))
    turn = jax.jit(augment._shift_hue)
    turns = {1 / 3: [0.1, 0.9, 0.1], -1 / 3: [0.1, 0.1, 0.9], 1 / 6: [0.9, 0.9, 0.1]}
    for shift, expected in turns.items():
        turned = turn(red, jnp.full((1, 1, 1), shift))
        np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-5)
    same = turn(np.repeat(red, 6, 0) * IMAGES[:, :2, :2], jnp.ones((6, 1, 1)))
    np.testing.assert_allclose(same, red * IMAGES[:, :2, :2], atol=1e-5)


def test_blur_is_a_reflected_gaussian():
    options = {"kernel_size": 5, "sigma": (1.5, 1.5 + 1e-6), "probability": 1.0}
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 1.5) ** 2)
    taps /= taps.sum()
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    rows = sum(tap * padded[:, i : i + 12] for i, tap in enumerate(taps))
    expected = sum(tap * rows[:, :, i : i + 10] for i, tap in enumerate(taps))
    np.testing.assert_allclose(apply(augment.gaussian_blur, **options), expected, atol=1e-5)
    with pytest.raises(ValueError, match="must be odd"):
        augment.gaussian_blur(KEY, jnp.asarray(IMAGES), kernel_size=4)


def test_solarize_and_cutout():
    np.testing.assert_allclose(
        apply(augment.solarize, probability=1.0), np.where(IMAGES >= 0.5, 1 - IMAGES, IMAGES)
    )
    holes = (apply(augment.cutout, size=4, fill=-1.0) == -1).all(-1)
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 2 <= len(rows) <= 4 and 2 <= len(columns) <= 4


def test_views_are_independent_and_repeatable():
    recipe = augment.ViewRecipe(size=8, solarize=0.5)
    make = jax.jit(functools.partial(augment.two_views, first=recipe))
    first, second = make(KEY, IMAGES)
    assert first.shape == second.shape == (6, 8, 8, 3)
    assert (np.abs(first - second).max((1, 2, 3)) > 0.01).all()
    np.testing.assert_array_equal(first, make(KEY, IMAGES)[0])
    assert float(first.min()) >= 0 and float(first.max()) <= 1 + 1e-6
    assert (make(jax.random.key(1), IMAGES)[0] != first).any()


def test_a_recipe_without_crop_leaves_the_pixels_where_they_are():
    recipe = augment.ViewRecipe(crop_scale=None, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    np.testing.assert_array_equal(recipe(KEY, jnp.asarray(IMAGES)), IMAGES)
    with pytest.raises(ValueError, match="size=8 needs a crop"):
        augment.ViewRecipe(size=8, crop_scale=None)


def test_multi_crop_under_vmap_on_grey_images():
    plain = augment.ViewRecipe(flip=0.0, jitter=0.0, blur=0.0)
    make = functools.partial(
        augment.multi_crop,
        large=(plain,),
        small=dataclasses.replace(plain, size=5, crop_scale=(0.05, 0.4)),
        small_count=3,
    )
    grey = jnp.asarray(IMAGES[:, :, :, :1])
    large, small = jax.jit(jax.vmap(make, in_axes=(0, None)))(jax.random.split(KEY, 2), grey)
    assert large.shape == (2, 1, 6, 12, 10, 1) and small.shape == (2, 3, 6, 5, 5, 1)
    assert (np.abs(np.diff(small, axis=1)).max((2, 3, 4, 5)) > 0).all()


def test_normalize_constants_fit_the_data():
    images = jnp.asarray(fashion_mnist("test").arrays["image"][:2000]) / 255.0
    out = augment.normalize(images, mean=augment.FASHION_MNIST_MEAN, std=augment.FASHION_MNIST_STD)
    assert abs(float(out.mean())) < 0.02 and abs(float(out.std()) - 1) < 0.02
    per_channel = augment.normalize(
        jnp.ones((1, 1, 1, 3)), mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD
    )
    np.testing.assert_allclose(per_channel[0, 0, 0], [2.248908, 2.428571, 2.64], rtol=1e-5)
