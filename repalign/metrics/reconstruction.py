"""How near a reconstruction is to its image: PSNR and SSIM, per example."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from repalign.numerics import as_float
from repalign.typing import Array, Float, Num


def psnr(
    reconstruction: Num[Array, "batch *event"],
    target: Num[Array, "batch *event"],
    *,
    data_range: float,
) -> Float[Array, "batch"]:
    """Peak signal-to-noise ratio, ``10 log10(data_range^2 / MSE)`` in dB; infinite if equal.

    Args:
        data_range: largest minus smallest possible value: 1 for images in [0, 1], 2 for [-1, 1].
    """
    error = jnp.square(as_float(reconstruction) - as_float(target))
    mean = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
    return 20.0 * jnp.log10(data_range) - 10.0 * jnp.log10(mean)


def ssim(
    reconstruction: Num[Array, "batch height width channels"],
    target: Num[Array, "batch height width channels"],
    *,
    data_range: float,
    sigma: float = 1.5,
    window: int = 11,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Float[Array, "batch"]:
    """Structural similarity, the mean over positions and channels; 1 for equal images.

    ``(2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))`` in Gaussian
    windows of 11 pixels that lie wholly inside the image, ``c_i = (k_i data_range)^2``, moments
    biased. Defaults are the paper's; scikit-image's
    ``structural_similarity(gaussian_weights=True, use_sample_covariance=False)`` averages over the
    same positions.

    Raises:
        ValueError: an image smaller than the window, or an even window.

    Source: Wang et al. 2004 (Image quality assessment: from error visibility to structural
    similarity), equation 13 and section III.C.
    """
    if window % 2 == 0 or window > min(target.shape[1:3]):
        raise ValueError(
            f"a window of {window} pixels must be odd and fit an image of {target.shape[1:3]}."
        )
    x, y = as_float(reconstruction), as_float(target)
    taps = np.exp(-0.5 * (np.arange(window) - window // 2) ** 2 / sigma**2)
    taps = (taps / taps.sum()).astype(np.float32)

    def banded(size: int) -> Array:
        rows = np.zeros((size - window + 1, size), np.float32)
        for row in range(len(rows)):
            rows[row, row : row + window] = taps
        return jnp.asarray(rows)

    rows, columns = banded(x.shape[1]), banded(x.shape[2])

    def local_mean(values: Array) -> Array:
        values = jnp.einsum("ih,bhwc->biwc", rows, values, precision=lax.Precision.HIGHEST)
        return jnp.einsum("jw,biwc->bijc", columns, values, precision=lax.Precision.HIGHEST)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x * mean_x
    variance_y = local_mean(y * y) - mean_y * mean_y
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2.0 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))
