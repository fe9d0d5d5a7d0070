"""Evaluator of an objective: what its terms measure, on held-out images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.registry import build, lookup
from repalign.train.evaluate import EvaluationContext
from repalign.train.loop import EvaluationResult, Evaluator
from repalign.train.state import Batch, TrainState
from repalign.typing import Array


def objective_metrics(
    context: EvaluationContext,
    *,
    reference: Mapping[str, Any],
    metrics: Mapping[str, str],
    examples: int = 1000,
) -> Evaluator:
    """Metrics of the objective's terms on one batch of held-out images, as a training step sees it.

    The parameters are the current ones, the views are augmented, and no state moves.

    Args:
        reference: source of held-out images.
        metrics: the names of the metrics in the results, each with that in the objective, as
            ``{"code_entropy": "swav/code_entropy"}``; a term's own name is its loss.
        examples: size of the batch, the first images of the reference.
    """
    place = "config.evaluation.metrics.objective_metrics.reference"
    held_out = build(reference, place=place)
    batch = jax.tree.map(jnp.asarray, held_out.gather(np.arange(min(examples, len(held_out)))))
    forward, objective = context.experiment.forward, context.experiment.objective

    @jax.jit
    def measure(state: TrainState, batch: Batch, key: Array) -> dict[str, Array]:
        forward_key, objective_key = jax.random.split(key)
        features, _ = forward.apply(
            state.params["model"],
            batch,
            forward_key,
            average=state.average,
            frozen=state.frozen,
            state=state.forward,
        )
        _, output = objective.apply(
            state.params["objective"], state.objective, features, objective_key, step=state.step
        )
        return {
            name: lookup(output.metrics, wanted, kind="metric of the objective")
            for name, wanted in metrics.items()
        }

    def evaluate(state: TrainState, key: Array) -> EvaluationResult:
        values = measure(state, batch, key)
        return EvaluationResult({name: float(value) for name, value in values.items()}, {})

    return evaluate
