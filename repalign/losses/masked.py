"""Random masking of tokens, and losses on what was masked.

Prediction of a teacher's features at masked tokens (I-JEPA, dBOT, ...) is
``distillation.feature_distillation`` with ``where``; of its cluster assignments,
``clustering.ibot`` and ``clustering.capi_prediction``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.batch_statistics import token_mean
from repalign.numerics import as_float, l2_normalize
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Key, Num


class Masking(NamedTuple):
    """Which tokens an encoder sees.

    Attributes:
        visible: indices of the visible tokens, in shuffled order, [batch, visible].
        masked: True where a token is hidden, [batch, tokens].
        restore: ``shuffled[restore]`` puts shuffled tokens (visible ones first) back in place,
            [batch, tokens].
    """

    visible: Integer[Array, "batch visible"]
    masked: Bool[Array, "batch tokens"]
    restore: Integer[Array, "batch tokens"]


def random_masking(key: Key[Array, ""], batch: int, tokens: int, *, mask_ratio: float) -> Masking:
    """Masks the same number of tokens in every example, uniformly at random.

    ``floor(tokens (1 - mask_ratio))`` tokens stay visible. Select them with
    ``jnp.take_along_axis(x, masking.visible[..., None], axis=1)``.

    Raises:
        ValueError: a ratio outside [0, 1) or one that leaves no token visible.

    Source: He et al., MAE (arXiv:2111.06377); facebookresearch/mae@efb2a80:models_mae.py:123-148.
    """
    visible = int(tokens * (1.0 - mask_ratio))
    if not 0.0 <= mask_ratio < 1.0 or visible < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves {visible} of {tokens} tokens visible; it must be in "
            "[0, 1) and leave at least one."
        )
    order = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :visible], restore >= visible, restore)


def inverse_block_masking(
    key: Key[Array, ""],
    batch: int,
    grid: tuple[int, int],
    *,
    mask_ratio: float,
    smallest_aspect: float = 0.5,
) -> Masking:
    """Masks everything but one block in every example, at a random place of a torus.

    ``tokens - floor(tokens mask_ratio)`` tokens stay visible: the first so many, row by row, of a
    rectangle whose log aspect ratio (height / width) is uniform between ``log smallest_aspect`` and
    its negative, as far as it fits the grid; what leaves the grid on one side comes in on the other
    ("inverse block + roll"). Hidden tokens follow in random order, so that the first ones after
    the visible ones in ``argsort(restore)`` are a random sample of them.

    Args:
        grid: rows and columns of tokens.

    Raises:
        ValueError: a ratio outside [0, 1).

    Source: Darcet et al., CAPI (arXiv:2502.08769), section 3; facebookresearch/capi@98b4fa1:
    data.py:394-440, 459. A block that reaches beyond the grid by rounding is cut to it.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio {mask_ratio} must be in [0, 1).")
    height, width = grid
    tokens = height * width
    visible = tokens - int(tokens * mask_ratio)
    aspect_key, shift_key, order_key = jax.random.split(key, 3)
    lowest = max(math.log(smallest_aspect), math.log(visible / width**2))
    highest = min(-math.log(smallest_aspect), math.log(height**2 / visible))
    aspect = jnp.exp(jax.random.uniform(aspect_key, (batch,), minval=lowest, maxval=highest))
    rows = jnp.minimum(jnp.ceil(jnp.sqrt(visible * aspect)), height)
    # As many columns as the rows need: what rounding and cutting took is given back.
    columns = jnp.maximum(jnp.ceil(jnp.sqrt(visible / aspect)), jnp.ceil(visible / rows))
    sides = jnp.asarray(grid)[:, None, None]
    shift = jax.random.randint(shift_key, (2, batch, 1), 0, sides)
    row, column = jnp.divmod(jnp.arange(tokens), width)
    row, column = (row - shift[0]) % height, (column - shift[1]) % width
    rank = row * columns[:, None] + column
    seen = (row < rows[:, None]) & (column < columns[:, None]) & (rank < visible)
    behind = tokens + jax.random.uniform(order_key, (batch, tokens))
    order = jnp.argsort(jnp.where(seen, rank, behind), axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :visible], restore >= visible, restore)


