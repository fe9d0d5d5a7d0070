import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repalign.registry import UserError
from repalign.train.objective import Objective, Term, TermOutput
from repalign.train.state import Forward, init_state, parameter_count
from repalign.train.step import evaluation_params, make_train_step

OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
BATCH = {
    "x": jax.random.normal(jax.random.key(3), (8, 3)),
    "y": jax.random.normal(jax.random.key(4), (8, 2)),
}


def noisy_linear(params, batch, key, *, average, frozen, state):
    """A linear model of inputs with noise, so that the step's keys matter."""
    del average, frozen
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return {"output": (batch["x"] + noise) @ params["w"], "target": batch["y"]}, state


LINEAR = Forward(lambda key, batch: ({"w": jax.random.normal(key, (3, 2))}, {}), noisy_linear)


def scaled_error():
    """A term with a parameter (a scale), a state (a count) and a metric."""

    def init(key, features):
        del key
        return {"scale": jnp.ones(features["output"].shape[1:])}, {"count": jnp.zeros(())}

    def apply(params, state, features, key):
        error = features["target"] - params["scale"] * features["output"]
        shift = jax.random.uniform(key)
        loss = jnp.sum(jnp.square(error), axis=-1) + shift
        return TermOutput(loss, {"count": state["count"] + 1}, {"shift": shift})

    return Term("error", apply, init)


def penalty():
    return Term("penalty", lambda p, s, f, k: TermOutput(jnp.square(f["output"]).sum(-1), s, {}))


OBJECTIVE = scaled_error() + 0.1 * penalty()


def fresh_state(seed=0, *, with_average=True):
    return init_state(
        LINEAR, OBJECTIVE, OPTIMIZER, jax.random.key(seed), BATCH, with_average=with_average
    )


def select(tree, replica):
    return jax.tree.map(lambda leaf: leaf[replica], tree)


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.fixture(scope="module")
def compiled_step():
    return jax.jit(make_train_step(LINEAR, OBJECTIVE, OPTIMIZER, average_decay=0.9))


def test_three_steps_equal_gradient_descent_written_out(compiled_step):
    state = fresh_state()
    w, scale, optimizer_state = state.params["model"]["w"], jnp.ones(2), state.optimizer
    average = w

    for number in range(3):
        forward_key, objective_key = jax.random.split(jax.random.fold_in(state.key, number))
        noise = 0.1 * jax.random.normal(forward_key, BATCH["x"].shape)
        shift = jax.random.uniform(jax.random.fold_in(objective_key, 0))

        def terms(w, scale, noise=noise, shift=shift):
            output = (BATCH["x"] + noise) @ w
            error = jnp.sum((BATCH["y"] - scale * output) ** 2, axis=-1) + shift
            return error.mean(), (output**2).sum(-1).mean()

        gradients = jax.grad(lambda w, scale: terms(w, scale)[0] + 0.1 * terms(w, scale)[1], (0, 1))
        by_w, by_scale = gradients(w, scale)
        params = {
            "model": {"w": w},
            "objective": {"error": {"scale": scale}, "penalty": {}},
        }
        tree = {"model": {"w": by_w}, "objective": {"error": {"scale": by_scale}, "penalty": {}}}
        updates, optimizer_state = OPTIMIZER.update(tree, optimizer_state, params)
        error, squares = terms(w, scale)
        w = w + updates["model"]["w"]
        scale = scale + updates["objective"]["error"]["scale"]
        average = 0.9 * average + 0.1 * w

        state, metrics = compiled_step(state, BATCH)
        totals = {"loss", "grad_norm", "update_norm"}
        assert set(metrics) == totals | {"error", "penalty", "error/shift"}
        np.testing.assert_allclose(metrics["error"], error, rtol=1e-5)
        np.testing.assert_allclose(metrics["penalty"], squares, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], error + 0.1 * squares, rtol=1e-5)
        np.testing.assert_allclose(metrics["error/shift"], shift, rtol=1e-6)
        norm = jnp.sqrt((by_w**2).sum() + (by_scale**2).sum())
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)

    np.testing.assert_allclose(state.params["model"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.params["objective"]["error"]["scale"], scale, rtol=1e-5)
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-5)
    assert int(state.step) == 3 and float(state.objective["error"]["count"]) == 3
    np.testing.assert_array_equal(
        jax.random.key_data(state.key), jax.random.key_data(fresh_state().key)
    )


