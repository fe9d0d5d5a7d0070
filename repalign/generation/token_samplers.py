"""Samplers of discrete tokens: one by one from a causal model, or many at once from a masked one.

A model is given by its logits; `repalign.models.token_transformer.TokenTransformer` has both forms.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses.token_prediction import masked_share
from repalign.typing import Array, ArrayLike, Float, Int, Integer, Key, PyTree


def guided_logits(
    conditional: Float[Array, "*shape codes"],
    null: Float[Array, "*shape codes"],
    scale: ArrayLike,
) -> Float[Array, "*shape codes"]:
    """Classifier-free guidance of logits: ``null + scale (conditional - null)``; 1: no guidance.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), equation 6 with ``scale = 1 + w``, on logits as
    in Chang et al. 2023 (Muse, arXiv:2301.00704), section 2.7.
    """
    return null + scale * (conditional - null)


def truncated_logits(
    logits: Float[Array, "*shape codes"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*shape codes"]:
    """Sets the logits of unlikely codes to -inf: what is sampled is the truncated distribution.

    Args:
        top_k: keeps the k largest logits (and those equal to the k-th).
        top_p: keeps the smallest set of largest probabilities whose sum is at least p (nucleus
            sampling, Holtzman et al. 2020, arXiv:1904.09751), and those equal to the last one.

    Raises:
        ValueError: ``top_k`` below 1, ``top_p`` outside (0, 1].
    """
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        least = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {top_p}.")
        descending = -jnp.sort(-jax.nn.softmax(logits, axis=-1), axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(descending, kept - 1, axis=-1)
        logits = jnp.where(jax.nn.softmax(logits, axis=-1) < least, -jnp.inf, logits)
    return logits


def autoregressive(
    key: Key[Array, ""],
    next_logits: Callable[[PyTree, Array, Array], tuple[Array, PyTree]],
    caches: PyTree,
    *,
    batch: int,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "batch length"]:
    """Draws sequences token by token, each from the model's distribution given those before.

    Args:
        key: one key; token i is drawn with ``fold_in(key, i)``.
        next_logits: ``(caches, previous token [batch], position) -> (logits [batch, codes], new
            caches)``; the previous token of position 0 is 0 and not to be read. Guidance belongs in
            here (:func:`guided_logits`).
        caches: what it starts from.
        batch, length: of the result.
        temperature: divides the logits before truncation; 0 takes the likeliest token.
        top_k, top_p: see :func:`truncated_logits`.

    Raises:
        ValueError: a negative temperature, or as :func:`truncated_logits`.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must not be negative, but is {temperature}.")

    def step(carry: tuple[PyTree, Array], position: Array) -> tuple[tuple[PyTree, Array], Array]:
        caches, previous = carry
        logits, caches = next_logits(caches, previous, position)
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            logits = truncated_logits(logits / temperature, top_k=top_k, top_p=top_p)
            token = jax.random.categorical(jax.random.fold_in(key, position), logits)
        token = token.astype(jnp.int32)
        return (caches, token), token

    start = (caches, jnp.zeros(batch, jnp.int32))
    return lax.scan(step, start, jnp.arange(length))[1].T


def masked(
    key: Key[Array, ""],
    logits: Callable[[Array], Array],
    tokens: Integer[Array, "batch length"],
    *,
    mask_token: int,
    steps: int = 12,
    choice_temperature: float = 4.5,
    schedule: str = "cosine",
) -> Int[Array, "batch length"]:
    """MaskGIT's parallel decoding: fills the hidden tokens of each sequence in ``steps`` calls.

    Every step draws all hidden tokens at once and keeps those of which the model is surest, by
    ``log p(drawn) + choice_temperature (1 - r) gumbel``, ``r = (step + 1) / steps``; ``max(1,
    min(hidden - 1, floor(H g(r))))`` of the H that were hidden at first stay hidden, g being
    :func:`repalign.losses.token_prediction.masked_share`. The last step keeps all. Tokens given in
    ``tokens`` never change.

    Args:
        logits: ``tokens [batch, length] -> [batch, length, codes]``, with ``mask_token`` in place
            of hidden tokens. Guidance belongs in here.
        tokens: where to start: ``mask_token`` everywhere to generate, in a hole to inpaint.
        mask_token: the index of hidden tokens, not below the number of codes.
        steps: calls of the model.
        choice_temperature: 4.5 in the paper's ImageNet model.
        schedule: see ``masked_share``.

    Raises:
        ValueError: fewer than one step.

    Source: Chang et al. 2022 (arXiv:2202.04200), section 3.2;
    google-research/maskgit@1db2359:maskgit/libml/parallel_decode.py:26-176. Deviation: an example
    with no hidden token left is not masked again.
    """
    if steps < 1:
        raise ValueError(f"masked generation needs at least one step, not {steps}.")
    start = jnp.sum(tokens == mask_token, axis=1, keepdims=True)

    def step(tokens: Array, number: Array) -> tuple[Array, None]:
        draw_key, choice_key = jax.random.split(jax.random.fold_in(key, number))
        predicted = logits(tokens)
        hidden = tokens == mask_token
        drawn = jax.random.categorical(draw_key, predicted).astype(tokens.dtype)
        drawn = jnp.where(hidden, drawn, tokens)
        ratio = (number + 1) / steps
        remain = jnp.floor(start * masked_share(ratio, schedule=schedule))
        remain = jnp.maximum(1, jnp.minimum(jnp.sum(hidden, axis=1, keepdims=True) - 1, remain))
        log_probabilities = jax.nn.log_softmax(predicted, axis=-1)
        sureness = jnp.take_along_axis(log_probabilities, drawn[..., None], axis=-1)[..., 0]
        noise = jax.random.gumbel(choice_key, sureness.shape)
        sureness = sureness + choice_temperature * (1.0 - ratio) * noise
        sureness = jnp.where(hidden, sureness, jnp.inf)
        rank = jnp.argsort(jnp.argsort(sureness, axis=1), axis=1)
        again = hidden & (rank < remain) & (number + 1 < steps)
        return jnp.where(again, mask_token, drawn), None

    return lax.scan(step, tokens.astype(jnp.int32), jnp.arange(steps))[0]
