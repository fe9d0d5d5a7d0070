import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses.reconstruction import absolute_error, squared_error

RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(3, 4, 4, 2)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (squared_error, np.mean((X - Y) ** 2, axis=(1, 2, 3))),
        (absolute_error, np.mean(np.abs(X - Y), axis=(1, 2, 3))),
    ],
)
def test_errors_are_means_per_example_and_the_target_is_constant(loss, expected):
    np.testing.assert_allclose(loss(jnp.asarray(X), jnp.asarray(Y)), expected, rtol=1e-6)
    of_target = jax.grad(lambda y: jnp.sum(loss(jnp.asarray(X), y)))(jnp.asarray(Y))
    assert not np.any(of_target)
    of_input = jax.grad(lambda x: jnp.sum(loss(x, jnp.asarray(Y))))(jnp.asarray(X))
    slope = 2 * (X - Y) if loss is squared_error else np.sign(X - Y)
    np.testing.assert_allclose(of_input, slope / 32, rtol=1e-5)
    half = loss(jnp.asarray(X, jnp.bfloat16), jnp.asarray(X))
    assert half.dtype == jnp.float32 and np.all(half < 0.02)
