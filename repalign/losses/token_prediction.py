"""Cross-entropies of discrete tokens: the losses of token priors."""

import jax
import jax.numpy as jnp

from repalign.losses.batch_statistics import token_mean
from repalign.numerics import as_float
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Bool, Float, Integer, Key


def token_cross_entropy(
    logits: Float[Array, "batch tokens codes"],
    tokens: Integer[Array, "batch tokens"],
    *,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "batch"]:
    """Mean over tokens of ``-log softmax(logits)[token]``, in nats, per example.

    With autoregressive logits this is the negative log-likelihood of the sequence divided by its
    length. With ``label_smoothing`` s the target is ``1 - s`` on the token and ``s / codes`` on
    all. A token of ``codes`` or more gives NaN.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), the prior; Esser et al. 2021
    (arXiv:2012.09841), equation 12.
    """
    return jnp.mean(_cross_entropy(logits, tokens, label_smoothing), axis=1)


def masked_token_cross_entropy(
    logits: Float[Array, "batch tokens codes"],
    tokens: Integer[Array, "batch tokens"],
    masked: Bool[Array, "batch tokens"],
    *,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "batch"]:
    """Mean over the masked tokens of ``-log softmax(logits)[token]``; 0 where none is masked.

    MaskGIT's loss has ``label_smoothing=0.1``. Its official code divides the sum over a batch by
    the batch's number of masked tokens; here every example has the same weight, whatever its
    number of masked tokens.

    Source: Chang et al. 2022 (arXiv:2202.04200), equation 1;
    google-research/maskgit@1db2359:maskgit/libml/losses.py (weighted_sequence_cross_entropy_loss).
    """
    return token_mean(_cross_entropy(logits, tokens, label_smoothing), masked)


def mask_tokens(
    key: Key[Array, ""], tokens: Integer[Array, "batch tokens"], *, schedule: str = "cosine"
) -> Bool[Array, "batch tokens"]:
    """Draws what MaskGIT hides in training: ``max(1, floor(T g(u)))`` tokens, u ~ U[0, 1).

    ``g`` is a schedule of :func:`masked_share`; which tokens is uniform. At least one is hidden.

    Source: Chang et al. 2022 (arXiv:2202.04200), section 3.1.
    """
    ratio_key, order_key = jax.random.split(key)
    batch, length = tokens.shape
    share = masked_share(jax.random.uniform(ratio_key, (batch,)), schedule=schedule)
    hidden = jnp.maximum(jnp.floor(length * share), 1)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (batch, length)), axis=1), axis=1)
    return rank < hidden[:, None]


def masked_share(ratio: Float[Array, "*shape"], *, schedule: str) -> Float[Array, "*shape"]:
    """Share of tokens that are hidden after a share ``ratio`` of the steps: from 1 down to 0.

    ``cosine``: ``cos(pi r / 2)``; ``linear``: ``1 - r``; ``square``: ``1 - r^2``.

    Raises:
        UserError: an unknown schedule.

    Source: Chang et al. 2022 (arXiv:2202.04200), section 3.3;
    google-research/maskgit@1db2359:maskgit/libml/mask_schedule.py:22-51 (there ``linear`` is
    called ``uniform`` and ``square`` is ``pow2``).
    """
    return lookup(_SCHEDULES, schedule, kind="mask schedule")(ratio)


def _cross_entropy(logits: Array, tokens: Array, label_smoothing: ArrayLike) -> Array:
    log_probabilities = jax.nn.log_softmax(as_float(logits), axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1, mode="fill")[..., 0]
    uniform = jnp.mean(log_probabilities, axis=-1)
    return -(1.0 - label_smoothing) * chosen - label_smoothing * uniform


_SCHEDULES = {
    "cosine": lambda ratio: jnp.cos(0.5 * jnp.pi * ratio),
    "linear": lambda ratio: 1.0 - ratio,
    "square": lambda ratio: 1.0 - jnp.square(ratio),
}
