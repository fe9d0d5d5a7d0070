import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses.consistency import consistency
from repalign.registry import UserError

RNG = np.random.default_rng(17)
PREDICTION, TARGET = jnp.asarray(RNG.normal(size=(2, 4, 3, 5)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.uniform(1.0, 5.0, size=4), jnp.float32)


@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
def test_distances(distance):
    def total(prediction, target):
        losses = consistency(prediction, target, weights=WEIGHTS, distance=distance)
        return losses.sum(), losses

    (_, losses), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        PREDICTION, TARGET
    )
    difference = np.asarray(PREDICTION - TARGET).reshape(4, -1).astype(np.float64)
    offset = 0.00054 * np.sqrt(15)
    expected = {
        "l1": np.abs(difference).mean(1),
        "l2": (difference**2).mean(1),
        "pseudo_huber": np.sqrt((difference**2).sum(1) + offset**2) - offset,
    }[distance]
    np.testing.assert_allclose(losses, WEIGHTS * expected, rtol=2e-5)
    assert np.all(gradients[0] != 0)
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_pseudo_huber_keeps_small_differences():
    near = TARGET + 1e-6
    difference = np.asarray(near - TARGET).reshape(4, -1).astype(np.float64)
    offset = 0.00054 * np.sqrt(15)
    expected = (difference**2).sum(1) / (2 * offset)  # the leading term; the next is 1e-6 of it
    np.testing.assert_allclose(consistency(near, TARGET), expected, rtol=1e-4)


def test_a_wrong_distance_is_named():
    with pytest.raises(UserError, match="distance 'huber'"):
        consistency(jnp.ones((2, 3)), jnp.ones((2, 3)), distance="huber")
