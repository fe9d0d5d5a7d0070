import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.metrics.reconstruction import psnr, ssim


def image(shape):
    return np.sin(0.37 * np.arange(np.prod(shape)) ** 1.1).reshape(shape)


@pytest.mark.parametrize(
    # scikit-image 0.26.0: peak_signal_noise_ratio and structural_similarity(gaussian_weights=True,
    # sigma=1.5, use_sample_covariance=False, data_range=1) on these images.
    ("channels", "expected_psnr", "expected_ssim"),
    [
        (1, [22.37339785109252, 21.94320893519088], [0.9803736959080469, 0.9699491119923224]),
        (3, [22.212596575883726, 22.32731649156749], [0.9786454663491898, 0.9800846378380691]),
    ],
)
def test_values_are_scikit_images(channels, expected_psnr, expected_ssim):
    target = image((2, 20, 24, channels)) * 0.5 + 0.5
    noise = image((2, 24, 20, channels)).reshape(2, 20, 24, channels)
    noisy = jnp.asarray(np.clip(target + 0.2 * noise, 0, 1), jnp.float32)
    target = jnp.asarray(target, jnp.float32)
    np.testing.assert_allclose(psnr(noisy, target, data_range=1.0), expected_psnr, rtol=2e-5)
    np.testing.assert_allclose(ssim(noisy, target, data_range=1.0), expected_ssim, rtol=2e-5)
    # The same images in [-1, 1].
    wide = [2.0 * values - 1.0 for values in (noisy, target)]
    np.testing.assert_allclose(psnr(*wide, data_range=2.0), expected_psnr, rtol=1e-4)


def test_limits():
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    np.testing.assert_allclose(ssim(x, x, data_range=1.0), 1.0, rtol=1e-5)
    assert np.all(np.isposinf(psnr(x, x, data_range=1.0)))
    np.testing.assert_allclose(psnr(x + 0.1, x, data_range=1.0), 20.0, rtol=1e-4)
    # Constant images differ in luminance only: (2ab + c1) / (a^2 + b^2 + c1).
    one, half = jnp.ones((1, 12, 12, 1)), jnp.full((1, 12, 12, 1), 0.5)
    expected = (2 * 0.5 + 1e-4) / (1.25 + 1e-4)
    np.testing.assert_allclose(ssim(one, half, data_range=1.0), expected, rtol=1e-3)
    assert np.all(ssim(x, 1.0 - x, data_range=1.0) < 0)
    assert np.all(np.isnan(ssim(x.at[:, 5, 5].set(jnp.nan), x, data_range=1.0)))


@pytest.mark.parametrize("arguments", [{"window": 10}, {"window": 17}])
def test_a_window_that_does_not_fit_is_named(arguments):
    x = jnp.zeros((1, 16, 20, 1))
    with pytest.raises(ValueError, match=f"window of {arguments['window']} pixels"):
        ssim(x, x, data_range=1.0, **arguments)
