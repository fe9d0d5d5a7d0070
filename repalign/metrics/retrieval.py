"""Retrieval: where the right items stand in the order of similarity."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from repalign import numerics
from repalign.kernels import neighbors
from repalign.typing import Array, Bool, Float, Int, Num, Scalar

_BLOCK = 1024


@jax.jit
def match_ranks(
    queries: Num[Array, "queries dim"],
    gallery: Num[Array, "gallery dim"],
    targets: Int[Array, " queries"] | None = None,
) -> Int[Array, " queries"]:
    """Rank, from 1, of each query's match among all gallery items by inner product.

    The match of query i is gallery item ``targets[i]``, by default item i. An item of equal score
    and lower index ranks before it, as in ``kernels.neighbors``. For cosine, normalise first. The
    memory is that of 1024 rows of scores.
    """
    queries, gallery = numerics.as_float(queries), numerics.as_float(gallery)
    if targets is None:
        targets = jnp.arange(queries.shape[0])
    columns = jnp.arange(gallery.shape[0])

    def rank(arguments: tuple[Float[Array, " dim"], Int[Array, ""]]) -> Int[Array, ""]:
        query, target = arguments
        scores = numerics.inner_products(query[None], gallery)[0]
        match = scores[target]
        return 1 + jnp.sum((scores > match) | ((scores == match) & (columns < target)))

    return lax.map(rank, (queries, targets), batch_size=_BLOCK)


def recall_at_k(ranks: Int[Array, " queries"], *, k: int) -> Scalar:
    """Share of queries whose match is among the first k, in [0, 1]."""
    return jnp.mean((ranks <= k).astype(jnp.float32))


def mean_reciprocal_rank(ranks: Int[Array, " queries"]) -> Scalar:
    """``mean_i 1 / rank_i``, in (0, 1]."""
    return jnp.mean(1.0 / ranks)


@jax.jit
def average_precision(
    scores: Num[Array, "queries items"], relevant: Bool[Array, "queries items"]
) -> Float[Array, " queries"]:
    """Mean, over a query's relevant items, of the precision at their rank; in [0, 1].

    Items of equal score stand in the order of their index (scikit-learn counts them as one group).
    0 for a query without relevant items.
    """
    order = jnp.argsort(scores, axis=1, stable=True, descending=True)
    hits = jnp.take_along_axis(relevant, order, axis=1).astype(jnp.float32)
    precision = jnp.cumsum(hits, axis=1) / jnp.arange(1, scores.shape[1] + 1)
    return jnp.sum(precision * hits, axis=1) / jnp.maximum(jnp.sum(hits, axis=1), 1.0)


@functools.partial(jax.jit, static_argnames=("k",))
def label_recall_at_k(
    embeddings: Num[Array, "batch dim"], labels: Int[Array, " batch"], *, k: int
) -> Float[Array, " batch"]:
    """1 for each example with one of its own label among its k nearest others, else 0.

    By inner product; the Recall@k of metric learning (Song et al. 2016, Lifted Structured Feature
    Embedding, Section 6) is the mean, for L2-normalised embeddings.
    """
    found = neighbors.top_k(embeddings, embeddings, k=k, exclude_self=True).indices
    return jnp.any(labels[found] == labels[:, None], axis=1).astype(jnp.float32)


@jax.jit
def map_at_r(
    embeddings: Num[Array, "batch dim"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Average precision over the first R places, R the number of others with the same label.

    ``1/R sum_{i <= R} [i-th nearest has the label] precision(i)``, by inner product; in [0, 1]; 0
    when R is 0. Sorts all N others per query, in O(N^2) memory.

    Musgrave et al. 2020 (A Metric Learning Reality Check), Section 3.2.
    """
    found = neighbors.top_k(embeddings, embeddings, k=embeddings.shape[0] - 1, exclude_self=True)
    hits = (labels[found.indices] == labels[:, None]).astype(jnp.float32)
    total = jnp.sum(hits, axis=1)
    places = jnp.arange(1, hits.shape[1] + 1)
    precision = jnp.cumsum(hits, axis=1) / places
    counted = precision * hits * (places[None, :] <= total[:, None])
    return jnp.sum(counted, axis=1) / jnp.maximum(total, 1.0)


@functools.partial(jax.jit, static_argnames=("k",))
def neighbor_jaccard(
    queries: Num[Array, "items dim"], gallery: Num[Array, "items dim"], *, k: int
) -> Float[Array, " items"]:
    """How far query i stands for gallery item i: Jaccard index of their k nearest gallery items.

    By inner product; for cosine, normalise first. Item i itself counts among the neighbours of
    both. In [0, 1], and 1 for equal arrays.

    Moschella et al. 2023 (Relative Representations), Section 4.1; lucmos/relreps@627ed13:
    experiments/fig:latent-rotation-comparison/quantitative_analysis.ipynb.
    """
    own = neighbors.top_k(gallery, gallery, k=k).indices
    found = neighbors.top_k(queries, gallery, k=k).indices
    shared = jnp.sum(found[:, :, None] == own[:, None, :], axis=(1, 2)).astype(jnp.float32)
    return shared / (2 * k - shared)
