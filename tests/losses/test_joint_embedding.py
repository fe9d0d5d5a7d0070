import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import joint_embedding
from repalign.losses.regularizers import sigreg, total_coding_rate

RNG = np.random.default_rng(1)
A = RNG.normal(size=(7, 4)).astype(np.float32)
B = (A + 0.5 * RNG.normal(size=(7, 4))).astype(np.float32)
WHERE = np.array([True, True, False, True, False, True, True])

GOLDEN = {
    "barlow_twins": lambda a, b: joint_embedding.barlow_twins(a, b, lambda_param=0.005),
    "vicreg": lambda a, b: joint_embedding.vicreg(a, b, sim=25.0, var=25.0, cov=1.0),
    "tico_first_step": lambda a, b: joint_embedding.tico(
        a, b, jnp.zeros((a.shape[1], a.shape[1])), beta=0.9, rho=20.0
    )[0],
    "negative_cosine": lambda a, b: jnp.mean(joint_embedding.negative_cosine(a, b)),
    "mmcr": lambda a, b: joint_embedding.mmcr(
        jnp.stack([a, 0.9 * a], 1), jnp.stack([b, 0.8 * b], 1), lmda=0.005
    ),
}


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_numbers(golden_losses, name):
    a, b = (jnp.asarray(golden_losses[f"{name}/in/{side}"]) for side in "ab")
    value, gradients = jax.jit(jax.value_and_grad(GOLDEN[name], argnums=(0, 1)))(a, b)
    np.testing.assert_allclose(value, golden_losses[f"{name}/value"], rtol=2e-5)
    for side, gradient in zip("ab", gradients, strict=True):
        expected = golden_losses[f"{name}/grad/{side}"]
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )


