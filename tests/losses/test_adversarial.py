import jax
import jax.numpy as jnp
import numpy as np

from repalign.losses import adversarial

RNG = np.random.default_rng(11)
REAL, FAKE = (3 * RNG.normal(size=(2, 4, 5))).astype(np.float32)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x.astype(np.float64)))


def test_hinge_losses_by_hand():
    expected = 0.5 * (np.maximum(1 - REAL, 0) + np.maximum(1 + FAKE, 0)).mean(1)
    result = adversarial.hinge_discriminator(jnp.asarray(REAL), jnp.asarray(FAKE))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    np.testing.assert_allclose(
        adversarial.hinge_generator(jnp.asarray(FAKE)), -FAKE.mean(1), rtol=2e-5
    )


def test_non_saturating_losses_by_hand():
    expected = -(log_sigmoid(REAL) + log_sigmoid(-FAKE)).mean(1)
    result = adversarial.non_saturating_discriminator(jnp.asarray(REAL), jnp.asarray(FAKE))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    result = adversarial.non_saturating_generator(jnp.asarray(FAKE))
    np.testing.assert_allclose(result, -log_sigmoid(FAKE).mean(1), rtol=2e-5)


def test_r1_is_half_gamma_times_the_squared_input_gradient():
    """critic(x) = w.x^2 per pixel map: the gradient is 2 w x."""
    reals = RNG.normal(size=(3, 2, 2)).astype(np.float32)
    weights = RNG.normal(size=(2, 2)).astype(np.float32)

    def penalty(weights):
        def critic(x):
            return jnp.sum(weights * jnp.square(x), axis=(1, 2))

        return adversarial.r1(critic, jnp.asarray(reals), gamma=3.0)

    expected = 1.5 * np.sum((2 * weights * reals) ** 2, axis=(1, 2))
    np.testing.assert_allclose(penalty(jnp.asarray(weights)), expected, rtol=2e-5)
    # The penalty trains the critic: its derivative in w is 12 w sum_i x_i^2.
    gradient = jax.grad(lambda w: jnp.sum(penalty(w)))(jnp.asarray(weights))
    np.testing.assert_allclose(gradient, 12 * weights * np.sum(reals**2, axis=0), rtol=2e-5)


def test_gradient_penalty_of_a_linear_critic_does_not_depend_on_the_point():
    direction = jnp.array([3.0, 4.0])
    reals, fakes = jnp.asarray(REAL[:, :2]), jnp.asarray(FAKE[:, :2])
    result = adversarial.gradient_penalty(
        lambda x: x @ direction, reals, fakes, jax.random.key(0), weight=10.0
    )
    np.testing.assert_allclose(result, 10.0 * (5.0 - 1.0) ** 2, rtol=1e-6)


def test_gradient_penalty_is_taken_between_real_and_fake():
    """critic(x) = x^2 / 2 has gradient x: the penalty tells where it was evaluated."""
    reals, fakes = jnp.full((64, 1), 2.0), jnp.full((64, 1), 6.0)
    result = adversarial.gradient_penalty(
        lambda x: 0.5 * jnp.sum(jnp.square(x), axis=1), reals, fakes, jax.random.key(1), weight=1.0
    )
    points = np.sqrt(result) + 1.0
    assert points.min() > 2.0 and points.max() < 6.0 and points.std() > 0.5
