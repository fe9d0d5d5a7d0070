import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from repalign.losses import generative

RNG = np.random.default_rng(9)
MEAN, LOG_VARIANCE, OTHER_MEAN, OTHER_LOG_VARIANCE = RNG.normal(size=(4, 3, 5)).astype(np.float32)


def test_gaussian_log_density_against_scipy():
    x = RNG.normal(size=(3, 5)).astype(np.float32)
    result = generative.gaussian_log_density(*map(jnp.asarray, (x, MEAN, LOG_VARIANCE)))
    expected = stats.norm.logpdf(x, MEAN, np.exp(LOG_VARIANCE / 2))
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def kl(mean, log_variance, other_mean, other_log_variance):
    """By integration on a grid, one dimension at a time."""
    total = np.zeros(len(mean))
    for dimension in range(mean.shape[1]):
        for example in range(len(mean)):
            p = stats.norm(mean[example, dimension], np.exp(log_variance[example, dimension] / 2))
            q = stats.norm(
                other_mean[example, dimension], np.exp(other_log_variance[example, dimension] / 2)
            )
            grid = np.linspace(p.mean() - 10 * p.std(), p.mean() + 10 * p.std(), 4001)
            integrand = p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid))
            total[example] += np.trapezoid(integrand, grid)
    return total


def test_gaussian_divergences_by_integration():
    zeros = np.zeros_like(MEAN)
    result = generative.gaussian_kl(jnp.asarray(MEAN), jnp.asarray(LOG_VARIANCE))
    np.testing.assert_allclose(result, kl(MEAN, LOG_VARIANCE, zeros, zeros), rtol=2e-5)
    arguments = MEAN, LOG_VARIANCE, OTHER_MEAN, OTHER_LOG_VARIANCE
    result = generative.gaussian_kl_between(*map(jnp.asarray, arguments))
    np.testing.assert_allclose(result, kl(*arguments), rtol=2e-5)
    assert not np.any(generative.gaussian_kl(jnp.asarray(zeros), jnp.asarray(zeros)))


def test_bernoulli_log_likelihood_sums_over_pixels():
    pixels = RNG.random((3, 2, 2)) > 0.5
    logits = RNG.normal(size=(3, 2, 2)).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits))
    expected = np.log(np.where(pixels, probability, 1 - probability)).sum((1, 2))
    result = generative.bernoulli_log_likelihood(jnp.asarray(logits), jnp.asarray(pixels))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    extreme = generative.bernoulli_log_likelihood(jnp.full((1, 1), 200.0), jnp.ones((1, 1)))
    assert extreme[0] == 0.0


def test_negative_elbo_weights_the_divergence():
    result = generative.negative_elbo(jnp.array([-3.0, -1.0]), jnp.array([2.0, 0.5]), beta=4.0)
    np.testing.assert_allclose(result, [11.0, 3.0])


def test_iwae_is_the_elbo_at_one_sample_and_tightens():
    log_weights = RNG.normal(size=(6, 4)).astype(np.float32) - 300
    one = generative.negative_iwae(jnp.asarray(log_weights[:1]))
    np.testing.assert_allclose(one, -log_weights[0], rtol=1e-6)
    all_samples = generative.negative_iwae(jnp.asarray(log_weights))
    expected = 300 - np.log(np.exp(log_weights.astype(np.float64) + 300).mean(0))
    np.testing.assert_allclose(all_samples, expected, rtol=2e-6)
    assert np.all(all_samples < -log_weights.mean(0))


def test_iwae_reaches_the_evidence_of_a_linear_gaussian_model():
    """z ~ N(0, 1), x|z ~ N(z, 1): the evidence is N(x; 0, 2), the proposal a shifted Gaussian."""
    x = 0.7
    z = 0.4 + 0.9 * jax.random.normal(jax.random.key(0), (20000, 1))
    log_weights = stats.norm.logpdf(x, z, 1) + stats.norm.logpdf(z) - stats.norm.logpdf(z, 0.4, 0.9)
    result = generative.negative_iwae(jnp.asarray(log_weights))
    np.testing.assert_allclose(result, -stats.norm.logpdf(x, 0, np.sqrt(2)), rtol=5e-3)
