import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import regularizers

RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 4)).astype(np.float32)
WHERE = np.array([True, True, False, True, False, True])


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest_distances(x):
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.min(1)


def test_koleo_against_reference_numbers(golden_losses):
    x = jnp.asarray(golden_losses["koleo/in/a"])
    value, gradient = jax.jit(jax.value_and_grad(regularizers.koleo))(x)
    np.testing.assert_allclose(value, golden_losses["koleo/value"], rtol=2e-5)
    expected = golden_losses["koleo/grad/a"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_koleo_looks_for_neighbours_in_blocks_above_8192_examples():
    count = 8256
    x = RNG.normal(size=(count, 3)).astype(np.float32)
    step = jax.jit(jax.value_and_grad(regularizers.koleo)).lower(jnp.asarray(x)).compile()
    # One square matrix of similarities would be 4 * 8256^2 = 273 MB.
    assert step.memory_analysis().temp_size_in_bytes < 2 * 4 * 1024 * count
    value, gradient = step(jnp.asarray(x))
    sphere = unit(x.astype(np.float64))
    from scipy.spatial import cKDTree

    distance = cKDTree(sphere).query(sphere, k=2)[0][:, 1]
    np.testing.assert_allclose(value, -np.log(distance + 1e-8).mean(), rtol=1e-3)
    assert np.all(np.isfinite(gradient))


def test_duplicates_cost_a_finite_amount_in_koleo():
    twice = np.concatenate([X, X])
    value, gradient = jax.jit(jax.value_and_grad(regularizers.koleo))(jnp.asarray(twice))
    np.testing.assert_allclose(value, -np.log(1e-8), rtol=1e-6)
    assert not np.any(gradient)


def coding_rate(x, epsilon):
    return 0.5 * np.linalg.slogdet(np.eye(4) + 4 / (len(x) * epsilon) * x.T @ x)[1]


def entropy(x):
    eigenvalues = np.linalg.svd(unit(x), compute_uv=False) ** 2 / len(x)
    return -np.sum(eigenvalues * np.log(eigenvalues))


def dispersion(x, temperature):
    squared = np.sum((x[:, None] - x[None]) ** 2, -1) / x.shape[1]
    return np.log(np.mean(np.exp(-squared / temperature)))


@pytest.mark.parametrize(
    "loss, reference",
    [
        (regularizers.koleo, lambda x: -np.log(nearest_distances(unit(x))).mean()),
        (regularizers.von_neumann_entropy, entropy),
        (
            functools.partial(regularizers.total_coding_rate, epsilon=0.3),
            lambda x: coding_rate(x, 0.3),
        ),
        (functools.partial(regularizers.dispersive, temperature=0.5), lambda x: dispersion(x, 0.5)),
    ],
    ids=["koleo", "von_neumann_entropy", "total_coding_rate", "dispersive"],
)
def test_by_hand_with_and_without_masked_examples(loss, reference):
    np.testing.assert_allclose(run(loss, jnp.asarray(X)), reference(X), rtol=2e-5)
    poisoned = jnp.asarray(np.where(WHERE[:, None], X, np.nan))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, where=jnp.asarray(WHERE))))(
        poisoned
    )
    np.testing.assert_allclose(value, reference(X[WHERE]), rtol=2e-5)
    assert np.all(np.isfinite(gradient[WHERE])) and np.any(gradient[WHERE])


def test_von_neumann_entropy_of_one_direction_and_of_a_basis():
    basis = jnp.asarray(np.concatenate([np.eye(4), -2 * np.eye(4)]), jnp.float32)
    np.testing.assert_allclose(run(regularizers.von_neumann_entropy, basis), np.log(4), rtol=1e-6)
    line = jnp.asarray(np.outer(np.arange(1.0, 9.0), np.ones(4)), jnp.float32)
    value, gradient = jax.value_and_grad(regularizers.von_neumann_entropy)(line)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_sigreg_integrates_the_distance_of_characteristic_functions():
    key = jax.random.key(1)
    directions = unit(np.asarray(jax.random.normal(key, (5, 4)), np.float64))
    t = np.linspace(-3, 3, 33)
    empirical = np.exp(1j * t[:, None, None] * (X @ directions.T)).mean(1)
    normal = np.exp(-(t**2) / 2)
    integrand = np.abs(empirical - normal[:, None]) ** 2 * normal[:, None]
    expected = len(X) * np.trapezoid(integrand, t, axis=0).mean()
    result = run(regularizers.sigreg, jnp.asarray(X), key, num_slices=5)
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    kept = run(regularizers.sigreg, jnp.asarray(X), key, num_slices=5, where=jnp.asarray(WHERE))
    alone = run(regularizers.sigreg, jnp.asarray(X[WHERE]), key, num_slices=5)
    np.testing.assert_allclose(kept, alone, rtol=2e-5)


def test_sigreg_prefers_an_isotropic_gaussian():
    gaussian = RNG.normal(size=(256, 4)).astype(np.float32)

    def score(x):
        return run(regularizers.sigreg, jnp.asarray(x), jax.random.key(2), num_slices=32)

    assert score(gaussian) < 0.2 * score(3 * gaussian)
    assert score(gaussian) < 0.2 * score(gaussian * np.float32([1, 1, 1, 0]))
    assert score(gaussian) < 0.2 * score(gaussian + 1)


def test_dispersive_flattens_and_is_bounded():
    maps = RNG.normal(size=(5, 2, 3)).astype(np.float32)
    flat = run(regularizers.dispersive, jnp.asarray(maps.reshape(5, 6)))
    np.testing.assert_allclose(run(regularizers.dispersive, jnp.asarray(maps)), flat, rtol=1e-6)
    far = run(regularizers.dispersive, jnp.asarray(1e3 * maps))
    np.testing.assert_allclose(far, -np.log(5), rtol=1e-5)
