"""Running an experiment whole: its data, its evaluators and the training loop."""

import pathlib

from repalign.train.evaluate import EvaluationContext, build_evaluators
from repalign.train.experiment import Experiment
from repalign.train.loop import OnEvaluation, TrainResult, claim_directory, train


def run(
    experiment: Experiment,
    workdir: pathlib.Path,
    *,
    cache: pathlib.Path | None = None,
    on_evaluation: OnEvaluation | None = None,
    title: str = "train",
) -> TrainResult:
    """Trains and evaluates an experiment in a directory, or takes up a run that stopped there.

    Args:
        experiment: what to run.
        workdir: see `repalign.train.loop.train`.
        cache: where trained encoders and computed columns are kept; ``workdir/cache`` if None.
        on_evaluation: see `repalign.train.loop.train`.
        title: what the progress report calls the run.
    """
    claim_directory(workdir, experiment)
    cache = workdir / "cache" if cache is None else cache
    source = experiment.source(cache)
    context = EvaluationContext(experiment, source, cache)
    evaluation = experiment.config.evaluation
    return train(
        experiment,
        source,
        workdir,
        evaluators=build_evaluators(evaluation.metrics, context),
        final_evaluators=build_evaluators(evaluation.final_metrics, context),
        on_evaluation=on_evaluation,
        title=title,
    )
