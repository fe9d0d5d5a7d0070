"""Gradients through a quantizer."""

import jax
import jax.numpy as jnp
import numpy as np

from repalign.quantizers.gradients import straight_through
from repalign.quantizers.vector import rotate_to


def test_rotation_matches_the_reference(golden_losses):
    src, tgt, cotangent, value, gradient = (
        jnp.asarray(golden_losses[f"rotation_trick/{name}"])
        for name in ("in/src", "in/tgt", "in/cotangent", "value", "grad/src")
    )
    rotated, pullback = jax.vjp(lambda src: rotate_to(src, tgt), src)
    np.testing.assert_allclose(rotated, value, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(rotated, tgt)
    actual = pullback(cotangent)[0]
    assert np.linalg.norm(actual - gradient) <= 1e-5 * np.linalg.norm(gradient)
    np.testing.assert_allclose(actual, gradient, rtol=1e-4, atol=1e-6)


def test_rotation_is_a_rotation_even_where_directions_oppose():
    src = jnp.asarray([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])
    tgt = jnp.asarray([[-6.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for row, scale in ((0, 2.0), (1, 1.0), (2, 0.0)):
        jacobian = jax.jacobian(lambda src, row=row: rotate_to(src, tgt[row]))(src[row])
        np.testing.assert_allclose(jacobian @ jacobian.T, scale**2 * np.eye(3), atol=1e-5)


def test_straight_through_is_exact():
    z, quantized = jnp.asarray([1e8, 1.0]), jnp.asarray([1.0, 1e-8])
    np.testing.assert_array_equal(straight_through(z, quantized), quantized)
    gradient = jax.grad(lambda z, q: jnp.sum(straight_through(z, q) * z), argnums=(0, 1))
    np.testing.assert_array_equal(gradient(z, quantized)[0], quantized + z)
    np.testing.assert_array_equal(gradient(z, quantized)[1], 0.0)
