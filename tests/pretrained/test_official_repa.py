"""Parity with the official SiT + REPA model, its loss and its samplers, by recorded numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.generation import flow, samplers
from repalign.generation.guidance import ClassifierFreeGuidance
from repalign.generation.interpolants import interpolate
from repalign.losses.alignment import repa
from repalign.pretrained import from_official_repa

NULL = 1000


@pytest.fixture(scope="module")
def params(golden_repa):
    """The state dict in the official naming."""
    return {
        name.removeprefix("param/"): value
        for name, value in golden_repa.items()
        if name.startswith("param/")
    }


@pytest.fixture(scope="module")
def config(golden_repa):
    """The official constructor's arguments."""
    return json.loads(str(golden_repa["config"]))


@pytest.fixture(scope="module")
def apply(params, config):
    """``(x, t, y) -> (out, taps)`` in NCHW."""
    module, variables = from_official_repa(params, config)
    return jax.jit(lambda x, t, y: module.apply(variables, x, t, y, data_format="NCHW"))


def assert_close(actual, expected, tolerance):
    """Relative to the largest magnitude, as the golden contract has it."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_velocity_and_projection(apply, golden_repa):
    out, taps = apply(golden_repa["x"], golden_repa["t"], jnp.asarray(golden_repa["y"]))
    assert_close(out, golden_repa["out"], 2e-5)
    assert_close(taps["projection_0"], golden_repa["z0"], 2e-5)


def test_losses(apply, golden_repa, config):
    path = flow.interpolant(config["path_type"])
    draw = jnp.asarray(golden_repa["loss_time_draw"]).reshape(-1)
    time = flow.time_from_draw(draw, weighting=config["weighting"], interpolant=path)
    data, noise = jnp.asarray(golden_repa["x"]), jnp.asarray(golden_repa["loss_noise"])
    x = interpolate(data, noise, time, interpolant=path)
    out, taps = apply(x, time, jnp.asarray(golden_repa["y"]))
    loss = flow.flow_matching_loss(out, data, noise, time, interpolant=path)
    assert_close(loss, golden_repa["denoising_loss"], 2e-5)
    projection = repa([taps["projection_0"]], [jnp.asarray(golden_repa["teacher0"])])
    assert_close(jnp.mean(projection), golden_repa["projection_loss"], 2e-5)


def sample(name, apply, golden):
    """Runs the sampler that wrote ``golden[name]``, from the recorded latents and noises."""
    labels = jnp.asarray(golden["y"], jnp.int32)
    x = jnp.asarray(golden["x"])

    def model(x, t, y):
        return apply(x, t, y)[0]

    if name == "ode_euler":
        return samplers.ode(lambda x, t: model(x, t, labels), x, steps=7)
    if name == "ode_heun_cfg_interval":
        guidance = ClassifierFreeGuidance(model, labels, NULL, 1.8, (0.2, 0.7))
        return samplers.ode(guidance, x, steps=6, method="heun")
    guidance = ClassifierFreeGuidance(model, labels, NULL, 1.5, (0.0, 0.7))
    noise = jnp.asarray(golden["sde_noise"], jnp.float32)
    return samplers.euler_maruyama(guidance, x, steps=8, noise=noise)


@pytest.mark.parametrize("name", ["ode_euler", "ode_heun_cfg_interval", "sde_euler_maruyama_cfg"])
def test_samplers(name, apply, golden_repa):
    out = jax.jit(lambda: sample(name, apply, golden_repa))()
    assert_close(out, golden_repa[name], 1e-4)


def test_names_missing_unexpected_and_misshapen_are_errors(params, config):
    renamed = dict(params)
    renamed["blocks.0.attn.qkv.w"] = renamed.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(
        ValueError, match=r"missing: blocks\.0\.attn\.qkv\.weight; unexpected: .*qkv\.w\."
    ):
        from_official_repa(renamed, config)
    with pytest.raises(ValueError, match=r"missing: .*blocks\.2\.attn\.q_norm\.weight"):
        from_official_repa(params, {**config, "qk_norm": True})
    transposed = {**params, "blocks.1.mlp.fc1.weight": params["blocks.1.mlp.fc1.weight"].T}
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        from_official_repa(transposed, config)
    with pytest.raises(ValueError, match="sine-cosine"):
        from_official_repa({**params, "pos_embed": params["pos_embed"] + 1}, config)
