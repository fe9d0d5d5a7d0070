"""How similar two representations of the same N examples are.

Kernel alignment (CKA), neighbourhood alignment (mutual kNN, cycle kNN, CKNNA), canonical
correlation (SVCCA) and representational similarity analysis (RSA). Everything is a pure function of
two feature matrices whose rows are paired. No function normalises its inputs; the platonic
representation and REPA measurements pass L2-normalised features.

The reference implementation of the first two groups is
minyoungg/platonic-rep@dcd76ba:metrics.py:23-271.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import rankdata

from repalign import numerics
from repalign.kernels import neighbors
from repalign.latent_maps.subspace import canonical_subspaces
from repalign.registry import lookup
from repalign.typing import Array, Bool, Float, Int, Num, Scalar

CONVENTIONS = {"unbiased": True, "biased": True, "biased_with_self": False}
"""CKNNA's conventions; whether an example is left out of its own neighbours."""


@functools.partial(jax.jit, static_argnames=("kernel", "sigma", "epsilon"))
def cka(
    a: Num[Array, "batch dim_a"],
    b: Num[Array, "batch dim_b"],
    *,
    kernel: str = "linear",
    sigma: float = 1.0,
    epsilon: float = 1e-6,
) -> Scalar:
    """Centred kernel alignment, ``HSIC(K, L) / (sqrt(HSIC(K, K) HSIC(L, L)) + epsilon)``.

    With ``HSIC(K, L) = tr(K H L H)``, ``H = I - 11'/N``. In [0, 1]. The kernels are inner products,
    or ``exp(-|x - y|^2 / (2 sigma^2))``. The linear kernel with more examples than dimensions takes
    the equal form ``|A_c' B_c|_F^2``, which needs no N x N matrix; everything else holds some.

    Kornblith et al. 2019 (Similarity of Neural Network Representations Revisited). The
    ``epsilon`` is platonic-rep's.

    Raises:
        UserError: an unknown kernel.
    """
    return _kernel_alignment(
        a, b, kernel=kernel, sigma=sigma, epsilon=epsilon, unbiased=False, least_examples=2
    )


@functools.partial(jax.jit, static_argnames=("kernel", "sigma", "epsilon"))
def unbiased_cka(
    a: Num[Array, "batch dim_a"],
    b: Num[Array, "batch dim_b"],
    *,
    kernel: str = "linear",
    sigma: float = 1.0,
    epsilon: float = 1e-6,
) -> Scalar:
    """``cka`` with the unbiased estimator of HSIC, which ignores the kernels' diagonals.

    About 0 for independent representations at any N and width, where the biased form tends to 1 as
    width grows past N; may be slightly negative.

    Song et al. 2012 (Feature Selection via Dependence Maximization).

    Raises:
        UserError: an unknown kernel.
        ValueError: fewer than 4 examples.
    """
    return _kernel_alignment(
        a, b, kernel=kernel, sigma=sigma, epsilon=epsilon, unbiased=True, least_examples=4
    )


@functools.partial(jax.jit, static_argnames=("topk",))
def mutual_knn(a: Num[Array, "batch dim_a"], b: Num[Array, "batch dim_b"], *, topk: int) -> Scalar:
    """Mean share of an example's k nearest neighbours on which both representations agree.

    ``mean_i |kNN_a(i) & kNN_b(i)| / k`` by inner product, the example itself excluded; in [0, 1].

    Huh et al. 2024 (The Platonic Representation Hypothesis), Appendix A.
    """
    shared = _membership(_neighbors(a, topk).indices, _neighbors(b, topk).indices)
    return jnp.mean(shared.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("topk",))
def cycle_knn(a: Num[Array, "batch dim_a"], b: Num[Array, "batch dim_b"], *, topk: int) -> Scalar:
    """Share of examples found again among the a-neighbours of their own b-neighbours.

    ``mean_i [i in union of kNN_a(j) over j in kNN_b(i)]``; in [0, 1], not symmetric in a and b.
    """
    of_a, of_b = _neighbors(a, topk).indices, _neighbors(b, topk).indices
    return jnp.mean(jnp.any(_returns(of_b, of_a), axis=1).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("topk", "hsic", "epsilon"))
