import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repalign.registry import UserError
from repalign.train.objective import Objective, Term, TermOutput

FEATURES = {"a": jnp.asarray([1.0, 3.0]), "b": jnp.asarray([[2.0, 0.0], [4.0, 2.0]])}
KEY = jax.random.key(0)


def reading(feature, name=None):
    """A term whose loss is a feature."""

    def apply(params, state, features, key):
        del params, key
        value = features[feature]
        return TermOutput(value, state, {"largest": jnp.max(value)})

    return Term(name or feature, apply)


def value(objective, step=0):
    params, state = objective.init(KEY, FEATURES)
    total, output = objective.apply(params, state, FEATURES, KEY, step=step)
    return float(total), output


def test_a_sum_of_weighted_terms_is_the_sum_of_their_weighted_means():
    a, b = reading("a"), reading("b")
    alone = Objective((b,))
    for objective in (a + 0.5 * b, a + b * 0.5, Objective((a,)) + 0.5 * b, a + 0.5 * alone):
        total, output = value(objective)
        assert total == 3.0
        assert {name: float(x) for name, x in output.metrics.items()} == {
            "a": 2.0,
            "b": 2.0,
            "a/largest": 3.0,
            "b/largest": 4.0,
        }


def test_factors_multiply_through_nested_sums():
    a, b, c = reading("a"), reading("b"), reading("a", "c")
    assert value(2.0 * (0.5 * (a + 3.0 * b) + c))[0] == 2.0 * (0.5 * (2.0 + 3.0 * 2.0) + 2.0)
    assert [term.weight for term in (2 * (a + 3 * b) * 0.5).terms] == [1.0, 3.0]


def test_a_schedule_is_a_weight_and_multiplies_with_numbers_and_schedules():
    a = reading("a")
    warm_up = optax.linear_schedule(0.0, 1.0, 4)
    stops = optax.piecewise_constant_schedule(1.0, {7: 0.0})
    objective = 3.0 * (warm_up * a) * stops + reading("b")
    assert [value(objective, step)[0] for step in (0, 2, 4, 8)] == [2.0, 5.0, 8.0, 2.0]
    variables = objective.init(KEY, FEATURES)
    compiled = jax.jit(lambda step: objective.apply(*variables, FEATURES, KEY, step=step)[0])
    assert float(compiled(2)) == 5.0


def test_two_terms_of_one_name_and_no_terms_are_errors():
    with pytest.raises(ValueError, match="two terms are named 'a'"):
        reading("a") + reading("b") + reading("b", "a")
    with pytest.raises(ValueError, match="at least one term"):
        Objective(())
    assert len((reading("a") + dataclasses.replace(reading("a"), name="again")).terms) == 2


def test_a_missing_feature_is_an_error_that_names_term_and_nearest_feature():
    features = {"sit/block_8": FEATURES["a"], "teacher/patches": FEATURES["b"]}
    term = reading("sit/block_9", "repa")
    objective = Objective((term,))
    message = r"objective\.repa: .*'sit/block_9'.*Did you mean 'sit/block_8'"
    with pytest.raises(UserError, match=message):
        objective.apply({"repa": {}}, {"repa": {}}, features, KEY, step=0)


def running_mean(decay):
    """A stateful, random term with a parameter: moves a center, pulls the parameter towards it."""

    def init(key, features):
        params = {"point": jax.random.normal(key, features["b"].shape[1:])}
        return params, {"center": jnp.zeros(features["b"].shape[1:])}

    def apply(params, state, features, key):
        center = decay * state["center"] + (1 - decay) * features["b"].mean(0)
        loss = jnp.sum(jnp.square(params["point"] - center)) + jax.random.uniform(key)
        return TermOutput(loss, {"center": center}, {})

    return Term("center", apply, init)


def test_parameters_state_and_randomness_of_a_term_go_in_and_come_out():
    objective = reading("a") + running_mean(0.5)
    params, state = objective.init(KEY, FEATURES)
    assert params["a"] == {} and params["center"]["point"].shape == (2,)
    total, output = objective.apply(params, state, FEATURES, KEY, step=0)
    np.testing.assert_allclose(output.state["center"]["center"], [1.5, 0.5])
    again = objective.apply(params, output.state, FEATURES, KEY, step=1)[1]
    np.testing.assert_allclose(again.state["center"]["center"], [2.25, 0.75])
    other = objective.apply(params, state, FEATURES, jax.random.key(1), step=0)[0]
    assert float(other) != float(total)  # the key reaches the term
    gradient = jax.grad(lambda p: objective.apply(p, state, FEATURES, KEY, step=0)[0])(params)
    expected = 2 * (params["center"]["point"] - jnp.asarray([1.5, 0.5]))
    np.testing.assert_allclose(gradient["center"]["point"], expected, rtol=1e-6)


def test_terms_get_different_keys():
    first = dataclasses.replace(running_mean(0.5), name="first")
    params, _ = (first + running_mean(0.5)).init(KEY, FEATURES)
    assert not np.array_equal(params["first"]["point"], params["center"]["point"])


def test_low_precision_losses_are_averaged_in_float32():
    values = jnp.full((1000,), 1.001, jnp.bfloat16).at[0].set(300.0)
    term = Term("low", lambda p, s, f, k: TermOutput(f["a"], s, {}))
    total, _ = Objective((term,)).apply({"low": {}}, {"low": {}}, {"a": values}, KEY, step=0)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, np.asarray(values, np.float32).mean(), rtol=1e-6)
