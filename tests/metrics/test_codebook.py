import jax.numpy as jnp
import numpy as np
import scipy.stats

from repalign.metrics import codebook


def test_counts_add_up_and_leave_out_what_is_masked_or_out_of_range():
    indices = jnp.array([[0, 2, 2], [5, -1, 7]])
    where = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(codebook.counts(indices, size=6), [1, 0, 2, 0, 0, 1])
    np.testing.assert_array_equal(codebook.counts(indices, size=6, where=where), [1, 0, 1, 0, 0, 1])
    parts = sum(codebook.counts(row, size=6) for row in indices)
    np.testing.assert_array_equal(parts, codebook.counts(indices, size=6))


def test_summaries_of_counts():
    counts = jnp.array([6.0, 0.0, 3.0, 1.0])
    np.testing.assert_allclose(codebook.usage(counts), 0.75)
    expected = scipy.stats.entropy(np.asarray(counts))
    np.testing.assert_allclose(codebook.entropy(counts), expected, rtol=1e-5)
    np.testing.assert_allclose(codebook.perplexity(counts), np.exp(expected), rtol=1e-5)


def test_perplexity_of_uniform_single_and_no_use():
    np.testing.assert_allclose(codebook.perplexity(jnp.full(8, 3.0)), 8.0, rtol=1e-5)
    np.testing.assert_allclose(codebook.perplexity(jnp.array([0.0, 9.0])), 1.0, rtol=1e-6)
    assert codebook.entropy(jnp.zeros(3)) == 0.0