def cknna(
    a: Num[Array, "batch dim_a"],
    b: Num[Array, "batch dim_b"],
    *,
    topk: int,
    hsic: str = "unbiased",
    epsilon: float = 1e-6,
) -> Scalar:
    """Centred kernel nearest-neighbour alignment: CKA over the pairs that are neighbours in both.

    ``Align(K, L) / (sqrt(Align(K, K) Align(L, L)) + epsilon)`` for linear kernels K and L, where
    Align sees only the pairs (i, j) with ``j in kNN_a(i) & kNN_b(i)``; 1 for equal representations.
    NaN if a self-alignment is negative (a few neighbours of very unequal size). The convention:

    * ``"unbiased"``: the published code's default. The masked kernels enter the unbiased HSIC.
    * ``"biased"``: what the papers write, ``sum_ij mask_ij (K_ij - mean_l K_il)(L_ij - mean_l
      L_il)``: every row is centred before it is masked, an example is no neighbour of itself.
    * ``"biased_with_self"``: the code's ``unbiased=False``. The kernels' diagonals take part in
      the neighbour search, and the masked kernels enter the biased HSIC.

    Huh et al. 2024, Appendix A; Yu et al. 2025 (REPA), Appendix C.1 (k = 10 there, and 10,000
    images); code at minyoungg/platonic-rep@dcd76ba:metrics.py:180-227. This computes the same from
    the neighbour lists, in O(N k) memory, where the code builds several N x N matrices.

    Raises:
        ValueError: topk below 2, or fewer than 4 examples for the unbiased HSIC.
        UserError: an unknown convention.
    """
    if topk < 2:
        raise ValueError(f"CKNNA needs topk >= 2, got {topk}.")
    exclude_self = lookup(CONVENTIONS, hsic, kind="hsic")
    if hsic == "unbiased":
        _require_examples(a, 4)
    a, b = numerics.as_float(a), numerics.as_float(b)
    of_a = _neighbors(a, topk, exclude_self=exclude_self)
    of_b = _neighbors(b, topk, exclude_self=exclude_self)
    if hsic == "biased":
        # Row i of a linear kernel has the mean <x_i, mean of x>.
        of_a = of_a._replace(values=of_a.values - (a @ jnp.mean(a, axis=0))[:, None])
        of_b = of_b._replace(values=of_b.values - (b @ jnp.mean(b, axis=0))[:, None])

    def align(first: neighbors.Neighbors, second: neighbors.Neighbors) -> Scalar:
        shared, second_values = _look_up(first.indices, second)
        kernel = jnp.where(shared, first.values, 0.0)
        if hsic == "biased":
            return jnp.sum(kernel * second_values)
        return _sparse_hsic(first.indices, kernel, second_values, unbiased=hsic == "unbiased")

    return _ratio(align(of_a, of_b), align(of_a, of_a), align(of_b, of_b), epsilon)


@functools.partial(jax.jit, static_argnames=("components",))
def svcca(
    a: Num[Array, "batch dim_a"], b: Num[Array, "batch dim_b"], *, components: int = 10
) -> Scalar:
    """Mean canonical correlation of the two leading principal subspaces; in [0, 1].

    Each feature is standardised, each matrix reduced to its leading left singular vectors, and the
    canonical correlations of these two orthonormal sets are the singular values of their product.

    Raghu et al. 2017 (SVCCA). platonic-rep takes a randomised SVD and an iterative CCA plus 1e-10
    noise (metrics.py:115-151); here both steps are exact and there is no noise.

    Raises:
        ValueError: components out of range.
    """
    first, second = _standardized(a), _standardized(b)
    subspaces = canonical_subspaces(first, second, components=components, principal=components)
    return jnp.mean(subspaces.correlations)


