"""The full-scale variants of SimCLR, MAE and the tokenizers: parameters and hyper-parameters."""

import functools

import jax
import jax.numpy as jnp
import pytest

from repalign.train import config as configs
from repalign.train.experiment import assemble
from repalign.train.loop import abstract_state, batch_spec
from repalign.train.state import parameter_count

IMAGENET = 1_281_167

# Trained scalars, counted in the official code: MAE's model, with the decoder; torchvision's
# ResNet-50 without its classifier; ViT-B/16 without a classifier (as MAE's encoder); VQGAN's
# encoder and decoder for latents of 128 and 6 dimensions.
RESNET_50, VIT_B = 25_557_032 - 2_049_000, 85_647_360
AUTOENCODER = {128: 70_601_219, 6: 69_443_805}
PARAMETERS = {
    "mae:imagenet224_l16": {"": 329_239_296},
    # Two matrices, scale and bias of a norm of 2,048, scale of one of 128.
    "simclr:imagenet224_resnet50": {
        "encoder": RESNET_50,
        "head": 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128,
    },
    "simclr:imagenet224_vit_b16": {
        "encoder": VIT_B,
        "head": 768 * 4096 + 4096 * 4096 + 4096 * 256 + 4 * 4096 + 256,
    },
    "vq_vae:imagenet256_f16": {"autoencoder": AUTOENCODER[128], "quantizer": 128 * 129},
    "vq_vae:imagenet256_f16_vqgan": {"autoencoder": AUTOENCODER[128], "quantizer": 128 * 129},
    "vq_vae:imagenet256_f16_vq_ema": {"autoencoder": AUTOENCODER[128], "quantizer": 0},
    "vq_vae:imagenet256_f16_fsq": {"autoencoder": AUTOENCODER[6], "quantizer": 0},
}


@functools.cache
def full_scale(name):
    experiment = assemble(configs.load_config(name))
    spec = batch_spec(experiment, experiment.example_spec())
    return experiment, spec, abstract_state(experiment, 1000, spec)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_official_ones(name):
    _, _, state = full_scale(name)
    model = state.params["model"]
    found = {part: parameter_count(model[part] if part else model) for part in PARAMETERS[name]}
    assert found == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    discriminator = 2_765_633 if name.endswith("vqgan") else 0
    assert parameter_count(state.params["objective"]) == discriminator


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mae:imagenet224_l16",
            {
                "name": "adamw",
                "learning_rate": 2.4e-3,
                "schedule": "cosine",
                "warmup_steps": 40 * 312,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "no_decay": ("bias", "scale"),
            },
        ),
        (
            "simclr:imagenet224_resnet50",
            {
                "name": "lars",
                "learning_rate": 4.8,
                "schedule": "cosine",
                "warmup_steps": 3127,
                "momentum": 0.9,
                "weight_decay": 1e-6,
                "no_decay": ("bias", "scale"),
            },
        ),
        (
            "simclr:imagenet224_vit_b16",
            {"name": "adamw", "learning_rate": 2.4e-3, "weight_decay": 0.1},
        ),
        (
            "vq_vae:imagenet256_f16",
            {
                "name": "adam",
                "learning_rate": 1e-4,
                "schedule": "constant",
                "b1": 0.5,
                "b2": 0.9,
                "average_decay": 0.9999,
            },
        ),
    ],
)
def test_optimizers_are_the_official_ones(name, expected):
    optimizer = full_scale(name)[0].config.optimizer
    for key, value in expected.items():
        number = isinstance(value, float)
        assert getattr(optimizer, key) == (pytest.approx(value) if number else value), key


@pytest.mark.parametrize(
    ("name", "batch", "epochs"),
    [
        ("mae:imagenet224_l16", 4096, 800),
        ("simclr:imagenet224_resnet50", 4096, 1000),
        ("simclr:imagenet224_vit_b16", 4096, 300),
        ("vq_vae:imagenet256_f16", 256, 50),
    ],
)
def test_lengths_are_the_official_ones(name, batch, epochs):
    config = full_scale(name)[0].config
    assert config.data.batch_size == batch
    assert config.steps(None) * batch == pytest.approx(epochs * IMAGENET, rel=3e-3)


def features(name):
    experiment, spec, state = full_scale(name)
    return jax.eval_shape(
        lambda params, forward, batch: experiment.forward.apply(
            params, batch, jax.random.key(0), average=None, frozen=None, state=forward
        ),
        state.params["model"],
        state.forward,
        spec,
    )


def test_shapes_and_precision_of_the_features():
    found, _ = features("mae:imagenet224_l16")
    assert found["mae/predictions"].shape == found["mae/patches"].shape == (4096, 196, 768)
    assert found["mae/masked"].shape == (4096, 196)
    visible = found["encoder/patches"]
    assert (visible.shape, visible.dtype) == ((4096, 49, 1024), jnp.bfloat16)

    found, state = features("simclr:imagenet224_resnet50")
    assert found["view_1/encoder"].shape == (4096, 2048)
    assert found["view_1/embedding"].shape == (4096, 128)
    statistics = jax.tree.leaves(state)
    # 53 norms, each a mean and a variance of its channels.
    assert len(statistics) == 2 * 53 and sum(leaf.size for leaf in statistics) == 2 * 26_560
    assert {leaf.dtype for leaf in statistics} == {jnp.dtype("float32")}

    found, state = features("vq_vae:imagenet256_f16_vq_ema")
    assert found["tokenizer/indices"].shape == (256, 16, 16)
    assert found["tokenizer/reconstruction"].dtype == found["tokenizer/latent"].dtype == jnp.float32
    assert state["codebook"].shape == (65_536, 128)
