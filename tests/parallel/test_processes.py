"""Several processes as one run, through the command line. Its own level: ``make processes``."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_experiment

from repalign.parallel import distributed
from repalign.parallel.launch import free_port, newest_checkpoint
from repalign.train import config as configs
from repalign.train.experiment import assemble
from repalign.train.run import run

pytestmark = pytest.mark.processes


class Launched:
    """``repalign launch local``: started when made, its output kept in a file."""

    def __init__(self, workdir, processes, variant="steady"):
        self.workdir = workdir
        self.log = workdir.parent / f"{workdir.name}-{processes}-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "repalign.cli", "launch", "local"]
                + [f"--processes={processes}", f"--workdir={workdir}", "--format=json"]
                + [f"--config={tiny_experiment.__file__}:{variant}"],
                env=os.environ
                | {
                    "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
                    "REPALIGN_CACHE": str(jax.config.jax_compilation_cache_dir),
                },
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def pids(self):
        while "(pids " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return [
            int(pid) for pid in re.search(r"\(pids ([\d ]+)\)", self.log.read_text())[1].split()
        ]

    def wait_until_it_catches_sigterm(self, process):
        """Returns when a process has joined the others; its first step is still to come."""
        status = pathlib.Path("/proc", str(self.pids()[process]), "status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def wait_for_step(self, step):
        """Returns when the run has written the numbers of a step."""
        until = time.monotonic() + 240
        while max(losses(self.workdir), default=0) < step:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def end(self):
        """Returns (status, stdout, stderr)."""
        out, _ = self.process.communicate(timeout=240)
        return self.process.returncode, out, self.log.read_text()


def entries(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_this_process(variant, workdir, *overrides):
    config = configs.load_config(f"{tiny_experiment.__file__}:{variant}")
    return run(assemble(configs.override(config, overrides)), workdir)


def losses(workdir):
    return {entry["step"]: entry["loss"] for entry in entries(workdir) if "loss" in entry}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All steps in this one process: (losses, result)."""
    workdir = tmp_path_factory.mktemp("alone")
    result = in_this_process("steady", workdir, "--config.mesh.fsdp=1")
    return losses(workdir), result


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Four processes of which one was killed after step 12: (workdir, what ended, pid)."""
    workdir = tmp_path_factory.mktemp("processes") / "killed"
    launched = Launched(workdir, 4)
    launched.wait_for_step(12)
    pid = launched.pids()[2]
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    ended = launched.end()
    assert time.monotonic() - begun < 20
    for other in launched.pids():
        with pytest.raises(ProcessLookupError):
            os.kill(other, 0)
    return workdir, ended, pid


def assert_same_curve(found, expected, steps):
    """Sums over the batch in another order move a loss by some 1e-7, and forty steps by less
    than 1e-5."""
    assert set(found) == set(steps)
    np.testing.assert_allclose(
        [found[step] for step in sorted(found)],
        [expected[step] for step in sorted(found)],
        rtol=1e-5,
    )


def test_four_processes_give_the_losses_of_one_until_one_is_killed(killed, alone):
    workdir, (status, out, err), pid = killed
    found = losses(workdir)
    assert_same_curve(found, alone[0], range(1, max(found) + 1))
    assert (status, out) == (1, "") and max(found) < 40
    assert f"repalign: process 2 of 4 (pid {pid}) was killed by SIGKILL" in err
    kept = newest_checkpoint(workdir)  # Written in the background: not always that of step 10.
    assert kept in range(5, 40, 5) and f"the last checkpoint is of step {kept}." in err
    assert "Traceback" not in err


def test_two_processes_continue_stop_on_sigterm_and_resume_exactly(killed, alone):
    workdir, _, _ = killed
    straight = workdir.with_name("straight")
    shutil.copytree(workdir, straight)
    first = max(losses(workdir))

    launched = Launched(workdir, 2)
    launched.wait_for_step(first + 1)
    os.kill(launched.pids()[1], signal.SIGTERM)  # one of them is enough
    status, out, err = launched.end()
    assert (status, out) == (distributed.PREEMPTED, "")
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+) of 40 with a checkpoint", err)[1])
    assert first < stopped < 40 and max(losses(workdir)) == stopped
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    before = entries(workdir)
    launched = Launched(workdir, 2)
    launched.wait_until_it_catches_sigterm(1)
    os.kill(launched.pids()[1], signal.SIGTERM)
    status, _, err = launched.end()
    assert status == distributed.PREEMPTED
    assert f"SIGTERM: stopped after step {stopped + 1} of 40" in err  # the first step it took

    status, out, _ = Launched(workdir, 2).end()
    resumed = json.loads(out)
    assert status == 0 and entries(workdir)[len(before)]["step"] == stopped + 1
    assert_same_curve(losses(workdir), alone[0], range(1, 41))

    status, out, _ = Launched(straight, 2).end()
    assert status == 0
    assert json.loads(out)["params_sha256"] == resumed["params_sha256"]
    assert losses(straight) == losses(workdir)
    np.testing.assert_allclose(
        resumed["metrics"]["source_loss"], alone[1].metrics["source_loss"], rtol=1e-5
    )


def test_process_0_trains_the_encoder_that_both_need(tmp_path):
    status, out, err = Launched(tmp_path / "two", 2, "taught").end()
    assert status == 0 and "[0] encoder" in err and "[1] encoder" not in err
    alone = in_this_process("taught", tmp_path / "one")
    found = json.loads(out)["metrics"]
    for name in ("flow_matching", "repa", "grad_norm"):
        np.testing.assert_allclose(found[name], alone.metrics[name], rtol=1e-4)


JOINED = """
import sys, time
from repalign.parallel import distributed
process, port = int(sys.argv[1]), sys.argv[2]
distributed.join(distributed.Place("127.0.0.1:" + port, 2, process), heartbeat_seconds=10)
print("joined", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_without_launcher_ends_in_bounded_time_when_another_dies(dies):
    """The coordinator (process 0) hangs up; a worker is missed after ``heartbeat_seconds``."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, str(process), str(port)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    processes[dies].kill()
    processes[dies].communicate()
    begun = time.monotonic()
    _, err = processes[1 - dies].communicate(timeout=60)
    assert time.monotonic() - begun < (5 if dies == 0 else 30)
    assert processes[1 - dies].returncode != 0
    assert "This most likely indicates that another task died" in err
