import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsClassifier

from repalign.metrics import probes
from repalign.registry import UserError

CLASSES = 4


def classification(count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Overlapping classes in badly scaled, correlated features, one of them constant."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(0).normal(size=(CLASSES, 8))
    mix = np.random.default_rng(1).normal(size=(8, 8)) * np.logspace(-1, 2, 8)
    labels = rng.integers(CLASSES, size=count)
    features = (means[labels] + rng.normal(size=(count, 8))) @ mix
    features[:, 5] = 3.0
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels)


@pytest.fixture(scope="module")
def sets() -> tuple[jax.Array, ...]:
    return *classification(400, seed=2), *classification(150, seed=3)


def test_linear_classifier_is_the_optimum_that_scikit_learn_finds(sets):
    features, labels, test_features, test_labels = sets
    l2 = 1e-3
    ours = probes.fit_linear_classifier(features, labels, classes=CLASSES, l2=l2)
    standardized = np.asarray(ours.standardization(features), np.float64)
    theirs = LogisticRegression(C=1.0 / (len(labels) * l2), tol=1e-8, max_iter=2000)
    theirs.fit(standardized, labels)
    np.testing.assert_allclose(ours.weights, theirs.coef_.T, atol=2e-3)
    # The bias is defined up to a constant.
    bias = ours.bias - jnp.mean(ours.bias)
    np.testing.assert_allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)
    # The memory of past steps works: with one step of memory 30 are too few.
    early = probes.fit_linear_classifier(features, labels, classes=CLASSES, l2=l2, iterations=30)
    np.testing.assert_allclose(early.weights, ours.weights, atol=2e-3)
    accuracy = probes.linear_probe(*sets, classes=CLASSES, l2=l2)
    expected = theirs.score(np.asarray(ours.standardization(test_features)), test_labels)
    np.testing.assert_allclose(accuracy, expected, atol=1.0 / 150)
    assert 0.5 < accuracy < 0.95


def test_linear_probe_on_separable_classes_is_perfect_and_finite():
    labels = jnp.arange(400) % CLASSES
    features = jax.nn.one_hot(labels, 8)
    classifier = probes.fit_linear_classifier(features, labels, classes=CLASSES)
    assert jnp.all(jnp.isfinite(classifier.weights))
    assert probes.linear_probe(features, labels, features, labels, classes=CLASSES) == 1.0


def test_linear_probe_maps_over_replicas_and_repeats_exactly(sets):
    def probe(scale: jax.Array) -> jax.Array:
        features, labels, test_features, test_labels = sets
        return probes.linear_probe(
            scale * features, labels, scale * test_features, test_labels, classes=CLASSES
        )

    # Standardisation takes the scale away, so each replica is the same problem.
    mapped = jax.vmap(probe)(jnp.array([1.0, 10.0]))
    single = probes.linear_probe(*sets, classes=CLASSES)
    np.testing.assert_allclose(mapped, jnp.stack([single, single]), atol=1.5 / 150)
    assert single == probes.linear_probe(*sets, classes=CLASSES)


def test_knn_probe_agrees_with_scikit_learn(sets):
    features, labels, test_features, test_labels = sets
    for weighting, weights in (
        ("majority", "uniform"),
        ("exponential", lambda distance: np.exp((1.0 - distance) / 0.07)),
    ):
        model = KNeighborsClassifier(n_neighbors=7, metric="cosine", weights=weights)
        expected = model.fit(features, labels).score(test_features, test_labels)
        accuracy = probes.knn_probe(*sets, classes=CLASSES, k=7, weighting=weighting)
        np.testing.assert_allclose(accuracy, expected, rtol=1e-6)
    with pytest.raises(UserError, match="exponential, majority"):
        probes.knn_probe(*sets, classes=CLASSES, weighting="uniform")


def test_exponential_votes_do_not_overflow():
    # exp(similarity / temperature) is infinite for both neighbours; the nearer one wins.
    train, query = jnp.array([[0.8, 0.6], [1.0, 0.0]]), jnp.array([[1.0, 0.0]])
    accuracy = probes.knn_probe(
        train, jnp.array([0, 1]), query, jnp.array([1]), classes=2, k=2, temperature=1e-3
    )
    assert accuracy == 1.0


def test_ridge_probe_agrees_with_scikit_learn(sets):
    features, _, test_features, _ = sets
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 2)) / np.asarray(jnp.std(features, axis=0) + 1.0)[:, None]
    targets, test_targets = (
        np.asarray(x) @ weights + rng.normal(size=(len(x), 2)) for x in (features, test_features)
    )
    l2 = 0.01
    standardize = probes.standardization(features)
    model = Ridge(alpha=len(features) * l2).fit(np.asarray(standardize(features)), targets)
    prediction = model.predict(np.asarray(standardize(test_features)))
    expected = r2_score(test_targets, prediction, multioutput="raw_values")
    measured = probes.ridge_probe(
        features, jnp.asarray(targets), test_features, jnp.asarray(test_targets), l2=l2
    )
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-5)
