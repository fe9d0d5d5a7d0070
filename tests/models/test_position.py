"""Position tables and their resampling, against jax's and PyTorch's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.position import (
    bicubic_matrix,
    resize_position_table,
    sincos_2d,
    sinusoid,
)


def test_sincos_table_encodes_the_column_first():
    table = sincos_2d(8, (2, 3))
    assert table.shape == (6, 8)
    # Token 4 is row 1, column 1; token 2 is row 0, column 2.
    np.testing.assert_allclose(table[4][:4], table[4][4:])
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), 0, 0, 1, 1]
    np.testing.assert_allclose(table[2], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="even width"):
        sincos_2d(6, (2, 2))


def test_sinusoid_is_cosine_first_and_time_is_not_scaled():
    out = sinusoid(jnp.array([0.0, 0.5]), 4)
    np.testing.assert_allclose(out[0], [1, 1, 0, 0])
    expected = [np.cos(0.5), np.cos(0.005), np.sin(0.5), np.sin(0.005)]
    np.testing.assert_allclose(out[1], expected, rtol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(37, 16), (4, 7)])
def test_antialiased_bicubic_is_jax_image_resize(old, new):
    x = np.random.default_rng(0).normal(size=old).astype(np.float32)
    expected = jax.image.resize(jnp.asarray(x), (new,), "cubic", antialias=True)
    np.testing.assert_allclose(bicubic_matrix(old, new, antialias=True) @ x, expected, atol=2e-5)


def test_bicubic_without_antialias_is_pytorchs():
    # torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of [1, 2, 4, 8].
    x = np.array([1, 2, 4, 8], np.float32)
    doubled = bicubic_matrix(4, 8, antialias=False) @ x
    # Its weights at a quarter of a pixel, a = -0.75.
    weights = np.array([-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    assert doubled[3] == pytest.approx(weights @ [1, 2, 4, 8], rel=1e-6)
    assert doubled[1] == pytest.approx(weights @ [1, 1, 2, 4], rel=1e-6)


@pytest.mark.parametrize("method", ["bicubic", "bicubic_antialias", "dinov2"])
def test_resized_table_keeps_constants_and_its_axes(method):
    table = jnp.ones((12, 2))
    np.testing.assert_allclose(
        resize_position_table(table, (3, 4), (5, 2), method=method), np.ones((10, 2)), rtol=1e-5
    )
    assert resize_position_table(table, (3, 4), (3, 4), method=method) is table
    rows = jnp.repeat(jnp.arange(3.0), 4)[:, None]
    resized = resize_position_table(rows, (3, 4), (6, 2), method=method).reshape(6, 2)
    np.testing.assert_allclose(resized[:, 0], resized[:, 1], rtol=1e-5, atol=1e-6)
    assert float(resized[5, 0]) > 1.5 > 0.5 > float(resized[0, 0])
