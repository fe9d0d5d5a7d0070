"""Augmentations: pure functions of a key and a batch of images, for use on device under jit.

Images are float [batch, height, width, channels] in [0, 1], with 1 or 3 channels. One key serves a
batch and every example draws its own values. Whatever moves pixels (crop, shift, blur) is a row
matrix and a column matrix per example, applied as two batched matrix products: no gathers.

Colour operations follow torchvision 0.2x's definitions (transforms/_functional_tensor.py).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from repalign.typing import Array, Float, Key

Images = Float[Array, "batch height width channels"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
FASHION_MNIST_MEAN = (0.2860,)
FASHION_MNIST_STD = (0.3530,)

_LUMA = (0.2989, 0.587, 0.114)


def normalize(images: Images, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """Returns ``(images - mean) / std`` per channel; a constant such as ``IMAGENET_MEAN``."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def _resample(
    images: Images,
    rows: Float[Array, "batch height_out height"],
    columns: Float[Array, "batch width_out width"],
) -> Float[Array, "batch height_out width_out channels"]:
    images = jnp.einsum("biy,byxc->bixc", rows, images, precision="highest")
    return jnp.einsum("bjx,bixc->bijc", columns, images, precision="highest")


def _select(key: Key[Array, ""], probability: float, changed: Images, images: Images) -> Images:
    """Takes each example from ``changed`` with a probability, otherwise from ``images``."""
    if probability >= 1:
        return changed
    chosen = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(chosen, changed, images)


def _crop_weights(
    start: Float[Array, " batch"], length: Float[Array, " batch"], *, size: int, out: int
) -> Float[Array, "batch {out} {size}"]:
    """Returns the bilinear weights, antialiased when shrinking, of windows in pixels."""
    step = length / out
    centres = start[:, None] + (jnp.arange(out) + 0.5) * step[:, None] - 0.5
    support = jnp.maximum(step, 1.0)[:, None, None]
    # Outside the image the border pixel continues, as a resize does it.
    centres = jnp.clip(centres, 0, size - 1)[:, :, None]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(jnp.arange(size) - centres) / support)
    return weights / weights.sum(-1, keepdims=True)


def random_resized_crop(
    key: Key[Array, ""],
    images: Images,
    *,
    size: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "batch height_out width_out channels"]:
    """Crops a window of random area and aspect ratio and resizes it bilinearly.

    The area share is uniform in ``scale``, the log of the aspect ratio (width / height) uniform in
    the logs of ``ratio``, the position uniform. torchvision draws again, up to ten times, when the
    window does not fit and works on whole pixels; here a window that is too long on one side is cut
    to that side, and windows lie anywhere between pixels.

    Args:
        size: height and width of the result; ``None`` keeps the images' own.
    """
    batch, height, width, _ = images.shape
    out_height, out_width = (height, width) if size is None else (size, size)
    key_area, key_ratio, key_y, key_x = jax.random.split(key, 4)
    area = jax.random.uniform(key_area, (batch,), minval=scale[0], maxval=scale[1])
    log_ratio = jax.random.uniform(
        key_ratio, (batch,), minval=math.log(ratio[0]), maxval=math.log(ratio[1])
    )
    area = area * (height * width)
    window_height = jnp.minimum(jnp.sqrt(area * jnp.exp(-log_ratio)), height)
    window_width = jnp.minimum(jnp.sqrt(area * jnp.exp(log_ratio)), width)
    top = jax.random.uniform(key_y, (batch,)) * (height - window_height)
    left = jax.random.uniform(key_x, (batch,)) * (width - window_width)
    rows = _crop_weights(top, window_height, size=height, out=out_height)
    columns = _crop_weights(left, window_width, size=width, out=out_width)
    return _resample(images, rows, columns)


def horizontal_flip(key: Key[Array, ""], images: Images, *, probability: float = 0.5) -> Images:
    """Mirrors each image left to right with a probability."""
    return _select(key, probability, images[:, :, ::-1], images)


def translate(key: Key[Array, ""], images: Images, *, pixels: int) -> Images:
    """Shifts each image by whole pixels, uniform in ``[-pixels, pixels]`` on each axis.

    Zeros enter at the borders: the same as padding with ``pixels`` zeros and taking a random crop
    of the old size.
    """
    batch, height, width, _ = images.shape
    shifts = jax.random.randint(key, (2, batch, 1, 1), -pixels, pixels + 1)

    def matrix(shift: Array, size: int) -> Array:
        positions = jnp.arange(size)
        return (positions[:, None] - shift == positions).astype(images.dtype)

    return _resample(images, matrix(shifts[0], height), matrix(shifts[1], width))