def test_replicas_along_a_vmapped_axis_equal_runs_of_one_seed(compiled_step):
    seeds = (0, 1, 5)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    batches = jax.tree.map(lambda x: jnp.stack([x * (1 + i) for i in range(3)]), BATCH)
    together = jax.vmap(
        lambda key, batch: init_state(LINEAR, OBJECTIVE, OPTIMIZER, key, batch, with_average=True)
    )(keys, batches)
    step = jax.jit(jax.vmap(make_train_step(LINEAR, OBJECTIVE, OPTIMIZER, average_decay=0.9)))
    for _ in range(3):
        together, all_metrics = step(together, batches)
    for replica, seed in enumerate(seeds):
        alone = fresh_state(seed)
        for _ in range(3):
            alone, metrics = compiled_step(alone, select(batches, replica))
        one = select(together, replica)
        assert_trees_close(one.params, alone.params, rtol=1e-5, atol=1e-6)
        assert_trees_close(one.average, alone.average, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(all_metrics["loss"][replica], metrics["loss"], rtol=1e-5)
    assert len({float(loss) for loss in all_metrics["loss"]}) == 3


def test_a_donated_state_is_reused_and_gone_afterwards():
    state = fresh_state()
    step = make_train_step(LINEAR, OBJECTIVE, OPTIMIZER, average_decay=0.9)
    new_state, _ = jax.jit(step, donate_argnums=0)(state, BATCH)
    assert state.params["model"]["w"].is_deleted() and state.average["w"].is_deleted()
    assert np.all(np.isfinite(new_state.average["w"]))


def test_the_decay_of_the_average_may_be_a_schedule_and_the_average_may_be_missing():
    step = make_train_step(
        LINEAR, OBJECTIVE, OPTIMIZER, average_decay=lambda step: jnp.where(step < 1, 0.0, 0.5)
    )
    first, _ = step(fresh_state(), BATCH)
    np.testing.assert_allclose(first.average["w"], first.params["model"]["w"], rtol=1e-6)
    second, _ = step(first, BATCH)
    expected = (first.params["model"]["w"] + second.params["model"]["w"]) / 2
    np.testing.assert_allclose(second.average["w"], expected, rtol=1e-6)
    assert evaluation_params(second) is second.average

    step = make_train_step(LINEAR, OBJECTIVE, OPTIMIZER)
    without, _ = step(fresh_state(with_average=False), BATCH)
    assert without.average is None
    assert evaluation_params(without) is without.params["model"]


def test_the_initial_state_depends_on_the_key_and_not_on_the_batch():
    state = fresh_state()
    other = init_state(
        LINEAR,
        OBJECTIVE,
        OPTIMIZER,
        jax.random.key(0),
        jax.tree.map(jnp.zeros_like, BATCH),
        with_average=True,
    )
    assert_trees_close(state.params, other.params, rtol=0)
    assert np.any(fresh_state(1).params["model"]["w"] != state.params["model"]["w"])
    np.testing.assert_array_equal(state.average["w"], state.params["model"]["w"])
    assert int(state.step) == 0 and parameter_count(state.params) == 3 * 2 + 2


def test_the_model_may_read_the_average_and_frozen_parameters_without_a_gradient():
    def apply(params, batch, key, *, average, frozen, state):
        del key
        features = {
            "output": batch["x"] @ params["w"],
            "target": batch["x"] @ average["w"] + frozen["offset"],
        }
        return features, state

    distance = Term(
        "distance",
        lambda p, s, f, k: TermOutput(jnp.square(f["output"] - f["target"]).sum(-1), s, {}),
    )
    objective = Objective((distance,))
    forward = Forward(LINEAR.init, apply)
    frozen = {"offset": jnp.asarray([1.0, 2.0])}
    optimizer = optax.sgd(0.1)
    state = init_state(
        forward, objective, optimizer, jax.random.key(0), BATCH, with_average=True, frozen=frozen
    )
    new, metrics = make_train_step(forward, objective, optimizer, average_decay=0.9)(state, BATCH)
    np.testing.assert_allclose(metrics["distance"], 5.0, rtol=1e-5)  # the average starts as a copy
    gradient = -2 * BATCH["x"].mean(0)[:, None] * frozen["offset"]
    expected = state.params["model"]["w"] - 0.1 * gradient
    np.testing.assert_allclose(new.params["model"]["w"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(new.frozen["offset"], frozen["offset"])


def test_the_forward_pass_keeps_a_state_of_its_own():
    """Running means, as batch normalisation keeps them: read before the step, written by it."""

    def apply(params, batch, key, *, average, frozen, state):
        del key, average, frozen
        mean = batch["x"].mean(axis=0)
        features = {"output": (batch["x"] - state["mean"]) @ params["w"], "target": batch["y"]}
        return features, {"mean": 0.75 * state["mean"] + 0.25 * mean}

    def init(key, batch):
        del batch
        return {"w": jax.random.normal(key, (3, 2))}, {"mean": jnp.ones(3)}

    def error(params, state, features, key):
        del params, key
        difference = features["output"] - features["target"]
        return TermOutput(jnp.square(difference).sum(-1), state, {})

    forward, objective = Forward(init, apply), Objective((Term("error", error),))
    optimizer = optax.sgd(0.1)
    state = init_state(forward, objective, optimizer, jax.random.key(0), BATCH, with_average=False)
    new, metrics = make_train_step(forward, objective, optimizer)(state, BATCH)
    expected = jnp.square((BATCH["x"] - 1.0) @ state.params["model"]["w"] - BATCH["y"]).sum(-1)
    np.testing.assert_allclose(metrics["error"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        new.forward["mean"], 0.75 + 0.25 * BATCH["x"].mean(axis=0), rtol=1e-6
    )


def spread():
    """A term across examples: the variance of the outputs over the batch."""

    def apply(params, state, features, key):
        return TermOutput(jnp.var(features["output"], axis=0).sum(), state, {"key": first(key)})

    return Term("spread", apply)


def first(key):
    return jax.random.uniform(key)


def quiet(params, batch, key, *, average, frozen, state):
    """The linear model without noise; its state counts calls and keeps a drawn number."""
    del average, frozen
    state = {"calls": state["calls"] + 1, "drawn": first(key)}
    return {"output": batch["x"] @ params["w"], "target": batch["y"]}, state


def accumulated(objective, accumulate_steps, steps=3):
    forward = Forward(
        lambda key, batch: (
            {"w": jax.random.normal(key, (3, 2))},
            {"calls": jnp.zeros(()), "drawn": jnp.zeros(())},
        ),
        quiet,
    )
    state = init_state(forward, objective, OPTIMIZER, jax.random.key(0), BATCH, with_average=False)
    step = make_train_step(forward, objective, OPTIMIZER, accumulate_steps=accumulate_steps)
    step = jax.jit(step)
    for _ in range(steps):
        state, metrics = step(state, BATCH)
    return state, metrics


def test_microbatches_of_a_per_example_loss_equal_the_whole_batch():
    def squares():
        def apply(params, state, features, key):
            error = jnp.square(features["target"] - features["output"]).sum(-1)
            return TermOutput(error, {"calls": state["calls"] + 1}, {"largest": error.mean() ** 2})

        return Term("squares", apply, lambda key, features: ({}, {"calls": jnp.zeros(())}))

    objective = squares() + 0.1 * penalty()
    whole, metrics = accumulated(objective, 1)
    parts, parts_metrics = accumulated(objective, 4)
    assert_trees_close(parts.params, whole.params, rtol=1e-5)
    assert_trees_close(parts.optimizer, whole.optimizer, rtol=1e-4, atol=1e-7)
    for name in ("loss", "squares", "penalty", "grad_norm", "update_norm"):
        np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5)
    # States go from one microbatch to the next, and other metrics are means over microbatches.
    assert (float(whole.forward["calls"]), float(parts.forward["calls"])) == (3, 12)
    assert float(parts.objective["squares"]["calls"]) == 12
    assert parts_metrics["squares/largest"] > metrics["squares/largest"] * 1.001


def test_a_term_across_examples_sees_a_microbatch_and_every_microbatch_its_own_keys():
    state, metrics = accumulated(spread() + penalty(), 4, steps=1)
    init_w = jax.random.normal(jax.random.split(jax.random.key(0), 4)[0], (3, 2))
    outputs = np.asarray(BATCH["x"] @ init_w)
    expected = np.mean([outputs[number::4].var(axis=0).sum() for number in range(4)])
    np.testing.assert_allclose(metrics["spread"], expected, rtol=1e-5)
    assert abs(outputs.var(axis=0).sum() / expected - 1) > 0.05
    key = jax.random.fold_in(state.key, 0)
    keys = [jax.random.split(jax.random.fold_in(key, number)) for number in range(4)]
    drawn = [first(jax.random.fold_in(objective_key, 0)) for _, objective_key in keys]
    np.testing.assert_allclose(metrics["spread/key"], np.mean(drawn), rtol=1e-6)
    np.testing.assert_allclose(state.forward["drawn"], first(keys[3][0]), rtol=1e-6)
    assert len({float(value) for value in drawn}) == 4


def test_a_batch_that_cannot_be_cut_is_an_error():
    with pytest.raises(UserError, match=r"8 examples cannot be cut into .*accumulate_steps=3"):
        accumulated(penalty() + spread(), 3)
