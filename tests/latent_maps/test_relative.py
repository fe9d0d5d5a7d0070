import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign import latent_maps
from repalign.latent_maps.relative import PROJECTIONS
from repalign.registry import UserError


def test_cosine_projection_agrees_with_the_reference(golden_losses):
    x, anchors = (golden_losses[f"relative_representation/in/{name}"] for name in ("x", "anchors"))
    value = latent_maps.relative_representation(jnp.asarray(x), jnp.asarray(anchors))
    np.testing.assert_allclose(
        value, golden_losses["relative_representation/value"], rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_rotation_of_the_latent_space_changes_nothing(projection):
    x = jax.random.normal(jax.random.key(0), (9, 6))
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (6, 6)))[0]
    turned = x @ rotation
    np.testing.assert_allclose(
        latent_maps.relative_representation(turned, turned[:4], projection=projection),
        latent_maps.relative_representation(x, x[:4], projection=projection),
        atol=3e-3 if projection == "euclidean" else 1e-5,  # the root of a rounded 0
    )


def test_euclidean_projection_is_the_distance_with_a_finite_gradient_at_zero():
    anchors = jnp.array([[0.0, 0.0], [3.0, 4.0]])

    def total(x):
        return latent_maps.relative_representation(x, anchors, projection="euclidean").sum()

    value, gradient = jax.value_and_grad(total)(anchors[:1])
    np.testing.assert_allclose(value, 5.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.6, -0.8]], rtol=1e-5)


def test_an_unknown_projection_is_named():
    with pytest.raises(UserError, match="cosine, euclidean, inner_product"):
        latent_maps.relative_representation(jnp.ones((2, 2)), jnp.ones((2, 2)), projection="l1")
