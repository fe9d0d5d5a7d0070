import json
import pathlib
import signal

import jax
import numpy as np
import pytest
import tiny_experiment

from repalign.data.pipeline import TrainingBatches
from repalign.parallel.distributed import Preempted, PreemptionWatch
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train.checkpoint import Checkpoints
from repalign.train.experiment import assemble
from repalign.train.loop import EvaluationResult, TrainingDiverged, params_sha256, train
from repalign.train.run import run
from repalign.train.state import parameter_count
from repalign.train.writer import MetricsWriter

FILE = tiny_experiment.__file__


def experiment(variant, *overrides):
    config = configs.load_config(f"{FILE}:{variant}")
    return assemble(configs.override(config, [f"--config.{one}" for one in overrides]))


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


RESUMABLE = ("averaged", "evaluation.every=3", "checkpoint_every=2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps in one go: (workdir, result, what was evaluated)."""
    workdir = tmp_path_factory.mktemp("straight")
    evaluated = []
    result = run(
        experiment(*RESUMABLE), workdir, on_evaluation=lambda *given: evaluated.append(given)
    )
    return workdir, result, evaluated


def test_a_run_learns_and_reports(straight):
    workdir, result, evaluated = straight
    assert result.step == 6 and int(result.state.step) == 6
    assert [(step, seed) for step, seed, _, _ in evaluated] == [(3, 0), (6, 0)]
    assert evaluated[1][2]["source_loss"] < evaluated[0][2]["source_loss"] < np.log(4)
    assert evaluated[0][3]["samples"].shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(result.metrics["source_loss"], [evaluated[1][2]["source_loss"]])
    assert {"loss", "cross_entropy", "grad_norm", "update_norm"} <= set(result.metrics)
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(workdir) if "source_loss" in line] == [3, 6]
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 6
    assert result.parameters == parameter_count(result.state.params) == 9 * 8 + 8 + 8 * 4 + 4
    assert result.seconds > 0 and result.images_per_second == pytest.approx(96 / result.seconds)
    assert result.memory_bytes > 4 * 4 * result.parameters  # parameters, two moments, the average


class Stopped(Exception):
    pass


def test_a_run_that_stops_and_resumes_equals_one_that_does_not(straight, tmp_path):
    def stop(step, seed, metrics, arrays):
        raise Stopped

    with pytest.raises(Stopped):
        run(experiment(*RESUMABLE), tmp_path, on_evaluation=stop)
    assert sorted(losses(tmp_path)) == [1, 2, 3]  # stopped in step 3, the checkpoint is of step 2
    resumed = run(experiment(*RESUMABLE), tmp_path)
    workdir, result, _ = straight
    assert losses(tmp_path) == losses(workdir)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 3, 4, 5, 6, 6]
    assert params_sha256(resumed.state.params) == params_sha256(result.state.params)
    assert params_sha256(resumed.state.average) == params_sha256(result.state.average)
    assert params_sha256(resumed.state.optimizer) == params_sha256(result.state.optimizer)
    np.testing.assert_array_equal(
        jax.random.key_data(resumed.state.key), jax.random.key_data(result.state.key)
    )
    np.testing.assert_array_equal(resumed.metrics["source_loss"], result.metrics["source_loss"])


def test_sigterm_saves_after_a_whole_step_and_the_run_resumes_exactly(straight, tmp_path):
    def terminate(step, seed, metrics, arrays):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted, match=r"^SIGTERM: stopped after step 4 of 6 with a checkpoint"):
        run(experiment(*RESUMABLE), tmp_path, on_evaluation=terminate)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    resumed = run(experiment(*RESUMABLE), tmp_path)
    workdir, result, _ = straight
    assert losses(tmp_path) == losses(workdir)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert params_sha256(resumed.state.params) == params_sha256(result.state.params)
    assert params_sha256(resumed.state.optimizer) == params_sha256(result.state.optimizer)


def test_an_evaluation_that_is_due_when_sigterm_comes_is_not_lost(straight, tmp_path):
    seen = []

    def terminate(step, seed, metrics, arrays):
        seen.append(step)

    watch = pytest.MonkeyPatch()
    with watch.context() as patched, pytest.raises(Preempted, match="after step 3"):
        patched.setattr(PreemptionWatch, "reached", lambda self: len(losses(tmp_path)) == 2)
        run(experiment(*RESUMABLE), tmp_path, on_evaluation=terminate)
    assert seen == [3] and lines(tmp_path)[-1]["step"] == 3 and "source_loss" in lines(tmp_path)[-1]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 3


