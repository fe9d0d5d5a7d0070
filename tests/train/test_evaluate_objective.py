"""Metrics of an objective on held-out images."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from repalign.data.sources import ArraySource
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train.evaluate import EvaluationContext
from repalign.train.evaluate_objective import objective_metrics
from repalign.train.experiment import assemble
from repalign.train.loop import initializer

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
REFERENCE = {"name": "test_evaluate_objective:images"}


def images():
    """The source of the evaluator's held-out images."""
    return ArraySource({"image": IMAGES, "label": np.zeros(10, np.int32)})


@pytest.fixture(scope="module")
def trained():
    raw = ConfigDict(configs.load_config("swav:swav").to_dict())
    raw.model.widths = (8,)
    raw.forward.head_features = 4
    experiment = assemble(raw.lock())
    batch = jax.tree.map(jnp.asarray, images().gather(np.arange(10)))
    state = jax.jit(initializer(experiment, 10))(jax.random.key(0), batch)
    return EvaluationContext(experiment, images(), pathlib.Path("unused")), state, batch


def test_what_a_training_step_would_report(trained):
    context, state, batch = trained
    wanted = {"entropy": "swapped_assignment/code_entropy", "swav": "swapped_assignment"}
    evaluate = objective_metrics(context, reference=REFERENCE, metrics=wanted, examples=6)
    key = jax.random.key(3)
    found, arrays = evaluate(state, key)
    forward_key, objective_key = jax.random.split(key)
    batch = jax.tree.map(lambda column: column[:6], batch)
    features, _ = context.experiment.forward.apply(
        state.params["model"], batch, forward_key, average=None, frozen=None, state={}
    )
    loss, output = context.experiment.objective.apply(
        state.params["objective"], state.objective, features, objective_key, step=0
    )
    assert found["swav"] == pytest.approx(float(loss), rel=1e-4)
    assert found["entropy"] == pytest.approx(
        float(output.metrics["swapped_assignment/code_entropy"]), rel=1e-5
    )
    assert arrays == {} and found["swav"] > 0


def test_a_metric_that_no_term_has_is_named(trained):
    context, state, _ = trained
    evaluate = objective_metrics(context, reference=REFERENCE, metrics={"entropy": "code_entropi"})
    with pytest.raises(UserError, match=r"unknown metric of the objective 'code_entropi'.*Valid"):
        evaluate(state, jax.random.key(0))
