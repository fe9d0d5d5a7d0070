"""k-means codebooks and the revival of dead codes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels import codebook as kernel
from repalign.numerics import as_float, l2_normalize
from repalign.quantizers.vector import CodebookStatistics, EmaUpdate
from repalign.registry import lookup
from repalign.typing import Array, Bool, Float, Int, Key, Scalar


class KMeans(NamedTuple):
    """What ``kmeans`` returns.

    Attributes:
        codebook: [codes, dim].
        statistics: counts and sums of the last assignment, to start an EMA from.
        inertia: the mean distance (squared Euclidean, or 1 - cos) to the last assignment's codes.
    """

    codebook: Float[Array, "codes dim"]
    statistics: CodebookStatistics
    inertia: Scalar


def _draw(key: Key[Array, ""], count: int, draws: int) -> Int[Array, " draws"]:
    """Draws row numbers, without replacement as far as there are rows."""
    if draws <= count:
        return jax.random.permutation(key, count)[:draws]
    return jax.random.randint(key, (draws,), 0, count)


def _plus_plus(key: Key[Array, ""], x: Array, num_codes: int, distance: str) -> Array:
    first_key, key = jax.random.split(key)
    first = x[jax.random.randint(first_key, (), 0, x.shape[0])]
    zeros = jnp.zeros(x.shape[:1], jnp.int32)
    codebook = jnp.broadcast_to(first, (num_codes, x.shape[1]))
    nearest = kernel.code_distances(x, first[None], zeros, distance=distance)

    def step(number, carry):
        codebook, nearest = carry
        # log 0 = -inf: a vector that is a code already is not drawn (unless all are).
        chosen = x[jax.random.categorical(jax.random.fold_in(key, number), jnp.log(nearest))]
        added = kernel.code_distances(x, chosen[None], zeros, distance=distance)
        return codebook.at[number].set(chosen), jnp.minimum(nearest, jnp.maximum(added, 0.0))

    return lax.fori_loop(1, num_codes, step, (codebook, jnp.maximum(nearest, 0.0)))[0]


def kmeans(
    key: Key[Array, ""],
    x: Float[Array, "vectors dim"],
    *,
    num_codes: int,
    iterations: int = 10,
    distance: str = "euclidean",
    initialization: str = "sample",
) -> KMeans:
    """Lloyd's algorithm; a code that no vector chooses stays where it is.

    With ``cosine`` vectors are normalized and so is every mean (spherical k-means). ``sample``
    starts at vectors drawn without replacement (with it where there are fewer vectors than codes);
    ``plus_plus`` draws each next code in proportion to the distance from those there. A NaN in x
    spreads to the code it is counted under: mask such vectors first. No gradient.

    Raises:
        ValueError: no vectors, fewer than 1 code or iteration, an unknown distance.
        UserError: an unknown initialization.

    Source: Lloyd 1982; Arthur & Vassilvitskii 2007 for ``plus_plus``; as an initialization of
    codebooks Zeghidour et al. 2021 (arXiv 2107.03312), section III-C.
    """
    if x.shape[0] == 0 or num_codes < 1 or iterations < 1:
        raise ValueError(
            f"k-means of {x.shape[0]} vectors into {num_codes=} in {iterations=}: all must be >= 1."
        )
    plus_plus = lookup({"sample": False, "plus_plus": True}, initialization, kind="initialization")
    x = lax.stop_gradient(as_float(x))
    if distance == "cosine":
        x = l2_normalize(x)
    if plus_plus:
        codebook = _plus_plus(key, x, num_codes, distance)
    else:
        codebook = x[_draw(key, x.shape[0], num_codes)]

    def step(carry, _):
        codebook = carry[0]
        indices = kernel.nearest_codes(x, codebook, distance=distance)
        inertia = jnp.mean(kernel.code_distances(x, codebook, indices, distance=distance))
        counts, sums = kernel.code_statistics(x, indices, num_codes)
        means = sums / jnp.maximum(counts, 1.0)[:, None]
        if distance == "cosine":
            means = l2_normalize(means)
        codebook = jnp.where(counts[:, None] > 0, means, codebook)
        return (codebook, CodebookStatistics(counts, sums), inertia), None

    statistics = CodebookStatistics(jnp.zeros(num_codes, x.dtype), jnp.zeros_like(codebook))
    initial = (codebook, statistics, jnp.zeros((), x.dtype))
    return KMeans(*lax.scan(step, initial, length=iterations)[0])


def dead_codes(statistics: CodebookStatistics, *, threshold: float = 2.0) -> Bool[Array, " codes"]:
    """Returns which codes' running count lies below ``threshold``."""
    return statistics.cluster_size < threshold


def revive_dead_codes(
    key: Key[Array, ""],
    codebook: Float[Array, "codes dim"],
    statistics: CodebookStatistics,
    z: Float[Array, "*batch dim"],
    *,
    threshold: float = 2.0,
    reset_size: float | None = None,
    distance: str = "euclidean",
) -> EmaUpdate:
    """Moves dead codes (``dead_codes``) onto vectors drawn from the batch without replacement.

    A revived code's running count becomes ``reset_size`` (the threshold by default). Where more
    codes are dead than there are vectors, a random choice of them is revived and the rest wait. The
    same key gives the same answer however z is sharded. No gradient.

    Source: Dhariwal et al. 2020 (Jukebox, arXiv 2005.00341), random restarts; threshold and reset
    as in vector-quantize-pytorch 1.32.0: vector_quantize_pytorch.py, ``expire_codes_``.
    """
    z = lax.stop_gradient(as_float(z)).reshape(-1, z.shape[-1])
    if z.shape[0] == 0:
        return EmaUpdate(as_float(codebook), statistics)
    if distance == "cosine":
        z = l2_normalize(z)
    vector_key, code_key = jax.random.split(key)
    dead = dead_codes(statistics, threshold=threshold)
    # Dead codes come first in a random order; the r-th of them takes the r-th drawn vector.
    priority = jnp.where(dead, jax.random.uniform(code_key, dead.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(priority))
    revived = dead & (rank < z.shape[0])
    drawn = jax.random.permutation(vector_key, z.shape[0])
    vectors = z[drawn[jnp.minimum(rank, z.shape[0] - 1)]]
    size = threshold if reset_size is None else reset_size
    return EmaUpdate(
        jnp.where(revived[:, None], vectors, as_float(codebook)),
        CodebookStatistics(
            jnp.where(revived, size, statistics.cluster_size),
            jnp.where(revived[:, None], vectors * size, statistics.embed_avg),
        ),
    )
