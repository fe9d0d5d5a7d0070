import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.cross_decomposition import CCA

from repalign.metrics import similarity
from repalign.registry import UserError


def paired_features(count: int, dim_a: int, dim_b: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Two representations that share half of their variance."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(count, 5))
    a = shared @ rng.normal(size=(5, dim_a)) + 2.0 * rng.normal(size=(count, dim_a))
    b = shared @ rng.normal(size=(5, dim_b)) + 2.0 * rng.normal(size=(count, dim_b))
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def knn_mask(kernel: np.ndarray, k: int, *, exclude_self: bool) -> np.ndarray:
    kernel = kernel.copy()
    if exclude_self:
        np.fill_diagonal(kernel, -np.inf)
    mask = np.zeros_like(kernel)
    np.put_along_axis(mask, np.argsort(-kernel, axis=1)[:, :k], 1.0, axis=1)
    return mask


def dense_hsic(first: np.ndarray, second: np.ndarray, *, unbiased: bool) -> float:
    count = len(first)
    if not unbiased:
        center = np.eye(count) - 1.0 / count
        return np.trace(first @ center @ second @ center)
    first, second = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    value = np.trace(first @ second)
    value += first.sum() * second.sum() / ((count - 1) * (count - 2))
    value -= 2.0 * (first @ second).sum() / (count - 2)
    return value / (count * (count - 3))


def dense_cknna(a: jax.Array, b: jax.Array, k: int, convention: str) -> float:
    """The definition with N x N matrices in float64."""
    kernels = [np.asarray(x, np.float64) @ np.asarray(x, np.float64).T for x in (a, b)]
    exclude_self = convention != "biased_with_self"
    masks = [knn_mask(kernel, k, exclude_self=exclude_self) for kernel in kernels]

    def align(i: int, j: int) -> float:
        mask = masks[i] * masks[j]
        if convention == "biased":
            centered = [kernel - kernel.mean(axis=1, keepdims=True) for kernel in kernels]
            return np.sum(mask * centered[i] * centered[j])
        return dense_hsic(mask * kernels[i], mask * kernels[j], unbiased=convention == "unbiased")

    return align(0, 1) / (np.sqrt(align(0, 0) * align(1, 1)) + 1e-6)


@pytest.mark.parametrize(
    "name", ["cknna", "mutual_knn", "cycle_knn", "cka", "unbiased_cka", "cka_rbf"]
)
def test_agrees_with_the_platonic_code(golden_losses, name):
    a, b = (jnp.asarray(golden_losses[f"alignment/in/{side}"]) for side in "AB")
    calls = {
        "cknna": functools.partial(similarity.cknna, topk=5),
        "mutual_knn": functools.partial(similarity.mutual_knn, topk=5),
        "cycle_knn": functools.partial(similarity.cycle_knn, topk=5),
        "cka": similarity.cka,
        "unbiased_cka": similarity.unbiased_cka,
        "cka_rbf": functools.partial(similarity.cka, kernel="rbf", sigma=0.8),
    }
    np.testing.assert_allclose(calls[name](a, b), golden_losses[f"alignment/{name}"], rtol=2e-5)


@pytest.mark.parametrize(
    ("convention", "topk"),
    [("unbiased", 4), ("unbiased", 30), ("biased", 8), ("biased_with_self", 8)],
)
def test_cknna_from_neighbour_lists_equals_the_dense_definition(convention, topk):
    a, b = paired_features(40, 12, 7)
    np.testing.assert_allclose(
        similarity.cknna(a, b, topk=topk, hsic=convention),
        dense_cknna(a, b, topk, convention),
        rtol=2e-5,
    )


def test_cknna_with_all_neighbours_is_unbiased_cka():
    a, b = paired_features(20, 6, 9)
    np.testing.assert_allclose(
        similarity.cknna(a, b, topk=19), similarity.unbiased_cka(a, b), rtol=2e-5
    )


def test_cknna_of_a_representation_with_itself_is_one_and_conventions_differ():
    a, b = paired_features(30, 8, 8)
    for convention in similarity.CONVENTIONS:
        np.testing.assert_allclose(
            similarity.cknna(a, 3.0 * a, topk=8, hsic=convention), 1.0, rtol=1e-5
        )
    values = [float(similarity.cknna(a, b, topk=8, hsic=c)) for c in similarity.CONVENTIONS]
    assert len({round(value, 3) for value in values}) == 3


@pytest.mark.parametrize("function", [similarity.cka, similarity.unbiased_cka])
def test_feature_space_and_gram_forms_agree(function):
    a, b = paired_features(24, 6, 10)  # more examples than dimensions: the feature-space form
    a, b = a + 5.0, b - 3.0  # neither sees a shift
    wide = jnp.pad(b, ((0, 0), (0, 30)))  # the same kernel with more dimensions: the Gram form
    unbiased = function is similarity.unbiased_cka
    grams = [np.asarray(x, np.float64) @ np.asarray(x, np.float64).T for x in (a, b)]
    expected = dense_hsic(*grams, unbiased=unbiased) / np.sqrt(
        dense_hsic(grams[0], grams[0], unbiased=unbiased)
        * dense_hsic(grams[1], grams[1], unbiased=unbiased)
    )
    np.testing.assert_allclose(function(a, b), expected, rtol=5e-5)
    np.testing.assert_allclose(function(a, wide), expected, rtol=5e-5)


def test_linear_cka_of_many_examples_needs_no_square_matrix():
    count, dim = 4096, 8
    shape = jax.ShapeDtypeStruct((count, dim), jnp.float32)
    memory = jax.jit(similarity.cka).lower(shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * count * dim * 4


def test_unbiased_cka_is_near_zero_for_independent_wide_features():
    a, b = (jax.random.normal(jax.random.key(seed), (32, 256)) for seed in (0, 1))
    assert abs(similarity.unbiased_cka(a, b)) < 0.1
    assert similarity.cka(a, b) > 0.8


def test_mutual_and_cycle_knn_on_a_worked_example():
    # On the unit circle, inner products order the points by angle.
    def circle(*degrees: float) -> jax.Array:
        angles = jnp.deg2rad(jnp.asarray(degrees))
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)

    a = circle(0, 10, 90, 105)  # nearest: 1, 0, 3, 2
    b = circle(0, 90, 10, 100)  # nearest: 2, 3, 0, 1
    assert similarity.mutual_knn(a, b, topk=1) == 0.0
    assert similarity.mutual_knn(a, a, topk=1) == 1.0
    # i -> b-neighbour -> its a-neighbour: 0 -> 2 -> 3, 1 -> 3 -> 2, 2 -> 0 -> 1, 3 -> 1 -> 0.
    assert similarity.cycle_knn(a, b, topk=1) == 0.0
    # A cycle through one space alone returns where the neighbour relation is mutual.
    assert similarity.cycle_knn(a, a, topk=1) == 1.0


def test_svcca_agrees_with_an_iterative_cca_and_sees_no_rotation_or_scale():
    a, b = paired_features(60, 8, 6)
    components = 3

    def principal(x: jax.Array) -> np.ndarray:
        x = np.asarray(x, np.float64)
        x = (x - x.mean(0)) / x.std(0)
        return np.linalg.svd(x, full_matrices=False)[0][:, :components]

    model = CCA(n_components=components, max_iter=5000, tol=1e-10)
    u, v = model.fit_transform(principal(a), principal(b))
    expected = np.mean([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(components)])
    np.testing.assert_allclose(similarity.svcca(a, b, components=components), expected, rtol=1e-4)
    np.testing.assert_allclose(similarity.svcca(a, 2.0 * a, components=5), 1.0, rtol=1e-5)


@pytest.mark.parametrize("correlation", ["spearman", "pearson"])
def test_rsa_agrees_with_scipy(correlation):
    a, b = paired_features(18, 7, 9)
    pairs = np.triu_indices(18, k=1)
    first, second = ((1.0 - np.corrcoef(np.asarray(x, np.float64)))[pairs] for x in (a, b))
    statistic = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[correlation]
    np.testing.assert_allclose(
        similarity.rsa(a, b, correlation=correlation), statistic(first, second)[0], rtol=1e-4
    )


def test_a_collapsed_representation_is_similar_to_nothing():
    _, b = paired_features(24, 6, 6)
    for function in (similarity.cka, similarity.unbiased_cka):
        np.testing.assert_allclose(function(0.1 * jnp.ones_like(b), b), 0.0, atol=1e-3)


def test_mistakes_are_named():
    a, b = paired_features(12, 4, 4)
    with pytest.raises(ValueError, match="topk >= 2"):
        similarity.cknna(a, b, topk=1)
    with pytest.raises(UserError, match="biased, biased_with_self, unbiased"):
        similarity.cknna(a, b, topk=3, hsic="none")
    with pytest.raises(UserError, match="linear, rbf"):
        similarity.cka(a, b, kernel="cosine")
    with pytest.raises(ValueError, match="at least 4 examples"):
        similarity.unbiased_cka(a[:3], b[:3])
    with pytest.raises(ValueError, match="components = 5"):
        similarity.svcca(a, b, components=5)
    with pytest.raises(UserError, match="pearson, spearman"):
        similarity.rsa(a, b, correlation="kendall")
