import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repalign.registry import UserError
from repalign.train.optimizer import OptimizerConfig

PARAMS = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}
GRADIENT = {"w": jnp.asarray([[0.3, -0.1], [2.0, 0.0]])}


def two_updates(optimizer):
    state = optimizer.init(PARAMS)
    params = PARAMS
    for _ in range(2):
        updates, state = optimizer.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"name": "adamw", "weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-6},
            optax.adamw(0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
        ),
        ({"name": "adam", "b2": 0.9}, optax.adam(0.1, b2=0.9)),
        ({"name": "sgd", "momentum": 0.5}, optax.sgd(0.1, momentum=0.5)),
        ({"name": "lars", "weight_decay": 0.1}, optax.lars(0.1, weight_decay=0.1, momentum=0.9)),
        (
            {"name": "sgd", "clip_norm": 0.5},
            optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
        ),
    ],
)
def test_a_config_names_an_optax_optimizer(fields, expected):
    optimizer = OptimizerConfig(learning_rate=0.1, **fields).transformation(10)
    np.testing.assert_allclose(two_updates(optimizer), two_updates(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 10: 1.0}),
        ("constant", 4, {0: 0.0, 1: 0.25, 4: 1.0, 10: 1.0}),
        ("linear", 0, {0: 1.0, 5: 0.5, 10: 0.0}),
        ("linear", 2, {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", 0, {0: 1.0, 5: 0.5, 10: 0.0}),
        ("cosine", 2, {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("linear", 20, {10: 0.5}),  # a warm-up longer than the run
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, warmup, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    rate = config.learning_rate_schedule(10)
    np.testing.assert_allclose([rate(step) for step in expected], [*expected.values()], atol=1e-6)


def test_the_schedule_drives_the_optimizer():
    config = OptimizerConfig(learning_rate=0.1, name="sgd", momentum=0.0, schedule="linear")
    moved = two_updates(config.transformation(2))
    np.testing.assert_allclose(moved, PARAMS["w"] - (0.1 + 0.05) * GRADIENT["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamw2"}, "unknown optimizer 'adamw2'. Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "unknown learning-rate schedule 'cosin'. Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has none; use adamw"),
        ({"average_decay": 1.0}, r"average_decay must be in \[0, 1\)"),
        ({"accumulate_steps": 0}, "accumulate_steps must be positive, not 0"),
    ],
)
def test_mistakes_are_errors(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**{"learning_rate": 0.1, **fields})


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_named_parameters_are_neither_decayed_nor_scaled(name):
    params = {"layer": {"kernel": PARAMS["w"], "bias": PARAMS["w"]}}
    gradient = {"layer": {"kernel": GRADIENT["w"], "bias": GRADIENT["w"]}}
    fields = {"learning_rate": 0.1, "name": name, "weight_decay": 0.5}
    everything = OptimizerConfig(**fields).transformation(10)
    optimizer = OptimizerConfig(**fields, no_decay=("bias", "scale")).transformation(10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected, _ = everything.update(gradient, everything.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], expected["layer"]["kernel"], rtol=1e-6)
    plain = optax.adam(0.1) if name == "adamw" else optax.sgd(0.1)
    bias, _ = plain.update(gradient, plain.init(params))
    np.testing.assert_allclose(updates["layer"]["bias"], bias["layer"]["bias"], rtol=1e-6)