def to_grey(images: Images) -> Float[Array, "batch height width 1"]:
    """Returns the luma, ``0.2989 R + 0.587 G + 0.114 B``; one channel passes unchanged."""
    if images.shape[-1] == 1:
        return images
    # A sum of slices: XLA's CPU reduction over an axis of three is several times slower.
    red, green, blue = (images[..., channel : channel + 1] for channel in range(3))
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _mean_luma(images: Images) -> Float[Array, "batch 1 1 1"]:
    """Returns each image's mean luma, as one matrix-vector product (a reduction is slow on CPU)."""
    batch, height, width, channels = images.shape
    luma = _LUMA if channels == 3 else (1.0,)
    weights = jnp.tile(jnp.asarray(luma), height * width) / (height * width)
    means = jnp.matmul(images.reshape(batch, -1), weights, precision="highest")
    return means[:, None, None, None]


def grayscale(key: Key[Array, ""], images: Images, *, probability: float = 0.2) -> Images:
    """Removes the colour of each image with a probability; the number of channels stays."""
    grey = jnp.broadcast_to(to_grey(images), images.shape)
    return _select(key, probability, grey, images)


def _shift_hue(images: Images, shift: Float[Array, "batch 1 1"]) -> Images:
    """Adds ``shift`` (in turns) to the hue of HSV."""
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    turned = sextant + 6.0 * shift

    def channel(offset: float) -> Array:
        # Value less chroma on the far half of the wheel, linear between.
        place = offset + turned
        place = place - 6.0 * jnp.floor(place / 6.0)
        return value - chroma * jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def color_jitter(
    key: Key[Array, ""],
    images: Images,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Images:
    """Changes brightness, contrast, saturation and hue of each image by random factors.

    The first three factors are uniform in ``[max(0, 1 - s), 1 + s]`` and blend with black, with the
    mean luma, and with the luma; hue turns by a share uniform in ``[-hue, hue]``; each result is
    clipped to [0, 1]. On one channel saturation and hue change nothing. torchvision draws the order
    of the four anew for every image; here it is always the one above.
    """
    batch = len(images)
    key_select, *keys = jax.random.split(key, 5)

    def factor(key: Array, strength: float) -> Array:
        low = max(0.0, 1.0 - strength)
        return jax.random.uniform(key, (batch, 1, 1, 1), minval=low, maxval=1.0 + strength)

    out = images
    if brightness:
        out = jnp.clip(out * factor(keys[0], brightness), 0, 1)
    if contrast:
        amount = factor(keys[1], contrast)
        mean = _mean_luma(out)
        out = jnp.clip(amount * out + (1 - amount) * mean, 0, 1)
    if saturation and images.shape[-1] == 3:
        amount = factor(keys[2], saturation)
        out = jnp.clip(amount * out + (1 - amount) * to_grey(out), 0, 1)
    if hue and images.shape[-1] == 3:
        shift = jax.random.uniform(keys[3], (batch, 1, 1), minval=-hue, maxval=hue)
        out = _shift_hue(out, shift)
    return _select(key_select, probability, out, images)


def gaussian_blur(
    key: Key[Array, ""],
    images: Images,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    kernel_size: int | None = None,
    probability: float = 0.5,
) -> Images:
    """Blurs each image with a Gaussian of random width (pixels, uniform in ``sigma``).

    Borders are reflected.

    Args:
        kernel_size: odd; ``None`` is a tenth of the height (23 at 224, 3 at 28), as in SimCLR.

    Raises:
        ValueError: kernel_size is even, or its half reaches the image's size.
    """
    batch, height, width, _ = images.shape
    kernel_size = 2 * (height // 20) + 1 if kernel_size is None else kernel_size
    radius = kernel_size // 2
    if kernel_size % 2 == 0 or radius >= min(height, width):
        raise ValueError(f"kernel_size={kernel_size} must be odd and less than twice the image.")
    key_select, key_sigma = jax.random.split(key)
    width_sigma = jax.random.uniform(key_sigma, (batch, 1), minval=sigma[0], maxval=sigma[1])
    taps = jax.nn.softmax(-0.5 * (jnp.arange(-radius, radius + 1) / width_sigma) ** 2)

    def matrix(size: int) -> Array:
        source = np.abs(np.arange(size) + np.arange(-radius, radius + 1)[:, None])
        source = (size - 1) - np.abs((size - 1) - source)
        return jnp.einsum("bt,tis->bis", taps, jnp.asarray(np.eye(size, dtype=np.float32)[source]))

    blurred = _resample(images, matrix(height), matrix(width))
    return _select(key_select, probability, blurred, images)


def solarize(
    key: Key[Array, ""], images: Images, *, threshold: float = 0.5, probability: float = 0.2
) -> Images:
    """Inverts the pixels at or above a threshold, in each image with a probability."""
    return _select(key, probability, jnp.where(images >= threshold, 1.0 - images, images), images)


def cutout(key: Key[Array, ""], images: Images, *, size: int, fill: float = 0.0) -> Images:
    """Fills a square of ``size`` pixels, its centre uniform over the pixels (cut at the border).

    DeVries, Taylor, arXiv:1708.04552.
    """
    batch, height, width, _ = images.shape
    key_y, key_x = jax.random.split(key)

    def inside(key: Array, length: int) -> Array:
        start = jax.random.randint(key, (batch, 1), 0, length) - size // 2
        positions = jnp.arange(length)
        return (positions >= start) & (positions < start + size)

    hole = inside(key_y, height)[:, :, None] & inside(key_x, width)[:, None, :]
    return jnp.where(hole[..., None], fill, images)


@dataclasses.dataclass(frozen=True)
class ViewRecipe:
    """How one view is made of an image: crop, flip, colour, grey, blur, solarise, in this order.

    The defaults are SimCLR's (arXiv:2002.05709, appendix A, strength 1). Every probability is that
    of the step; 0 leaves the step out of the compiled program.

    Attributes:
        size: height and width of the view; ``None`` keeps the image's.
        crop_scale: range of the window's share of the area; ``None`` leaves the crop out, and with
            it any change of size.
        flip: probability of a mirror image.
        jitter: probability of the colour jitter, with strengths ``brightness`` ... ``hue``.
        grayscale, blur, solarize: probabilities.
        blur_sigma: range of the Gaussian's width in pixels.
    """

    size: int | None = None
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_scale is None and self.size is not None:
            raise ValueError(f"size={self.size} needs a crop, and crop_scale is None.")

    def __call__(
        self, key: Key[Array, ""], images: Images
    ) -> Float[Array, "batch height_out width_out channels"]:
        keys = jax.random.split(key, 6)
        out = images
        if self.crop_scale is not None:
            out = random_resized_crop(keys[0], images, size=self.size, scale=self.crop_scale)
        if self.flip:
            out = horizontal_flip(keys[1], out, probability=self.flip)
        if self.jitter:
            out = color_jitter(
                keys[2],
                out,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
                hue=self.hue,
                probability=self.jitter,
            )
        if self.grayscale and images.shape[-1] == 3:
            out = grayscale(keys[3], out, probability=self.grayscale)
        if self.blur:
            out = gaussian_blur(keys[4], out, sigma=self.blur_sigma, probability=self.blur)
        if self.solarize:
            out = solarize(keys[5], out, probability=self.solarize)
        return out


SIMCLR = ViewRecipe()
BYOL_FIRST = ViewRecipe(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
BYOL_SECOND = dataclasses.replace(BYOL_FIRST, blur=0.1, solarize=0.2)
"""BYOL's two views (arXiv:2006.07733, appendix B); Barlow Twins and VICReg use the same."""


def two_views(
    key: Key[Array, ""],
    images: Images,
    *,
    first: ViewRecipe = SIMCLR,
    second: ViewRecipe | None = None,
) -> tuple[
    Float[Array, "batch first_height first_width channels"],
    Float[Array, "batch second_height second_width channels"],
]:
    """Returns two independent views of each image; ``second=None`` uses the same recipe twice."""
    key_first, key_second = jax.random.split(key)
    second = first if second is None else second
    return first(key_first, images), second(key_second, images)


def multi_crop(
    key: Key[Array, ""],
    images: Images,
    *,
    large: tuple[ViewRecipe, ...],
    small: ViewRecipe,
    small_count: int,
) -> tuple[
    Float[Array, "large batch large_height large_width channels"],
    Float[Array, "small batch small_height small_width channels"],
]:
    """Returns large and small views, stacked, as SwAV and DINO use them.

    Args:
        large: a recipe for each large view; their sizes are equal.
        small: the recipe of all small views; its ``size`` and ``crop_scale`` are smaller.
        small_count: how many, at least 1.
    """
    keys = jax.random.split(key, len(large) + small_count)
    large_keys = keys[: len(large)]
    large_views = [recipe(key, images) for recipe, key in zip(large, large_keys, strict=True)]
    small_views = jax.vmap(lambda key: small(key, images))(keys[len(large) :])
    return jnp.stack(large_views), small_views
