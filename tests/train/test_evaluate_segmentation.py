import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from repalign.data.sources import ArraySource
from repalign.registry import UserError
from repalign.train import encoders
from repalign.train.evaluate import EvaluationContext, build_evaluators
from repalign.train.experiment import assemble
from repalign.train.loop import batch_spec, initializer, zeros

KEY = jax.random.key(2)


def striped(*, examples=24, patches=16, seed=0) -> ArraySource:
    """16x16 images whose patches of 4x4 are vertical stripes, horizontal ones or black."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, (examples, 16)).astype(np.int32)
    kinds = np.zeros((3, 4, 4), np.uint8)
    kinds[0, :, ::2], kinds[1, ::2] = 250, 250
    tiles = kinds[labels].reshape(examples, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4)
    image = tiles.reshape(examples, 16, 16, 1)
    label = np.zeros(examples, np.int32)
    return ArraySource({"image": image, "label": label, "patch_labels": labels[:, :patches]})


def context_and_state(tmp_path):
    config = ConfigDict(
        {
            "data": {"source": {"name": f"{__name__}:striped"}, "batch_size": 8},
            "model": {
                "name": "models.vit.ViT",
                "image_size": 16,
                "patch_size": 4,
                "width": 16,
                "depth": 1,
                "heads": 2,
                "class_token": False,
                "position": "sincos",
            },
            "forward": {
                "name": "train.forward_masked.latent_prediction",
                "view": {"crop_scale": None, "flip": 0.0},
                "predicted": 0.5,
                "predictor_depth": 1,
                "predictor_heads": 2,
            },
            "objective": {
                "capi": {
                    "term": "train.masked_terms.capi",
                    "teacher": "teacher/patches",
                    "student": "predictor/patches",
                    "positions": "predictor/positions",
                    "clusters": 4,
                }
            },
            "optimizer": {"learning_rate": 1e-3, "average_decay": 0.9},
            "total_steps": 2,
        }
    )
    experiment = assemble(config)
    source = experiment.source(tmp_path)
    state = jax.jit(initializer(experiment, 2))(
        jax.random.key(0), zeros(batch_spec(experiment, source.columns))
    )
    return EvaluationContext(experiment, source, tmp_path), state


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return context_and_state(tmp_path_factory.mktemp("cache"))


def segmentation(context, **fields):
    section = {
        "name": "train.evaluate_segmentation.patch_segmentation",
        "reference": {"name": f"{__name__}:striped", "seed": 1},
        "classes": 3,
        **fields,
    }
    return build_evaluators({"patches": section}, context)["patches"]


def test_patches_that_look_different_are_told_apart(made):
    context, state = made
    metrics, arrays = segmentation(context)(state, KEY)
    assert arrays == {} and metrics["patch_miou"] > 0.9 and metrics["patch_accuracy"] > 0.9
    # An encoder that says nothing gets the most frequent class right: one of three.
    blind = jax.tree.map(jnp.zeros_like, state.average)
    state = type(state)(**{**vars(state), "average": blind})
    metrics, _ = segmentation(context, test_examples=10)(state, KEY)
    labels = striped(seed=1).arrays["patch_labels"][:10]
    most = np.bincount(context.source.arrays["patch_labels"].ravel()).argmax()
    share = np.mean(labels == most)
    assert metrics["patch_accuracy"] == pytest.approx(share, abs=1e-6)
    assert metrics["patch_miou"] == pytest.approx(share / 3, abs=1e-6)


def test_another_number_of_patches_is_refused(made):
    context, state = made
    reference = {"name": f"{__name__}:striped", "patches": 9}
    with pytest.raises(UserError, match="gives 16 tokens an image, and .* labels 9 patches"):
        segmentation(context, reference=reference)(state, KEY)


def test_the_embedding_is_the_mean_of_the_patches_that_are_probed(made):
    context, state = made
    encoder = encoders.model_encoder(context.experiment.forward, state.average, state.forward)
    images = context.source.arrays["image"]
    tokens = encoders.encode(encoder, images, tap="patches")
    np.testing.assert_allclose(
        encoders.encode(encoder, images), tokens.mean(axis=1), rtol=1e-4, atol=1e-5
    )