@functools.partial(jax.jit, static_argnames=("correlation",))
def rsa(
    a: Num[Array, "batch dim_a"], b: Num[Array, "batch dim_b"], *, correlation: str = "spearman"
) -> Scalar:
    """Representational similarity analysis: correlates the two sets of pairwise dissimilarities.

    A dissimilarity is one minus the Pearson correlation of two examples' features; the N(N-1)/2
    pairs are compared by ``"spearman"`` (ranks, ties averaged) or ``"pearson"``. In [-1, 1]. All
    N x N similarities are held.

    Kriegeskorte et al. 2008 (Representational Similarity Analysis).

    Raises:
        UserError: an unknown correlation.
    """
    by_rank = lookup({"spearman": True, "pearson": False}, correlation, kind="correlation")

    def dissimilarities(x: Num[Array, "batch dim"]) -> Float[Array, " pairs"]:
        x = numerics.as_float(x)
        x = numerics.l2_normalize(x - jnp.mean(x, axis=1, keepdims=True))
        pairs = jnp.triu_indices(x.shape[0], k=1)
        values = 1.0 - numerics.inner_products(x, x)[pairs]
        return rankdata(values) if by_rank else values

    first, second = dissimilarities(a), dissimilarities(b)
    return numerics.cosine_similarity(first - jnp.mean(first), second - jnp.mean(second))


