"""The Wasserstein codebook term, against a linear program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from repalign.quantizers.wasserstein import wasserstein_codebook

_KEYS = jax.random.split(jax.random.key(0), 3)
Z = jax.random.normal(_KEYS[0], (8, 2))
CODEBOOK = jax.random.normal(_KEYS[1], (5, 2))
LOGITS = jax.random.normal(_KEYS[2], (5,))


def _exact(z, codebook, weights):
    """The optimal transport cost by linear programming in float64."""
    cost = np.sum(np.square(z[:, None] - codebook[None]), axis=2)
    rows, columns = cost.shape
    marginals = np.concatenate(
        [np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))]
    ).reshape(rows + columns, -1)
    target = np.concatenate([np.full(rows, 1 / rows), weights])
    return linprog(cost.ravel(), A_eq=marginals, b_eq=target).fun


def test_loss_tends_to_the_exact_transport_cost():
    term = jax.jit(partial(wasserstein_codebook, epsilon=0.03, iterations=1000))
    weights = np.asarray(jax.nn.softmax(LOGITS), np.float64)
    exact = _exact(
        np.asarray(Z, np.float64), np.asarray(CODEBOOK, np.float64), weights / weights.sum()
    )
    result = term(Z, CODEBOOK, LOGITS)
    # The entropic cost exceeds the exact one by at most epsilon * mutual information.
    gap = float(jnp.mean(result.loss)) - exact
    assert -1e-3 * exact <= gap <= 0.03 * np.log(5) + 1e-3 * exact
    np.testing.assert_allclose(result.kl, np.sum(weights * np.log(weights)) + np.log(5), rtol=1e-4)


def test_gradient_is_that_of_the_optimal_cost_and_moves_unchosen_codes():
    codebook = CODEBOOK.at[4].set(jnp.asarray([8.0, 8.0]))  # nearest to no vector

    @jax.jit
    def value(codebook):
        return jnp.mean(
            wasserstein_codebook(Z, codebook, jnp.zeros(5), epsilon=0.5, iterations=300).loss
        )

    gradient = np.asarray(jax.jit(jax.grad(value))(codebook))
    assert np.linalg.norm(gradient[4]) > 0.1
    step = 1e-2
    for code, axis in ((0, 0), (4, 1)):
        shift = jnp.zeros_like(codebook).at[code, axis].set(step)
        difference = (value(codebook + shift) - value(codebook - shift)) / (2 * step)
        np.testing.assert_allclose(gradient[code, axis], difference, rtol=2e-3, atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="epsilon"):
        wasserstein_codebook(Z, CODEBOOK, LOGITS, epsilon=0.0, iterations=1)
    with pytest.raises(ValueError, match="project z"):
        wasserstein_codebook(Z, CODEBOOK[:, :1], LOGITS, epsilon=1.0, iterations=1)
