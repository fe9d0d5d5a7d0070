"""Bags of visual words: a teacher's soft histograms of local features, and their prediction."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, map_row_blocks, squared_distances
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Float, Key, Num, Scalar

_POOLS = {"max": jnp.max, "mean": jnp.mean}


def bag_of_visual_words(
    features: Num[Array, "batch tokens dim"],
    words: Num[Array, "words dim"],
    mean_distance: Num[Array, ""],
    *,
    inverse_delta: ArrayLike = 15.0,
    pool: str = "max",
    momentum: ArrayLike = 0.99,
) -> tuple[Float[Array, "batch words"], Scalar]:
    """OBoW's targets: how strongly each word of a vocabulary occurs in an image.

    A local feature is assigned softly, ``q_u = softmax_k(-inverse_delta |f_u - w_k|^2 / m)``, m the
    running mean of the distance to the nearest word; the histogram is ``pool_u q_u``, scaled to sum
    1. Nothing carries a gradient. Large batches go by blocks of images.

    Args:
        features: the averaged network's local features of the unperturbed image, without the
            border that padding has touched.
        words: the vocabulary.
        mean_distance: the state m, 0.5 at first.
        inverse_delta: sharpness of the assignment.
        pool: ``max`` or ``mean`` over the tokens.
        momentum: of the running mean.

    Returns:
        The histograms, and the new mean distance, with which they were made.

    Raises:
        UserError: another name for ``pool``.

    Source: Gidaris et al. (arXiv:2012.11552); valeoai/obow@3758504:obow/builder_obow.py:396-430.
    """
    reduce = lookup(_POOLS, pool, kind="pool")
    features = lax.stop_gradient(as_float(features))
    words = lax.stop_gradient(as_float(words))
    columns = features.shape[1] * words.shape[0]

    def distances(images: Array) -> Array:
        flat = squared_distances(images.reshape(-1, images.shape[-1]), words)
        return flat.reshape(*images.shape[:2], -1)

    nearest = map_row_blocks(
        lambda images: jnp.min(distances(images), axis=2), features, columns=columns
    )
    mean = momentum * as_float(mean_distance) + (1.0 - momentum) * jnp.mean(nearest)
    sharpness = inverse_delta / jnp.maximum(mean, 1e-12)

    def histogram(images: Array) -> Array:
        codes = jax.nn.softmax(-sharpness * distances(images), axis=2)
        pooled = reduce(codes, axis=1)
        return pooled / jnp.sum(pooled, axis=1, keepdims=True)

    return map_row_blocks(histogram, features, columns=columns), mean


def draw_visual_words(
    key: Key[Array, ""], features: Num[Array, "batch height width dim"]
) -> Float[Array, "batch dim"]:
    """Returns one new word of each image: a random one of its features, averaged over 3 x 3.

    They take the places of the oldest words (`repalign.train.stateful_terms.enqueue`). No gradient.

    Raises:
        ValueError: a map smaller than 3 x 3.

    Source: Gidaris et al. (arXiv:2012.11552); valeoai/obow@3758504:obow/builder_obow.py:351-380
    (``local_average``).
    """
    batch, height, width, dim = features.shape
    if min(height, width) < 3:
        raise ValueError(f"a map of {height}x{width} has no 3x3 neighbourhood to average.")
    features = lax.stop_gradient(as_float(features))
    place = jax.random.randint(key, (batch,), 0, (height - 2) * (width - 2))
    row, column = jnp.divmod(place, width - 2)

    def around(image: Array, row: Array, column: Array) -> Array:
        return jnp.mean(lax.dynamic_slice(image, (row, column, 0), (3, 3, dim)), axis=(0, 1))

    return jax.vmap(around)(features, row, column)


def word_prediction(
    logits: Num[Array, "batch words"], targets: Num[Array, "batch words"]
) -> Float[Array, "batch"]:
    """``KL(target || softmax(logits))`` per example, in nats, >= 0.

    The gradient is that of the cross-entropy; the targets, histograms that sum to 1, get none.
    OBoW's student predicts ``logits = kappa G(words) f``, f the embedding of a perturbed crop, G a
    network from words to unit weight vectors and kappa 8 (obow/builder_obow.py:463-560).

    Source: Gidaris et al. (arXiv:2012.11552); valeoai/obow@3758504:obow/builder_obow.py:184-197.
    """
    targets = lax.stop_gradient(as_float(targets))
    occurs = targets > 0
    entropy = jnp.where(occurs, jnp.log(jnp.where(occurs, targets, 1.0)), 0.0)
    log_probabilities = jax.nn.log_softmax(as_float(logits), axis=1)
    return jnp.sum(targets * (entropy - log_probabilities), axis=1)
