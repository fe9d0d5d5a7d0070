import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repalign.losses import adversarial
from repalign.models.discriminator import PatchDiscriminator
from repalign.registry import UserError
from repalign.train.adversarial_terms import patch_gan

KEYS = jax.random.split(jax.random.key(0), 3)
FEATURES = {
    "image": jax.random.normal(KEYS[0], (4, 12, 12, 1)),
    "made": 0.5 + jax.random.normal(KEYS[1], (4, 12, 12, 1)),
}
FIELDS = {"real": "image", "fake": "made", "width": 4, "layers": 2}


@pytest.fixture(scope="module")
def gan():
    term = patch_gan(**FIELDS, generator_weight=0.3, generator_loss="non_saturating")
    params, state = jax.jit(term.init)(KEYS[2], FEATURES)
    assert state == {}

    def logits(params, images):
        return PatchDiscriminator(4, 2).apply({"params": params}, images)[0]

    return term, params, logits


def test_each_player_is_moved_by_its_own_loss(gan):
    term, params, logits = gan

    def loss(params, features):
        return jnp.mean(term.apply(params, {}, features, KEYS[2]).loss)

    def discriminator(params):
        return jnp.mean(
            adversarial.hinge_discriminator(
                logits(params, FEATURES["image"]), logits(params, FEATURES["made"])
            )
        )

    def generator(made):
        return 0.3 * jnp.mean(adversarial.non_saturating_generator(logits(params, made)))

    of_params, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, FEATURES)
    expected = jax.jit(jax.grad(discriminator))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of_params, expected
    )
    expected = jax.jit(jax.grad(generator))(FEATURES["made"])
    np.testing.assert_allclose(of_features["made"], expected, rtol=1e-4, atol=1e-7)
    assert np.any(expected) and not np.any(of_features["image"])
    output = jax.jit(lambda: term.apply(params, {}, FEATURES, KEYS[2]))()
    value = output.metrics["discriminator"] + 0.3 * output.metrics["generator"]
    np.testing.assert_allclose(jnp.mean(output.loss), value, rtol=1e-5)


def test_the_discriminator_learns_to_tell_them_apart(gan):
    term, params, _ = gan
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry):
        params, state = carry

        def loss(params):
            output = term.apply(params, {}, FEATURES, KEYS[2])
            return jnp.mean(output.loss), output.metrics

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), metrics

    carry = (params, optimizer.init(params))
    carry, first = step(carry)
    for _ in range(30):
        carry, metrics = step(carry)
    assert metrics["discriminator"] < 0.5 * first["discriminator"]
    assert metrics["real"] > 0.5 and metrics["fake"] < -0.5


def test_an_unknown_loss_is_named():
    with pytest.raises(UserError, match="unknown adversarial loss 'hing'. Did you mean 'hinge'"):
        patch_gan(**FIELDS, generator_loss="hing")