MASKED = {
    "barlow_twins": joint_embedding.barlow_twins,
    "vicreg": joint_embedding.vicreg,
    "tico": lambda a, b, where=None: run(joint_embedding.tico, a, b, jnp.eye(4), where=where)[0],
    "mmcr": lambda a, b, where=None: run(joint_embedding.mmcr, a[:, None], b[:, None], where=where),
    "frossl": joint_embedding.frossl,
    "emp_ssl": lambda a, b, where=None: run(
        joint_embedding.emp_ssl, jnp.stack([a, b]), where=where
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_examples_do_not_count(name):
    poisoned = jnp.asarray(np.where(WHERE[:, None], A, np.nan))
    loss = jax.jit(jax.value_and_grad(MASKED[name]))
    value, gradient = loss(poisoned, jnp.asarray(B), where=jnp.asarray(WHERE))
    without = run(MASKED[name], jnp.asarray(A[WHERE]), jnp.asarray(B[WHERE]))
    np.testing.assert_allclose(value, without, rtol=2e-5)
    assert np.all(np.isfinite(gradient[WHERE]))
    assert np.any(gradient[WHERE])


def test_barlow_twins_by_hand():
    def standard(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    correlation = standard(A).T @ standard(B) / len(A)
    off = correlation - np.diag(np.diag(correlation))
    expected = np.sum((np.diag(correlation) - 1) ** 2) + 0.1 * np.sum(off**2)
    result = run(joint_embedding.barlow_twins, jnp.asarray(A), jnp.asarray(B), lambda_param=0.1)
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_vicreg_by_hand():
    expected = 3.0 * np.mean((A - B) ** 2)
    for x in (A, B):
        covariance = np.cov(x.T)
        deviation = np.sqrt(np.diag(covariance) + 1e-4)
        expected += 0.5 * 2.0 * np.mean(np.maximum(1 - deviation, 0))
        expected += 0.7 * (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) / 4
    result = run(joint_embedding.vicreg, jnp.asarray(A), jnp.asarray(B), sim=3.0, var=2.0, cov=0.7)
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_tico_carries_its_covariance_and_names_what_is_detached():
    state = np.cov(RNG.normal(size=(4, 9))).astype(np.float32)
    moment = unit(A).T @ unit(A) / len(A)
    new = 0.8 * state + 0.2 * moment
    expected = (
        1
        - np.mean(np.sum(unit(A) * unit(B), 1))
        + 5.0 * np.mean(np.einsum("nd,de,ne->n", unit(A), new, unit(A)))
    )
    arguments = jnp.asarray(A), jnp.asarray(B), jnp.asarray(state)
    loss, covariance = run(joint_embedding.tico, *arguments, beta=0.8, rho=5.0)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(covariance, new, rtol=2e-5, atol=1e-7)

    def gradient(detach):
        return jax.grad(
            lambda a: run(
                joint_embedding.tico, a, *arguments[1:], beta=0.8, rho=5.0, detach=detach
            )[0]
        )(arguments[0])

    def finite_difference(fixed_moment):
        def loss(a):
            u = unit(a)
            c = 0.8 * state + 0.2 * (moment if fixed_moment else u.T @ u / len(a))
            return -np.mean(np.sum(u * unit(B), 1)) + 5.0 * np.mean(np.sum((u @ c) * u, 1))

        step = np.zeros((7, 4))
        step[2, 1] = 1e-5
        a = A.astype(np.float64)
        return (loss(a + step) - loss(a - step)) / 2e-5

    np.testing.assert_allclose(gradient(True)[2, 1], finite_difference(True), rtol=1e-3)
    np.testing.assert_allclose(gradient(False)[2, 1], finite_difference(False), rtol=1e-3)
    assert abs(finite_difference(True) - finite_difference(False)) > 1e-3


def test_byol_and_simsiam_by_hand_without_gradient_to_the_targets():
    p_a, p_b, z_a, z_b = (RNG.normal(size=(3, 4)).astype(np.float32) for _ in range(4))

    def cosine(x, y):
        return np.sum(unit(x) * unit(y), 1)

    arrays = [jnp.asarray(x) for x in (p_a, p_b, z_a, z_b)]
    np.testing.assert_allclose(
        run(joint_embedding.byol, *arrays),
        4 - 2 * cosine(p_a, z_b) - 2 * cosine(p_b, z_a),
        rtol=2e-5,
    )
    np.testing.assert_allclose(
        run(joint_embedding.simsiam, *arrays), -(cosine(p_a, z_b) + cosine(p_b, z_a)) / 2, rtol=2e-5
    )
    for loss in (joint_embedding.byol, joint_embedding.simsiam):

        def summed(*x, loss=loss):
            return jnp.sum(loss(*x))

        gradients = jax.jit(jax.grad(summed, argnums=(0, 1, 2, 3)))(*arrays)
        assert np.any(gradients[0]) and np.any(gradients[1])
        assert not np.any(gradients[2]) and not np.any(gradients[3])


def test_mmcr_is_a_difference_of_nuclear_norms():
    online = RNG.normal(size=(3, 2, 5)).astype(np.float32)
    momentum = RNG.normal(size=(3, 2, 5)).astype(np.float32)
    views = np.concatenate([online, momentum], 1)

    def nuclear(x):
        return np.linalg.svd(x, compute_uv=False).sum()

    expected = 0.3 * np.mean([nuclear(x) for x in views]) - nuclear(views.mean(1))
    result = run(joint_embedding.mmcr, jnp.asarray(online), jnp.asarray(momentum), lmda=0.3)
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_frossl_is_invariance_minus_two_entropies():
    def standardise(x):
        x = (x - x.mean(0)) / x.std(0, ddof=1)
        return 2.0 * x / np.linalg.norm(x, axis=0)

    a, b = standardise(A), standardise(B)
    expected = 1.5 * np.mean((a - b) ** 2)
    for x in (a, b):
        gram = x @ x.T
        expected += 2 * np.log(np.linalg.norm(gram / np.trace(gram)))
    result = run(joint_embedding.frossl, jnp.asarray(A), jnp.asarray(B), invariance_weight=1.5)
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_emp_ssl_pulls_views_to_their_mean_and_spreads_each_view():
    views = unit(np.stack([A, B, A - B]))
    cosine = np.sum(unit(views) * unit(views.mean(0)), -1).mean()
    rate = np.mean([0.5 * np.linalg.slogdet(np.eye(4) + 4 / (7 * 0.2) * v.T @ v)[1] for v in views])
    result = run(joint_embedding.emp_ssl, jnp.asarray(views), invariance_weight=10.0)
    np.testing.assert_allclose(result, -10.0 * cosine - rate, rtol=2e-5)
    np.testing.assert_allclose(
        np.mean([run(total_coding_rate, jnp.asarray(v)) for v in views]), rate, rtol=2e-5
    )


def test_lejepa_mixes_invariance_and_gaussianity():
    views, key = jnp.asarray(np.stack([A, B])), jax.random.key(5)
    invariance = np.mean((views - views.mean(0)) ** 2)
    gaussian = np.mean([run(sigreg, v, key, num_slices=16) for v in views])
    result = run(joint_embedding.lejepa, views, key, weight=0.3, num_slices=16)
    np.testing.assert_allclose(result, 0.7 * invariance + 0.3 * gaussian, rtol=2e-5)


def test_transform_prediction_is_the_cross_entropy_of_the_label():
    labels = np.array([0, 1, 2, 3, 0, 1, 2], np.int32)
    expected = np.log(np.exp(A).sum(1)) - A[np.arange(7), labels]
    result = run(joint_embedding.transform_prediction, jnp.asarray(A), jnp.asarray(labels))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
