import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_experiment

from repalign import cli
from repalign.parallel.distributed import PreemptionWatch

FILE = tiny_experiment.__file__
TRAIN = ("train", "--config", f"{FILE}:fast", "--workdir")
LOCAL = ("launch", "local", "--config", f"{FILE}:fast")
POD = ("launch", "gke", "--config", "repa:imagenet256_xl2", "--workdir", "gs://bucket/x")


@pytest.fixture(autouse=True)
def same_compilation_cache(monkeypatch):
    """The command line sets its own cache; here it is the one of all tests."""
    monkeypatch.setenv("REPALIGN_CACHE", str(jax.config.jax_compilation_cache_dir))


@pytest.fixture
def call(capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("cli") / "new" / "workdir"


def test_train_prints_one_json_document_and_resumes(call, trained):
    arguments = (*TRAIN, trained, "--format=json", "--config.total_steps", "4")
    status, out, err = call(*arguments)
    assert status == 0 and "Traceback" not in err
    document = json.loads(out)
    assert document["step"] == 4 and len(document["params_sha256"]) == 64
    assert {"loss", "cross_entropy", "source_loss"} <= set(document["metrics"])
    again = json.loads(call(*arguments)[1])
    assert again["params_sha256"] == document["params_sha256"] and again["seconds"] == 0
    status, out, err = call(*TRAIN, trained, "--config.total_steps=5")
    assert status == 2 and "another config (config.total_steps: 4 there, 5 now)" in err


def test_train_prints_a_table_of_metrics(call, tmp_path):
    status, out, _ = call(*TRAIN, tmp_path, "--config.total_steps=4")
    lines = dict(line.split("\t") for line in out.splitlines() if "\t" in line)
    assert status == 0 and lines["metric"] == "at step 4" and float(lines["loss"]) > 0
    assert "images/s; parameters " in out


MISTAKES = {
    "unknown command": (("tran",), "unknown command 'tran'. Did you mean 'train'"),
    "unknown experiment": (
        ("train", "--config", "rpea", "--workdir", "{tmp}"),
        "unknown experiment 'rpea'. Did you mean 'repa'",
    ),
    "unknown file": (
        ("train", "--config", "gone.py", "--workdir", "{tmp}"),
        "there is no experiment file 'gone.py'",
    ),
    "unknown variant": (
        ("train", "--config", "repa:basline", "--workdir", "{tmp}"),
        "unknown variant of repa 'basline'. Did you mean 'baseline'",
    ),
    "missing flag": (("train", "--config", "repa"), "--workdir is missing. Usage: repalign train"),
    "unknown flag": ((*TRAIN, "{tmp}", "--stepz=3"), "stepz"),
    "stray argument": ((*TRAIN, "{tmp}", "extra"), "expected 0 argument(s), got ['extra']"),
    "wrong format": ((*TRAIN, "{tmp}", "--format=yaml"), "should be one of <text|json>"),
    "misspelt key": (
        (*TRAIN, "{tmp}", "--config.model.width=3"),
        "config.model has no key 'width'. Did you mean 'widths'",
    ),
    "wrong type": ((*TRAIN, "{tmp}", "--config.total_steps=many"), "--config.total_steps=many"),
    "wrong name in a section": (
        (*TRAIN, "{tmp}", "--config.optimizer.name=adamm"),
        "unknown optimizer 'adamm'. Did you mean 'adam'",
    ),
    "two durations": (
        (*TRAIN, "{tmp}", "--config.total_epochs=2"),
        "give exactly one of total_steps, total_epochs and total_examples",
    ),
    "no replicas": (
        (*TRAIN, "{tmp}", "--config.replicas=0"),
        "replicas and log_every must be positive",
    ),
    "batch too large": (
        (*TRAIN, "{tmp}", "--config.data.batch_size=65"),
        "batch_size=65 must be between 1 and the 64 examples",
    ),
    "impossible mesh": (
        (*TRAIN, "{tmp}", "--config.mesh.fsdp=3"),
        "fsdp=3, tensor=1 does not use all 1 devices",
    ),
    "unwritable workdir": ((*TRAIN, "{tmp}/file/below"), "cannot write to the workdir"),
    "missing feature": (
        (*TRAIN, "{tmp}", "--config.objective.cross_entropy.logits=classifier/logit"),
        "objective.cross_entropy: the forward pass gives no feature 'classifier/logit'. "
        "Did you mean 'classifier/logits'",
    ),
    "missing data": (
        ("train", "--config", "{tmp}/full.py", "--workdir", "{tmp}/new"),
        "Or install Debian's package dataset-fashion-mnist",
    ),
    "unwritable results": (("reproduce", FILE, "--workdir", "{tmp}/file/below"), "file/below"),
    "corrupted results": (("reproduce", FILE, "--workdir", "{tmp}/corrupted"), "results.sqlite"),
    "unknown row": (
        ("reproduce", FILE, "--workdir", "{tmp}", "--rows", "fsat"),
        "unknown row of the table 'fsat'. Did you mean 'fast'",
    ),
    "no table": (("reproduce", "classifier", "--workdir", "{tmp}"), "has no TABLE to reproduce"),
    "no number": (("reproduce", FILE, "--seeds=two"), "seeds"),
    "unknown list": (("list", "loses"), "unknown list 'loses'. Did you mean 'losses'"),
    "nothing to list": (("list",), "expected 1 argument(s), got []. Usage: repalign list"),
    "unknown family": (("papers", "--family", "algnment"), "algnment"),
    "unknown benchmark": (("bench", "codebok"), "Did you mean 'codebook'"),
    "unknown launcher": (
        ("launch", "slrum", "--config", "repa", "--workdir", "{tmp}"),
        "unknown launcher 'slrum'. Did you mean 'slurm'",
    ),
    "no coordinator": (
        (*TRAIN, "{tmp}", "--processes=4", "--process_id=0"),
        "--processes and --process_id need --coordinator HOST:PORT",
    ),
    "no process id": (
        (*TRAIN, "{tmp}", "--coordinator=127.0.0.1:4321", "--processes=4"),
        "--coordinator=127.0.0.1:4321 also needs --processes (how many there are) and --process_id",
    ),
    "no number of processes": ((*LOCAL, "--workdir", "{tmp}"), "--processes is missing"),
    "processes that do not divide the batch": (
        (*LOCAL, "--workdir", "{tmp}", "--processes=3"),
        "data.batch_size 16 does not divide over the 3 devices of mesh axes",
    ),
    "processes that do not fit the mesh": (
        (*LOCAL, "--workdir", "{tmp}", "--processes=2", "--config.mesh.fsdp=4"),
        "does not use all 2 devices",
    ),
    "impossible port": (
        (*LOCAL, "--workdir", "{tmp}", "--processes=2", "--port=70000"),
        "--port=70000: process 0 cannot listen there",
    ),
    "no topology": (
        ("launch", "gke", "--config", "repa", "--workdir", "gs://bucket/x"),
        "--topology is missing",
    ),
    "unknown topology": (
        (*POD, "--topology=v5e:16x15", "--image=i"),
        "'16x15' is no topology of v5e. Did you mean 'v5e:16x16'",
    ),
    "GPUs on GKE": ((*POD, "--topology=h100:8", "--image=i"), "gke runs TPUs, such as v5e:16x16"),
    "a batch that does not divide over the pod": (
        (*POD, "--topology=v5e:16x16", "--image=i", "--config.data.batch_size=200"),
        "data.batch_size 200 does not divide over the 256 devices",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_and_says_what_and_how_to_put_it_right(call, tmp_path, name):
    arguments, message = MISTAKES[name]
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "corrupted").mkdir()
    (tmp_path / "corrupted" / "results.sqlite").write_text("not a database")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.py").write_text(
        "import tiny_experiment\n\n\n"
        "def get_config():\n"
        "    config = tiny_experiment.classifier()\n"
        "    config.data.source = {'name': 'data.fashion_mnist.fashion_mnist', 'split': 'train',\n"
        f"        'subset': 'full', 'data_dir': {str(tmp_path / 'empty')!r}}}\n"
        "    return config.lock()\n"
    )
    status, out, err = call(*(one.replace("{tmp}", str(tmp_path)) for one in arguments))
    assert (status, out) == (2, "")
    assert message in err and err.startswith("repalign: ") and "Traceback" not in err


def test_a_preempted_run_exits_75_and_the_same_command_continues(call, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        steps = itertools.count(1)
        patched.setattr(PreemptionWatch, "reached", lambda self: next(steps) == 3)
        status, out, err = call(*TRAIN, tmp_path)
    assert (status, out) == (75, "")
    assert "repalign: SIGTERM: stopped after step 3 of 6 with a checkpoint of it; the same" in err
    status, out, _ = call(*TRAIN, tmp_path, "--format=json")
    assert status == 0 and json.loads(out)["step"] == 6


def test_launch_prints_or_writes_a_job_file(call, tmp_path):
    arguments = (*POD, "--topology=v5e:4x4", "--image=i", "--noplan", "--config.data.batch_size=16")
    status, printed, err = call(*arguments, "--dry_run")
    assert (status, err) == (0, "") and "kind: JobSet" in printed
    assert "- --config.data.batch_size=16\n" in printed
    path = tmp_path / "job.yaml"
    status, out, _ = call(*arguments, "--out", path)
    assert status == 0 and out == f"Written: {path}. To start the run: kubectl apply -f {path}\n"
    assert path.read_text() == printed
    assert call(*arguments, "--out", path, "--format=json")[1] == (
        json.dumps({"file": str(path), "submit": f"kubectl apply -f {path}"}) + "\n"
    )
    status, _, err = call(*arguments, "--out", tmp_path / "gone" / "job.yaml")
    assert status == 2 and "--out: cannot write" in err


def test_bench_input_shows_what_data_and_step_take(call):
    arguments = ("bench", "input", "--config", f"{FILE}:fast", "--format=json")
    status, out, _ = call(*arguments)
    rows = {row["part"]: row for row in json.loads(out)}
    assert status == 0 and list(rows) == ["host", "device", "step"]
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(16e3 / row["ms_per_batch"])
        ratio = rows["step"]["ms_per_batch"] / row["ms_per_batch"]
        assert row["times_the_step"] == pytest.approx(ratio)


def test_a_run_that_diverges_exits_1_and_says_where(call, tmp_path):
    arguments = ("train", "--config", f"{FILE}:poisoned", "--workdir", tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (1, "")
    assert "cross_entropy is not finite" in err and "Last good checkpoint: " in err
    assert "Traceback" not in err


def test_a_process_of_its_own_exits_2_without_a_traceback(tmp_path):
    """What a shell sees; also that an error leaves no thread that keeps the process alive."""
    command = [sys.executable, "-m", "repalign.cli", *TRAIN, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(FILE).parent)}
    done = subprocess.run(
        [*command, "--config.data.batch_size=1000"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("repalign: batch_size=1000 must be between")
    assert "Traceback" not in done.stderr


def test_reproduce_prints_the_table(call, tmp_path):
    arguments = ("reproduce", FILE, "--workdir", tmp_path, "--seeds=1", "--config.total_steps=2")
    status, out, _ = call(*arguments, "--format=json", "--rows=Slow;Fast, really")
    assert status == 0
    assert {"Slow", "Fast, really"} <= set(json.dumps(json.loads(out)).split('"'))
    status, out, _ = call(*arguments)
    assert status == 0 and "source loss" in out and "Written: table.md" in out


@pytest.mark.parametrize("kind", ["experiments", "losses", "quantizers", "metrics", "models"])
def test_list_names_everything_with_a_summary(call, kind):
    entries = json.loads(call("list", kind, "--format=json")[1])
    assert len(entries) >= 3
    assert all(entry["summary"] for entry in entries)
    status, out, _ = call("list", kind)
    assert status == 0 and len(out.splitlines()) == len(entries) + 1


def test_papers_selects_and_counts(call):
    everything = json.loads(call("papers", "--format=json")[1])
    working = json.loads(call("papers", "--status=works", "--format=json")[1])
    assert 0 < len(working) < len(everything) and all(p["status"] == "works" for p in working)
    status, out, _ = call("papers", "--status=works")
    assert status == 0 and f"{len(working)} papers" in out.splitlines()[-1]


def test_help(call, capsys):
    status, out, _ = call("--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert f"\nrepalign {command} " in out
    assert call()[0] == 2
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert not left.value.code and "--workdir DIR" in capsys.readouterr().out
