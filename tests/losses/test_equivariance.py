import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import equivariance
from repalign.registry import UserError

RNG = np.random.default_rng(3)


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*map(jnp.asarray, arrays))


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_sie_is_its_formula():
    inv_a, inv_b = draw(7, 3), draw(7, 3)
    eq_a, eq_b, predicted = 0.2 * draw(7, 2), draw(7, 2), 0.3 * draw(7, 2)
    value = run(
        equivariance.split_invariant_equivariant,
        *(inv_a, inv_b, eq_a, eq_b, predicted),
        sim=2.0,
        equivariance=3.0,
        var=5.0,
        cov=7.0,
    )

    def hinge(x):
        return np.mean(np.maximum(0.0, 1.0 - np.sqrt(np.var(x, axis=0, ddof=1) + 1e-4))) / 2

    def off_diagonal(x):
        matrix = np.cov(x.T)
        return (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / len(matrix)

    x, y = np.concatenate([inv_a, eq_a], 1), np.concatenate([inv_b, eq_b], 1)
    expected = (
        2.0 * np.mean((inv_a - inv_b) ** 2)
        + 6.0 * np.mean((predicted - eq_b) ** 2)
        + 5.0 * (hinge(x) + hinge(y) + hinge(predicted))
        + 7.0 * (off_diagonal(x) + off_diagonal(y))
    )
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_sie_leaves_masked_examples_out():
    arrays = [draw(6, 3) for _ in range(5)]
    where = np.array([True, True, False, True, True, True])
    masked = run(equivariance.split_invariant_equivariant, *arrays, where=jnp.asarray(where))
    kept = run(equivariance.split_invariant_equivariant, *(x[where] for x in arrays))
    np.testing.assert_allclose(masked, kept, rtol=2e-5)


def test_orthogonal_equivariance_is_its_formula_and_the_released_one_scaled():
    a, b = draw(6, 4), draw(6, 4)
    value = run(equivariance.orthogonal_equivariance, a, b)
    expected = [
        np.mean([(a[i] @ a[j] - b[i] @ b[j]) ** 2 for j in range(6) if j != i]) for i in range(6)
    ]
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    # The released loss: twice the mean, over rows, of each row's squared norm off the diagonal.
    difference = a @ a.T - b @ b.T
    np.fill_diagonal(difference, 0.0)
    released = 2 * np.mean(np.linalg.norm(difference, axis=1) ** 2)
    np.testing.assert_allclose(2 * 5 * np.mean(value), released, rtol=2e-5)


def test_orthogonal_equivariance_vanishes_for_a_rotation_only():
    a = draw(5, 4)
    rotation = np.linalg.qr(draw(4, 4))[0]
    np.testing.assert_allclose(
        run(equivariance.orthogonal_equivariance, a, a @ rotation), 0.0, atol=1e-9
    )
    assert np.all(run(equivariance.orthogonal_equivariance, a, a + 1.0) > 1e-3)
    assert run(equivariance.orthogonal_equivariance, a[:1], a[1:2]) == 0.0


@pytest.mark.parametrize("hinge", ["vector", "element"])
def test_counting_is_its_formula(hinge):
    whole, tiles, other = draw(5, 3), draw(5, 4, 3), 2.0 * draw(5, 3)
    total = tiles.sum(1)
    same, different = (whole - total) ** 2, (other - total) ** 2
    margin = float(np.median(different.sum(1))) + 0.1  # both sides of the hinge
    value = run(equivariance.counting, whole, tiles, other, margin=margin, hinge=hinge)
    if hinge == "vector":
        expected = same.sum(1) + np.maximum(0.0, margin - different.sum(1))
    else:
        expected = same.mean(1) + np.maximum(0.0, margin - different).mean(1)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_counting_names_a_wrong_hinge():
    with pytest.raises(UserError, match="hinge 'vectors'.*vector"):
        equivariance.counting(
            jnp.ones((2, 3)), jnp.ones((2, 4, 3)), jnp.ones((2, 3)), hinge="vectors"
        )
