"""Parameters and state of flax modules, and forward passes whose encoder keeps batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.convnet import ConvNet
from repalign.models.resnet import ResNet
from repalign.models.vit import ViT
from repalign.train import forward
from repalign.train.modules import apply_module, embedding, encode_images, init_module

IMAGES = jax.random.randint(jax.random.key(0), (4, 16, 16, 3), 0, 256).astype(jnp.uint8)
RESNET = ResNet((1,), bottleneck=False, width=4, stem="cifar")
VIT = ViT(image_size=16, patch_size=8, width=8, depth=1, heads=2)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VIEW = {"size": 8, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}


def quick(function, *arguments):
    return jax.jit(function, compiler_options=QUICK)(*arguments)


def test_state_is_everything_but_parameters():
    x = jnp.ones((2, 8, 8, 3))
    _, params, state = jax.eval_shape(lambda key: init_module(RESNET, key, x), jax.random.key(0))
    assert set(state) == {"batch_stats"} and "stem_norm" in params
    plain = ConvNet((4,), groups=0)
    _, params, state = quick(lambda key: init_module(plain, key, x), jax.random.key(0))
    (_, taps), new = apply_module(plain, params, state, x)
    assert state == new == {} and set(taps) == {"map"}


def test_the_embedding_of_a_transformer_is_its_class_token():
    variables = quick(lambda: VIT.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))
    outputs, _ = VIT.apply(variables, IMAGES / 255.0)
    code, taps = encode_images(VIT, variables["params"], {}, IMAGES)
    np.testing.assert_allclose(code, outputs["cls"], rtol=1e-5)
    np.testing.assert_allclose(taps["patches"], outputs["patches"], rtol=1e-5)
    assert embedding(outputs) is outputs["cls"] and embedding(code) is code


@pytest.mark.parametrize("momentum", [False, True])
def test_batch_statistics_move_in_training_and_serve_the_frozen_encoder(momentum):
    made = forward.two_views(
        RESNET, view=VIEW, head_hidden=8, head_features=4, head_norm="batch", momentum=momentum
    )
    batch = {"image": IMAGES, "teacher/tokens": jnp.ones((4, 2))}
    params, state = quick(made.init, jax.random.key(0), batch)

    def run(params, state):
        return made.apply(
            params, batch, jax.random.key(1), average=params, frozen=None, state=state
        )

    features, new = quick(run, params, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    running = new["batch_stats"]["stem_norm"]
    assert np.all(running["mean"] != 0) and np.all(running["var"] != 1)
    assert features["view_1/encoder"].shape == (4, 4) and "teacher/tokens" in features
    # The views normalise by their own statistics: their embeddings do not depend on the old ones.
    again, _ = quick(run, params, new)
    np.testing.assert_allclose(again["view_0/encoder"], features["view_0/encoder"], rtol=1e-5)
    code, _ = quick(made.encode, params, state, IMAGES)
    other, _ = quick(made.encode, params, new, IMAGES)
    assert code.shape == (4, 4) and np.abs(code - other).max() > 1e-3
    if momentum:
        np.testing.assert_allclose(
            features["view_0/target"], features["view_0/embedding"], rtol=1e-5
        )


def test_the_supervised_pass_takes_transformers():
    made = forward.supervised(VIT, classes=3)
    batch = {"image": IMAGES, "label": jnp.zeros((4,), jnp.int32)}
    params, state = jax.eval_shape(made.init, jax.random.key(0), batch)
    features, new = jax.eval_shape(
        lambda params: made.apply(
            params, batch, jax.random.key(0), average=None, frozen=None, state=state
        ),
        params,
    )
    assert features["classifier/logits"].shape == (4, 3) and new == {}
