import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from repalign.losses import disentangle
from repalign.registry import UserError

RNG = np.random.default_rng(10)
MEAN, LOG_VARIANCE, NOISE = RNG.normal(size=(3, 6, 4)).astype(np.float32)
Z = MEAN + np.exp(LOG_VARIANCE / 2) * NOISE


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


@pytest.mark.parametrize("sampling", ["weighted", "stratified"])
def test_decompose_kl_by_hand(sampling):
    batch, total = 6, 50
    if sampling == "weighted":
        weights = np.full((batch, batch), 1 / (batch * total))
    else:
        weights = np.full((batch, batch), 1 / (batch - 1))
        for j in range(batch):
            weights[j, j] = 1 / total
            weights[j, (j + 1) % batch] = (total - batch + 1) / (total * (batch - 1))
        np.testing.assert_allclose(weights.sum(1), 1.0)
    pairs = stats.norm.logpdf(Z[:, None], MEAN[None], np.exp(LOG_VARIANCE / 2)[None])
    log_qz = special.logsumexp(pairs.sum(2), axis=1, b=weights)
    log_product = special.logsumexp(pairs, axis=1, b=weights[..., None]).sum(1)
    log_conditional = np.einsum("jjd->j", pairs)
    log_prior = stats.norm.logpdf(Z).sum(1)
    result = run(
        disentangle.decompose_kl,
        *map(jnp.asarray, (Z, MEAN, LOG_VARIANCE)),
        dataset_size=total,
        sampling=sampling,
    )
    expected = log_conditional - log_qz, log_qz - log_product, log_product - log_prior
    for value, reference in zip(result, expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-5)


def test_decompose_kl_holds_no_array_over_pairs_and_dimensions():
    shape = jax.ShapeDtypeStruct((64, 256), jnp.float32)

    def total(*x):
        return jnp.sum(disentangle.decompose_kl(*x, dataset_size=1000)[1])

    memory = jax.jit(jax.grad(total)).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 64 * 64 * 256 / 2 + 4 * 64 * 256 * 20


def test_decompose_kl_refuses_what_is_undefined():
    arguments = [jnp.asarray(x) for x in (Z, MEAN, LOG_VARIANCE)]
    with pytest.raises(ValueError, match="2 <= batch <= dataset_size, got 6 and 4"):
        disentangle.decompose_kl(*arguments, dataset_size=4, sampling="stratified")
    with pytest.raises(UserError, match="Valid: stratified, weighted"):
        disentangle.decompose_kl(*arguments, dataset_size=50, sampling="minibatch")
    with pytest.raises(UserError, match="Valid: i, ii"):
        disentangle.dip(*arguments[:2], off_diagonal=1.0, diagonal=1.0, variant="iii")


def test_dip_by_hand():
    covariance = np.cov(MEAN.T, ddof=0)
    for variant in ("i", "ii"):
        if variant == "ii":
            covariance = covariance + np.diag(np.exp(LOG_VARIANCE).mean(0))
        off = covariance - np.diag(np.diag(covariance))
        expected = 3.0 * np.sum(off**2) + 2.0 * np.sum((np.diag(covariance) - 1) ** 2)
        result = run(
            disentangle.dip,
            jnp.asarray(MEAN),
            jnp.asarray(LOG_VARIANCE),
            off_diagonal=3.0,
            diagonal=2.0,
            variant=variant,
        )
        np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_permuting_dimensions_keeps_each_marginal_and_breaks_the_pairs():
    z = jnp.arange(40.0)[:, None] * jnp.array([1.0, 100.0])
    permuted = np.asarray(disentangle.permute_dimensions(jax.random.key(0), z))
    np.testing.assert_array_equal(np.sort(permuted, axis=0), z)
    assert np.mean(permuted[:, 1] == 100 * permuted[:, 0]) < 0.3


def test_factor_losses_by_hand():
    logits, permuted = RNG.normal(size=(2, 5, 2)).astype(np.float32)

    def log_softmax(x):
        return x - special.logsumexp(x, axis=1, keepdims=True)

    np.testing.assert_allclose(
        disentangle.factor_total_correlation(jnp.asarray(logits)), logits[:, 0] - logits[:, 1]
    )
    expected = -0.5 * (log_softmax(logits)[:, 0] + log_softmax(permuted)[:, 1])
    result = disentangle.factor_discriminator(jnp.asarray(logits), jnp.asarray(permuted))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