def _standardized(x: Num[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    x = numerics.as_float(x)
    deviation = jnp.std(x, axis=0)
    return (x - jnp.mean(x, axis=0)) / jnp.where(deviation > 0, deviation, 1.0)


def _neighbors(
    x: Num[Array, "batch dim"], topk: int, *, exclude_self: bool = True
) -> neighbors.Neighbors:
    return neighbors.top_k(x, x, k=topk, exclude_self=exclude_self)


def _membership(
    first: Int[Array, "batch k"], second: Int[Array, "batch k"]
) -> Bool[Array, "batch k"]:
    """Whether each entry of ``first`` occurs in the same row of ``second``."""
    return jnp.any(first[:, :, None] == second[:, None, :], axis=2)


def _returns(indices: Int[Array, "batch k"], back: Int[Array, "batch k"]) -> Bool[Array, "batch k"]:
    """Whether i is in ``back[j]``, for each i and each j in ``indices[i]``; O(N k) memory."""
    own = jnp.arange(indices.shape[0])[:, None]
    return lax.map(lambda slot: jnp.any(back[slot] == own, axis=1), indices.T).T


def _look_up(
    indices: Int[Array, "batch k"], found: neighbors.Neighbors
) -> tuple[Bool[Array, "batch k"], Float[Array, "batch k"]]:
    """Which of ``indices`` are in ``found``, row by row, and their values there (else 0)."""

    def one(slot: Int[Array, " batch"]) -> tuple[Bool[Array, " batch"], Float[Array, " batch"]]:
        same = found.indices == slot[:, None]
        return jnp.any(same, axis=1), jnp.sum(jnp.where(same, found.values, 0.0), axis=1)

    shared, values = lax.map(one, indices.T)
    return shared.T, values.T


def _sparse_hsic(
    indices: Int[Array, "batch k"],
    first: Float[Array, "batch k"],
    second: Float[Array, "batch k"],
    *,
    unbiased: bool,
) -> Scalar:
    """HSIC of two kernels that are zero outside the same k entries of each row.

    The kernels are not symmetric (j may be a neighbour of i and not the reverse), so the first term
    pairs entry (i, j) with entry (j, i), and row sums differ from column sums.
    """
    count = indices.shape[0]
    own = jnp.arange(count)[:, None]

    def transposed(slot: Int[Array, " batch"]) -> Float[Array, " batch"]:
        return jnp.sum(jnp.where(indices[slot] == own, second[slot], 0.0), axis=1)

    trace = jnp.sum(first * lax.map(transposed, indices.T).T)
    first_rows, second_rows = jnp.sum(first, axis=1), jnp.sum(second, axis=1)
    zeros = jnp.zeros(count, first.dtype)
    first_columns = zeros.at[indices].add(first)
    second_columns = zeros.at[indices].add(second)
    totals = jnp.sum(first_rows) * jnp.sum(second_rows)
    cross = jnp.sum(first_columns * second_rows)
    if unbiased:
        return (trace + totals / ((count - 1) * (count - 2)) - 2.0 * cross / (count - 2)) / (
            count * (count - 3)
        )
    other_cross = jnp.sum(second_columns * first_rows)
    return trace - (cross + other_cross) / count + totals / count**2


def _kernel_alignment(
    a: Num[Array, "batch dim_a"],
    b: Num[Array, "batch dim_b"],
    *,
    kernel: str,
    sigma: float,
    epsilon: float,
    unbiased: bool,
    least_examples: int,
) -> Scalar:
    linear = lookup({"linear": True, "rbf": False}, kernel, kind="kernel")
    _require_examples(a, least_examples)
    a, b = numerics.as_float(a), numerics.as_float(b)
    # Neither form of HSIC sees a shift of the features; without one fewer digits are lost.
    a, b = a - jnp.mean(a, axis=0), b - jnp.mean(b, axis=0)
    if linear and a.shape[0] > max(a.shape[1], b.shape[1]):

        def hsic(x: Float[Array, "batch dim_x"], y: Float[Array, "batch dim_y"]) -> Scalar:
            return _linear_hsic(x, y, unbiased=unbiased)

        # Not negative but for rounding, in the unbiased form of features without variance.
        own_a, own_b = jnp.maximum(hsic(a, a), 0.0), jnp.maximum(hsic(b, b), 0.0)
        return _ratio(hsic(a, b), own_a, own_b, epsilon)

    def centered_gram(x: Float[Array, "batch dim"]) -> Float[Array, "batch batch"]:
        if linear:
            gram = numerics.inner_products(x, x)
        else:
            gram = jnp.exp(-numerics.squared_distances(x, x) / (2.0 * sigma**2))
        return _u_center(gram) if unbiased else _double_center(gram)

    first, second = centered_gram(a), centered_gram(b)
    count = a.shape[0]
    scale = count * (count - 3) if unbiased else 1
    return _ratio(
        jnp.sum(first * second) / scale,
        jnp.sum(first * first) / scale,
        jnp.sum(second * second) / scale,
        epsilon,
    )


def _linear_hsic(
    a: Float[Array, "batch dim_a"], b: Float[Array, "batch dim_b"], *, unbiased: bool
) -> Scalar:
    """HSIC of the inner products of centred features, from their cross-covariance."""
    cross = jnp.matmul(a.T, b, precision=lax.Precision.HIGHEST)
    biased = jnp.sum(jnp.square(cross))
    if not unbiased:
        return biased
    # With the diagonal removed, row i of a centred Gram matrix sums to -|x_i|^2.
    count = a.shape[0]
    norms_a, norms_b = jnp.sum(jnp.square(a), axis=1), jnp.sum(jnp.square(b), axis=1)
    diagonal = jnp.sum(norms_a * norms_b)
    totals = jnp.sum(norms_a) * jnp.sum(norms_b)
    return (
        biased - diagonal + totals / ((count - 1) * (count - 2)) - 2.0 * diagonal / (count - 2)
    ) / (count * (count - 3))


def _double_center(gram: Float[Array, "batch batch"]) -> Float[Array, "batch batch"]:
    means = jnp.mean(gram, axis=1)
    return gram - means[:, None] - means[None, :] + jnp.mean(means)


def _u_center(gram: Float[Array, "batch batch"]) -> Float[Array, "batch batch"]:
    """U-centring (Szekely and Rizzo 2014): the unbiased HSIC is a product of two such matrices."""
    count = gram.shape[0]
    off_diagonal = ~jnp.eye(count, dtype=bool)
    gram = jnp.where(off_diagonal, gram, 0.0)
    sums = jnp.sum(gram, axis=1)
    centered = (
        gram
        - sums[:, None] / (count - 2)
        - sums[None, :] / (count - 2)
        + jnp.sum(sums) / ((count - 1) * (count - 2))
    )
    return jnp.where(off_diagonal, centered, 0.0)


def _ratio(cross: Scalar, first: Scalar, second: Scalar, epsilon: float) -> Scalar:
    # Roots first: the product of two small self-similarities may underflow.
    return cross / (jnp.sqrt(first) * jnp.sqrt(second) + epsilon)


def _require_examples(a: Num[Array, "batch dim"], least: int) -> None:
    if a.shape[0] < least:
        raise ValueError(f"this needs at least {least} examples, got {a.shape[0]}.")
