import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from repalign.metrics import spectrum


def with_spectrum(count: int, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features of mean 0 whose singular values are ``values``."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(count, len(values)))
    left = np.linalg.qr(raw - raw.mean(axis=0))[0]
    right = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return left * values @ right


def test_effective_rank_agrees_with_the_entropy_of_the_spectrum():
    values = np.array([5.0, 3.0, 1.0, 0.5])
    features = jnp.asarray(with_spectrum(20, values))
    expected = np.exp(scipy.stats.entropy(values))
    np.testing.assert_allclose(spectrum.effective_rank(features), expected, rtol=1e-4)
    # RankMe sees the mean; the centred form does not.
    shifted = features + 10.0
    np.testing.assert_allclose(spectrum.effective_rank(shifted, center=True), expected, rtol=1e-4)
    assert spectrum.effective_rank(shifted) < 0.7 * expected


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_measures_count_equal_directions(rank):
    values = np.array([2.0] * rank + [0.0] * (5 - rank))
    features = jnp.asarray(with_spectrum(16, values))
    np.testing.assert_allclose(spectrum.effective_rank(features), rank, rtol=1e-4)
    np.testing.assert_allclose(spectrum.participation_ratio(features), rank, rtol=1e-4)
    assert spectrum.participation_ratio(jnp.ones((4, 3))) == 0.0


def test_power_law_exponent_recovers_the_exponent_and_the_weighted_fit():
    ranks = np.arange(1, 31)
    features = with_spectrum(80, ranks**-0.6)  # variances decay with 1.2
    fitted = spectrum.power_law_exponent(jnp.asarray(features), first=4, last=30)
    np.testing.assert_allclose(fitted, 1.2, rtol=1e-4)
    noise = np.exp(0.3 * np.random.default_rng(1).normal(size=30))
    bent = np.sort(ranks**-0.6 * noise)[::-1]
    fitted = spectrum.power_law_exponent(jnp.asarray(with_spectrum(80, bent)), first=3, last=25)
    kept = slice(2, 25)
    expected = -np.polyfit(
        np.log(ranks[kept]), np.log(bent[kept] ** 2), 1, w=np.sqrt(1.0 / ranks[kept])
    )[0]
    np.testing.assert_allclose(fitted, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="ranks 4 to 100 are not within 1 to 30"):
        spectrum.power_law_exponent(jnp.asarray(features))
