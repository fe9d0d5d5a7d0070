"""The one train step: features, objective, gradients, update, moving average."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from repalign.train.objective import Objective
from repalign.train.state import Batch, Forward, TrainState
from repalign.typing import Metrics, PyTree

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    average_decay: float | Callable[[Any], Any] | None = None,
) -> Step:
    """Returns the pure function ``step(state, batch) -> (new state, metrics)``.

    The metrics are ``loss`` (the objective), ``grad_norm`` and ``update_norm`` (global L2 norms,
    before clipping and after the optimizer) and those of the terms.

    Args:
        forward: the forward pass.
        objective: what is minimised.
        optimizer: an optax transformation.
        average_decay: ``a`` in ``average <- a * average + (1 - a) * params`` after the update, or a
            schedule of the step; None keeps no average.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        forward_key, objective_key = jax.random.split(jax.random.fold_in(state.key, state.step))

        def value(params: PyTree):
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
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_decay is not None:
            decay = average_decay(state.step) if callable(average_decay) else average_decay
            average = optax.incremental_update(params["model"], average, 1.0 - decay)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            **output.metrics,
        }
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=params,
            forward=forward_state,
            objective=output.state,
            optimizer=optimizer_state,
            average=average,
            frozen=state.frozen,
        )
        return new_state, metrics

    return step


def evaluation_params(state: TrainState) -> PyTree:
    """Returns the model's averaged parameters, or the current ones if no average is kept."""
    return state.params["model"] if state.average is None else state.average
