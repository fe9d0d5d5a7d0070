"""The one train step: features, objective, gradients, update, moving average."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from repalign.models.layout import gather_parameters, split_examples
from repalign.registry import UserError
from repalign.train.objective import Objective
from repalign.train.state import Batch, Forward, TrainState
from repalign.typing import Array, Key, Metrics, PyTree

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    average_decay: float | Callable[[Any], Any] | None = None,
    accumulate_steps: int = 1,
) -> Step:
    """Returns the pure function ``step(state, batch) -> (new state, metrics)``.

    The metrics are ``loss`` (the objective), ``grad_norm`` and ``update_norm`` (global L2 norms,
    before clipping and after the optimizer) and those of the terms.

    With n = ``accumulate_steps`` above 1 the batch is cut into n microbatches of equal size, number
    i made of the examples i, i + n, ... so that every device keeps its own, and one update follows
    from the mean of their gradients: for losses of one value an example exactly the gradient of the
    whole batch. A loss with terms across examples (negatives, batch statistics) sees a microbatch
    only; states of terms and of the forward pass go from one to the next, and metrics are means
    over microbatches. Each microbatch has random keys of its own.

    Args:
        forward: the forward pass.
        objective: what is minimised.
        optimizer: an optax transformation.
        average_decay: ``a`` in ``average <- a * average + (1 - a) * params`` after the update, or a
            schedule of the step; None keeps no average.
        accumulate_steps: number of microbatches.
    """

    def differentiate(state: TrainState, batch: Batch, key: Key[Array, ""]):
        """Returns (gradients, forward state, objective state, metrics) on one microbatch."""
        forward_key, objective_key = jax.random.split(key)

        def value(params: PyTree):
            params = gather_parameters(params)
            features, forward_state = forward.apply(
                params["model"],
                batch,
                forward_key,
                average=state.average,
                frozen=state.frozen,
                state=state.forward,
            )
            loss, output = objective.apply(
                params["objective"], state.objective, features, objective_key, step=state.step
            )
            return loss, (output, forward_state)

        differentiated = jax.value_and_grad(value, has_aux=True)
        (loss, (output, forward_state)), gradients = differentiated(state.params)
        return gradients, forward_state, output.state, {"loss": loss, **output.metrics}

    def accumulate(state: TrainState, batch: Batch, key: Key[Array, ""]):
        """The same on all microbatches, one after the other."""

        def add(carry, numbered):
            total, forward_state, objective_state = carry
            number, microbatch = numbered
            gradients, *states, metrics = differentiate(
                dataclasses.replace(state, forward=forward_state, objective=objective_state),
                jax.tree.map(split_examples, microbatch),
                jax.random.fold_in(key, number),
            )
            return (jax.tree.map(jnp.add, total, gradients), *states), metrics

        start = (jax.tree.map(jnp.zeros_like, state.params), state.forward, state.objective)
        numbered = (jnp.arange(accumulate_steps), _microbatches(batch, accumulate_steps))
        (total, *states), metrics = jax.lax.scan(add, start, numbered)
        gradients = jax.tree.map(lambda leaf: leaf / accumulate_steps, total)
        return gradients, *states, jax.tree.map(lambda value: jnp.mean(value, axis=0), metrics)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradients_and_states = accumulate if accumulate_steps > 1 else differentiate
        gradients, forward_state, objective_state, metrics = gradients_and_states(state, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_decay is not None:
            decay = average_decay(state.step) if callable(average_decay) else average_decay
            average = optax.incremental_update(params["model"], average, 1.0 - decay)
        norms = {
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
        }
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=params,
            forward=forward_state,
            objective=objective_state,
            optimizer=optimizer_state,
            average=average,
            frozen=state.frozen,
        )
        return new_state, {**metrics, **norms}

    return step


def _microbatches(batch: Batch, count: int) -> Batch:
    """Returns every array as [count, size / count, ...], example e in microbatch e % count."""

    def split(x: Array) -> Array:
        if x.shape[0] % count:
            raise UserError(
                f"a batch of {x.shape[0]} examples cannot be cut into optimizer.accumulate_steps="
                f"{count} microbatches of one size."
            )
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def evaluation_params(state: TrainState) -> PyTree:
    """Returns the model's averaged parameters, or the current ones if no average is kept."""
    return state.params["model"] if state.average is None else state.average
