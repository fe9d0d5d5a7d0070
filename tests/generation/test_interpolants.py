"""Interpolants: endpoints of both conventions, derivatives, and conversions there and back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.generation.interpolants import convert, interpolant, interpolate
from repalign.registry import UserError

NAMES = ("linear", "cosine")
CONVENTIONS = ("t0_is_data", "t0_is_noise")
PATHS = list(itertools.product(NAMES, CONVENTIONS))


@pytest.mark.parametrize(("name", "convention"), PATHS)
def test_endpoints_and_derivatives(name, convention):
    path = interpolant(name, convention)
    data_end = 0.0 if convention == "t0_is_data" else 1.0
    at_data, at_noise = path(jnp.array(data_end)), path(jnp.array(1 - data_end))
    np.testing.assert_allclose((at_data.alpha, at_data.sigma), (1, 0), atol=1e-6)
    np.testing.assert_allclose((at_noise.alpha, at_noise.sigma), (0, 1), atol=1e-6)
    time = jnp.array(0.3)
    np.testing.assert_allclose(path.d_alpha(time), jax.grad(path.alpha)(time), rtol=1e-5)
    np.testing.assert_allclose(path.d_sigma(time), jax.grad(path.sigma)(time), rtol=1e-5)


def test_repa_and_sit_directions():
    # REPA's alpha is 1 - t (loss.py:37); SiT's alpha is t (transport/path.py:23).
    assert float(interpolant("linear").alpha(jnp.array(0.25))) == 0.75
    assert float(interpolant("linear", "t0_is_noise").alpha(jnp.array(0.25))) == 0.25


@pytest.mark.parametrize(("name", "convention"), PATHS)
def test_conversions_agree_with_the_true_pair_from_every_source(name, convention):
    path = interpolant(name, convention)
    data, noise = jax.random.normal(jax.random.key(0), (2, 5, 3))
    time = jnp.linspace(0.1, 0.9, 5)
    x = interpolate(data, noise, time, interpolant=path)
    _, sigma, d_alpha, d_sigma = (c[:, None] for c in path(time))
    truth = {
        "velocity": d_alpha * data + d_sigma * noise,
        "data": data,
        "noise": noise,
        "score": -noise / sigma,
    }
    for source, target in itertools.product(truth, truth):
        actual = convert(truth[source], x, time, source=source, target=target, interpolant=path)
        np.testing.assert_allclose(actual, truth[target], rtol=1e-3, atol=1e-4)


def test_score_from_velocity_is_finite_at_the_noise_end_and_gaussian_there():
    x = jnp.array([[1.0, -2.0]])
    velocity = jnp.array([[0.3, 0.4]])
    for name in NAMES:
        score = convert(
            velocity,
            x,
            jnp.ones(1),
            source="velocity",
            target="score",
            interpolant=interpolant(name),
        )
        np.testing.assert_allclose(score, -x, rtol=1e-5)


def test_unknown_names_are_named():
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        interpolant("liner")
    with pytest.raises(UserError, match="unknown time convention"):
        interpolant("linear", "t1_is_data")
