import jax
import jax.numpy as jnp
import numpy as np

from repalign.models.mlp import MLP
from repalign.train.forward_encoder import encoder

MODEL = MLP(widths=(5,), features=3)
GENERATOR = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(GENERATOR.integers(0, 256, (4, 8, 8, 1)), jnp.uint8),
    "label": jnp.arange(4),
    "teacher/tokens": jnp.ones((4, 2)),
}


def features(forward, params, seed=1):
    apply = jax.jit(
        lambda params, key: forward.apply(params, BATCH, key, average=None, frozen=None, state={})
    )
    return apply(params, jax.random.key(seed))[0]


def test_the_embedding_is_the_encoders_own_with_the_label_and_given_features():
    forward = encoder(MODEL)
    params, state = forward.init(jax.random.key(0), BATCH)
    assert state == {}
    seen = features(forward, params)
    assert set(seen) == {"encoder/embedding", "label", "teacher/tokens"}
    np.testing.assert_array_equal(seen["label"], BATCH["label"])
    code, taps = forward.encode(params, state, BATCH["image"])
    np.testing.assert_allclose(seen["encoder/embedding"], code, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(code, MODEL.apply({"params": params}, BATCH["image"] / 255.0)[0])
    assert set(taps) == {"hidden"}


def test_augmentation_is_that_of_the_key():
    params, _ = encoder(MODEL).init(jax.random.key(0), BATCH)
    plain = features(encoder(MODEL), params)["encoder/embedding"]
    for options in ({"shift": 2}, {"flip": 1.0}):
        forward = encoder(MODEL, **options)
        changed = features(forward, params)["encoder/embedding"]
        assert np.abs(changed - plain).max() > 1e-3
        same = features(forward, params)["encoder/embedding"]
        np.testing.assert_array_equal(changed, same)
    mirrored = {**BATCH, "image": BATCH["image"][:, :, ::-1]}["image"]
    expected = encoder(MODEL).encode(params, {}, mirrored)[0]
    np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-6)