def test_a_line_that_a_killed_run_left_unfinished_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with MetricsWriter(tmp_path) as writer:
        assert writer.read(1) == {"loss": 2.0} and writer.read(2) == {}
        writer.write(2, {"loss": 1.5})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    with MetricsWriter(None) as silent:
        silent.write(3, {"loss": 1.0})
        assert silent.read(1) == {}


def test_a_finished_run_is_only_read_again(straight):
    workdir, result, _ = straight
    before = (workdir / "metrics.jsonl").read_text()
    again = run(experiment(*RESUMABLE), workdir)
    assert params_sha256(again.state.params) == params_sha256(result.state.params)
    assert (workdir / "metrics.jsonl").read_text() == before and again.seconds == 0


def test_a_directory_of_another_config_is_refused(straight):
    workdir, _, _ = straight
    other = experiment(*RESUMABLE, "optimizer.learning_rate=0.5")
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 there, 0\.5 now.*--workdir"):
        run(other, workdir)


def test_a_mistake_before_the_first_step_does_not_bind_the_directory(tmp_path):
    with pytest.raises(UserError, match="batch_size=100 must be between 1 and the 64 examples"):
        run(experiment("averaged", "data.batch_size=100"), tmp_path)
    assert run(experiment("averaged", "total_steps=1"), tmp_path).step == 1


def test_replicas_equal_runs_of_one_seed_each(tmp_path):
    together = run(experiment("averaged", "replicas=2", "total_steps=3"), tmp_path / "both")
    assert together.parameters == 116
    for replica in (0, 1):
        alone = run(
            experiment("averaged", f"seed={replica}", "total_steps=3"), tmp_path / str(replica)
        )
        for name in ("loss", "grad_norm", "source_loss"):
            one = np.squeeze(alone.metrics[name])
            np.testing.assert_allclose(together.metrics[name][replica], one, rtol=1e-4)
        for many, one in zip(
            jax.tree.leaves(together.state.params), jax.tree.leaves(alone.state.params), strict=True
        ):
            np.testing.assert_allclose(many[replica], one, rtol=1e-3, atol=1e-5)
    assert together.metrics["loss"][0] != together.metrics["loss"][1]


def poisoned_step(seed):
    """The step (from 1) whose batch holds the poisoned example."""
    batches = TrainingBatches(tiny_experiment.poisoned_images(), 16, seed=seed)
    return next(
        step for step in range(1, 5) if tiny_experiment.POISON in batches.indices(step - 1, seed)
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    seed = next(seed for seed in range(20) if poisoned_step(seed) == 3)
    diverging = experiment("poisoned", f"seed={seed}")
    for _ in range(2):  # the second run restores the checkpoint and meets the same batch
        with pytest.raises(TrainingDiverged, match=r"^step 3: cross_entropy is not finite\. "):
            run(diverging, tmp_path)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            assert checkpoints.latest_step() == 2
    assert sorted(losses(tmp_path)) == [1, 2]


def steps_of(seed):
    return {poisoned_step(seed), poisoned_step(seed + 1)}


def test_divergence_between_checks_names_the_first_step_and_the_seed(tmp_path):
    first = next(seed for seed in range(20) if steps_of(seed) == {2, 4})
    sick = first if poisoned_step(first) == 2 else first + 1
    rarely = ("total_steps=3", "log_every=50", "checkpoint_every=0")
    diverging = experiment("poisoned", f"seed={first}", "replicas=2", *rarely)
    message = rf"^step 2: cross_entropy is not finite \(seeds {sick}\)\. .*checkpoint: none"
    with pytest.raises(TrainingDiverged, match=message):
        run(diverging, tmp_path)


def test_two_evaluators_may_not_give_one_metric(tmp_path):
    def evaluator(state, key):
        return EvaluationResult({"same": 1.0}, {})

    one = experiment("averaged", "total_steps=1")
    with pytest.raises(UserError, match="two evaluators give the metric 'same'"):
        train(
            one,
            one.source(tmp_path),
            tmp_path,
            evaluators={"first": evaluator, "second": evaluator},
        )


def test_a_flow_aligned_with_a_column_of_tokens_trains(tmp_path):
    result = run(experiment("aligned_flow"), tmp_path)
    assert {"flow_matching", "repa"} <= set(result.metrics)
    total = result.metrics["flow_matching"] + 0.5 * result.metrics["repa"]
    np.testing.assert_allclose(result.metrics["loss"], total, rtol=1e-5)
    assert set(result.state.params["objective"]["repa"]) == {"projector_0"}
