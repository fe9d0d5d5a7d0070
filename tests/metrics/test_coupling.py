import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses.contrastive import dcl, nt_xent
from repalign.metrics.coupling import negative_positive_coupling


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_gradient_of_nt_xent_at_the_anchor_is_the_coupling_times_that_of_dcl(temperature):
    size = 6
    generator = np.random.default_rng(0)
    a, noise = generator.standard_normal((2, size, 5))
    # From positives that are easy, whose coupling is near 0, to none that is.
    b = a + noise * np.linspace(0.2, 3.0, size)[:, None]

    def own_gradients(loss):
        """d loss_i / d z_i for every anchor: those of ``a``, then those of ``b``."""
        to_a, to_b = jax.jacrev(lambda *z: loss(*z, temperature=temperature), (0, 1))(a, b)
        rows = np.arange(size)
        return np.concatenate([to_a[:size][rows, rows], to_b[size:][rows, rows]])

    with jax.enable_x64(True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        coupling = np.asarray(negative_positive_coupling(a, b, temperature=temperature))
        gradients = own_gradients(nt_xent)
        expected = coupling[:, None] * own_gradients(dcl)
    assert np.ptp(coupling) > 0.3 and gradients.dtype == np.float64
    np.testing.assert_allclose(gradients, expected, rtol=1e-10)


def test_the_coupling_of_a_single_pair_and_of_masked_examples_is_zero():
    a, b = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_allclose(negative_positive_coupling(a[:1], b[:1], temperature=0.2), 0.0)
    where = jnp.asarray([True, False, True])
    masked = negative_positive_coupling(a, b, temperature=0.2, where=where)
    kept = negative_positive_coupling(a[::2], b[::2], temperature=0.2)
    np.testing.assert_allclose(masked[jnp.asarray([0, 2, 3, 5])], kept, rtol=1e-5)
    assert masked[1] == masked[4] == 0.0
