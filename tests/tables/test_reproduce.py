import contextlib
import json
import sqlite3

import numpy as np
import pytest
import tiny_experiment

from repalign.registry import UserError
from repalign.tables import reproduce as module
from repalign.tables.reproduce import reproduce
from repalign.tables.store import ResultsStore
from repalign.train.config import load_experiment
from repalign.train.loop import TrainingDiverged

FILE = tiny_experiment.__file__
ROWS = ("Slow", "Fast, really")
QUICK = ("--config.total_steps=4",)


def values(evaluation):
    return {
        row: {seed: one.value for seed, one in evaluation.cells[row]["source_loss"].items()}
        for row in ROWS
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The whole table with two seeds: (workdir, evaluation)."""
    workdir = tmp_path_factory.mktemp("table")
    return workdir, reproduce(FILE, workdir, overrides=QUICK)


@pytest.fixture
def trained(monkeypatch):
    """Calls of `run` as (seed, replicas); the runs themselves go on."""
    calls = []
    run = module.run

    def counting(experiment, *arguments, **named):
        calls.append((experiment.config.seed, experiment.config.replicas))
        return run(experiment, *arguments, **named)

    monkeypatch.setattr(module, "run", counting)
    return calls


def test_a_table_runs_and_is_written(table):
    workdir, evaluation = table
    assert {row: sorted(seeds) for row, seeds in values(evaluation).items()} == {
        "Slow": [0, 1],
        "Fast, really": [0, 1],
    }
    assert all(np.isfinite(list(seeds.values())).all() for seeds in values(evaluation).values())
    assert "Slow" in (workdir / "table.md").read_text()
    document = json.loads((workdir / "table.json").read_text())
    assert "Fast, really" in json.dumps(document)
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    with ResultsStore(workdir) as store:
        runs = store.runs("tiny_experiment", status="done")
        assert {(run.variant, run.seed) for run in runs} == {
            (variant, seed) for variant in ("slow", "fast") for seed in (0, 1)
        }
        assert all(run.parameters == 116 and run.peak_memory_bytes > 0 for run in runs)
        assert list(store.curves(runs[0].id)["source_loss"].steps) == [2, 4]


def test_a_second_call_trains_nothing_and_writes_the_same(table, monkeypatch):
    workdir, first = table
    written = {name: (workdir / name).read_bytes() for name in ("table.md", "table.json")}

    def fail(*arguments, **named):
        raise AssertionError("a run was started")

    monkeypatch.setattr(module, "run", fail)
    again = reproduce(FILE, workdir, overrides=QUICK)
    assert values(again) == values(first) and again.verdicts == first.verdicts
    assert {name: (workdir / name).read_bytes() for name in written} == written
    for chosen in (["Fast, really"], ["fast"], ["fast", "Fast, really"]):
        assert reproduce(FILE, workdir, rows=chosen, overrides=QUICK).rows == ("Fast, really",)


def test_more_seeds_run_only_what_is_missing(table, trained):
    workdir, first = table
    more = reproduce(FILE, workdir, seeds=3, rows=["slow"], overrides=QUICK)
    assert trained == [(2, 1)]
    slow = values(more)["Slow"]
    assert sorted(slow) == [0, 1, 2]
    assert {seed: slow[seed] for seed in (0, 1)} == values(first)["Slow"]
    assert len(set(slow.values())) == 3
    assert sorted(values(reproduce(FILE, workdir, overrides=QUICK))["Slow"]) == [0, 1]


def test_an_interrupted_row_resumes_from_its_checkpoint(table, tmp_path, monkeypatch):
    overrides = (*QUICK, "--config.checkpoint_every=1")
    record = ResultsStore.record
    steps = []

    def stop_at_the_end(self, run, step, metrics):
        if step == 4:
            raise KeyboardInterrupt
        record(self, run, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsStore, "record", stop_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            reproduce(FILE, tmp_path, rows=["slow"], overrides=overrides)
    with ResultsStore(tmp_path) as store:
        assert {run.status for run in store.runs("tiny_experiment")} == {"failed"}

    def note(self, run, step, metrics):
        steps.append(step)
        record(self, run, step, metrics)

    monkeypatch.setattr(ResultsStore, "record", note)
    resumed = reproduce(FILE, tmp_path, rows=["slow"], overrides=overrides)
    assert steps == [4, 4]  # both seeds' last evaluation; that of step 2 was kept
    assert values(resumed)["Slow"] == values(table[1])["Slow"]


def test_a_row_that_diverges_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(load_experiment(FILE).VARIANTS, "slow", tiny_experiment.poisoned)
    with pytest.raises(TrainingDiverged, match=r"^slow: step \d: cross_entropy is not finite"):
        reproduce(FILE, tmp_path, seeds=1, overrides=QUICK)
    with ResultsStore(tmp_path) as store:
        status = {run.variant: run.status for run in store.runs("tiny_experiment")}
    assert status == {"slow": "failed", "fast": "done"}
    assert (tmp_path / "table.md").exists()


def test_mistakes_are_found_before_anything_trains(tmp_path, trained):
    for arguments, message in (
        ({"rows": ["slwo"]}, "unknown row of the table 'slwo'. Did you mean 'slow'"),
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"overrides": ["--config.optimizer.name=adm"]}, "Did you mean 'adam'"),
        ({"overrides": ["--config.optimizer.nme=adam"]}, "Did you mean 'name'"),
    ):
        with pytest.raises(UserError, match=message):
            reproduce(FILE, tmp_path, **arguments)
    with pytest.raises(UserError, match="'classifier' has no TABLE to reproduce"):
        reproduce("classifier", tmp_path)
    (tmp_path / "results.sqlite").write_text("no database")
    with pytest.raises(UserError, match="results.sqlite"):
        reproduce(FILE, tmp_path)
    assert trained == []


def test_rows_at_once_give_the_numbers_of_rows_in_turn(table, tmp_path):
    together = reproduce(FILE, tmp_path, overrides=QUICK, jobs=2)
    for row in ROWS:
        assert values(together)[row] == values(table[1])[row]
    with contextlib.closing(sqlite3.connect(tmp_path / "results.sqlite")) as database:
        done = database.execute("SELECT count(*) FROM runs WHERE status = 'done'").fetchone()
        assert done == (4,)
