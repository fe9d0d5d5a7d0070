import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.decoders import LatentClassifier
from repalign.models.transformed import transformed_encoder
from repalign.registry import UserError

ENCODER = {"name": "models.convnet.ConvNet", "widths": (8,)}
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32))


def test_the_classifier_ignores_scale_and_shift_of_a_vector():
    model = LatentClassifier(classes=3, hidden=7)
    x = jax.random.normal(jax.random.key(0), (4, 6))
    params = model.init(jax.random.key(1), x)
    logits = jax.jit(model.apply)(params, x)
    assert logits.shape == (4, 3) and float(jnp.std(logits)) > 0
    np.testing.assert_allclose(model.apply(params, 5.0 * x + 2.0), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("transformation", ["orthogonal", "linear", "none"])
def test_the_embedding_passes_the_transformation(transformation):
    model = transformed_encoder(encoder=ENCODER, transformation=transformation)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    apply = jax.jit(model.apply)
    start, taps = apply({"params": params}, IMAGES)
    np.testing.assert_allclose(start, taps["before"], rtol=1e-5)  # All start at the identity.
    assert ("transformation_matrix" in params) == (transformation != "none")
    if transformation == "none":
        return
    free = 0.3 * jax.random.normal(jax.random.key(1), (8, 8))
    turned, taps = apply({"params": {**params, "transformation_matrix": free}}, IMAGES)
    before = np.asarray(taps["before"])
    assert np.abs(turned - before).max() > 1e-2
    same_angles = np.allclose(turned @ turned.T, before @ before.T, rtol=1e-4)
    assert same_angles == (transformation == "orthogonal")
    if transformation == "linear":
        np.testing.assert_allclose(turned, before @ free, rtol=1e-4, atol=1e-5)


def test_an_unknown_transformation_is_a_mistake():
    with pytest.raises(UserError, match="Did you mean 'orthogonal'"):
        transformed_encoder(encoder=ENCODER, transformation="orthogonl")