def mae(
    predictions: Num[Array, "batch tokens pixels"],
    patches: Num[Array, "batch tokens pixels"],
    masked: Bool[Array, "batch tokens"],
    *,
    normalize_patches: bool = True,
    ddof: int = 1,
    epsilon: ArrayLike = 1e-6,
) -> Float[Array, "batch"]:
    """MAE: mean squared error of the masked patches' pixels, per example (0 if none is masked).

    Args:
        patches: pixels of every patch, in the predictions' order; no gradient.
        normalize_patches: targets are ``(p - mean) / sqrt(var + epsilon)`` of each patch.
        ddof: 1 for the unbiased variance, as in the official code; 0 for the biased one, which
            ports often use.

    The official loss averages over all masked patches of a batch, which is the mean of this one
    because every example has equally many. Source: He et al. (arXiv:2111.06377);
    facebookresearch/mae@efb2a80:models_mae.py:198-214.
    """
    patches = lax.stop_gradient(as_float(patches))
    if normalize_patches:
        mean = jnp.mean(patches, axis=-1, keepdims=True)
        squared = jnp.sum(jnp.square(patches - mean), axis=-1, keepdims=True)
        variance = squared / max(patches.shape[-1] - ddof, 1)
        patches = (patches - mean) * lax.rsqrt(variance + epsilon)
    error = jnp.mean(jnp.square(as_float(predictions) - patches), axis=-1)
    return token_mean(error, masked)


def simmim(
    predictions: Num[Array, "batch tokens pixels"],
    patches: Num[Array, "batch tokens pixels"],
    masked: Bool[Array, "batch tokens"],
) -> Float[Array, "batch"]:
    """SimMIM: mean absolute error of the masked patches' pixels, per example (0 if none).

    The patches are taken as they are and receive no gradient. The official loss divides by all
    masked pixels of the batch (plus 1e-5): the mean of this one for equally many per example.
    Source: Xie et al. (arXiv:2111.09886); microsoft/SimMIM@d3e29bc:models/simmim.py:114-121.
    """
    difference = as_float(predictions) - lax.stop_gradient(as_float(patches))
    return token_mean(jnp.mean(jnp.abs(difference), axis=-1), masked)


def patch_discrimination(
    predictions: Num[Array, "batch tokens dim"],
    targets: Num[Array, "batch tokens dim"],
    *,
    temperature: ArrayLike = 0.2,
    standardize: bool = True,
    epsilon: ArrayLike = 1e-4,
) -> Float[Array, "batch"]:
    """Latent MIM: each predicted latent finds its own patch among the image's target patches.

    ``2 t mean_p CE_q(cos(z_p, h_q) / t, q = p)`` per example. All tokens are masked ones.

    Args:
        targets: latents of the EMA encoder; no gradient.
        standardize: predictions are first standardised over the tokens, per dimension (unbiased
            standard deviation plus ``epsilon``), which forbids predicting one mean for all.

    Source: Wei et al., Latent MIM (arXiv:2407.15837); yibingwei-1/LatentMIM@4e91363:
    models_lmim.py:107-128.
    """
    predictions = as_float(predictions)
    if standardize:
        predictions = predictions - jnp.mean(predictions, axis=1, keepdims=True)
        squared = jnp.sum(jnp.square(predictions), axis=1, keepdims=True)
        variance = squared / max(predictions.shape[1] - 1, 1)
        varies = variance > 0
        # The inner where keeps the derivative of sqrt finite for constant predictions.
        deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)
        predictions = predictions / (deviation + epsilon)
    scores = jnp.einsum(
        "bpd,bqd->bpq",
        l2_normalize(predictions),
        lax.stop_gradient(l2_normalize(targets)),
        precision=lax.Precision.HIGHEST,
    )
    log_probabilities = jax.nn.log_softmax(scores / temperature, axis=-1)
    matching = jnp.diagonal(log_probabilities, axis1=1, axis2=2)
    return -2.0 * temperature * jnp.mean(matching, axis=1)
