"""With two views the multi-view losses are the pairwise ones."""

import jax
import jax.numpy as jnp
import numpy as np

from repalign.losses import multi_view
from repalign.numerics import l2_normalize

VIEWS = jax.random.normal(jax.random.key(0), (6, 2, 5))


def dhel(views, temperature):
    """DHEL (Koromilas et al. 2024): alignment of the pair, and the negatives of each view alone."""
    a, b = l2_normalize(views[:, 0]), l2_normalize(views[:, 1])
    others = 1.0 - jnp.eye(len(views))
    energy = [jnp.sum(others * jnp.exp(x @ x.T / temperature), axis=1) for x in (a, b)]
    return -jnp.log(jnp.exp(jnp.sum(a * b, axis=1) / temperature) / (energy[0] * energy[1]))


def test_mv_dhel_of_two_views_is_dhel():
    def mean(loss):
        return jax.value_and_grad(lambda views: jnp.mean(loss(views)))(VIEWS)

    value, gradient = mean(lambda views: multi_view.mv_dhel(views, temperature=0.3))
    expected, expected_gradient = mean(lambda views: dhel(views, 0.3))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        multi_view.mv_dhel(VIEWS, temperature=0.3), dhel(VIEWS, 0.3), rtol=2e-6
    )
