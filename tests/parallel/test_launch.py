import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

from repalign.parallel import launch
from repalign.parallel.distributed import PREEMPTED
from repalign.parallel.mesh import MeshConfig
from repalign.registry import UserError

RUN = """
import os, signal, sys, time
flags = dict(one[2:].split("=") for one in sys.argv if one.startswith("--"))
index = int(flags["process_id"])
assert flags["processes"] == "3" and flags["coordinator"] == "127.0.0.1:7"
assert os.environ["JAX_PLATFORMS"] == "cpu"
def save(*_):
    print("saved", file=sys.stderr)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
print("document" if index == 0 else "chatter", flush=True)
print("progress", file=sys.stderr, flush=True)
"""


def run(tmp_path, ending):
    """Three small programs in place of training, which end as ``ending`` says."""
    program = tmp_path / "program.py"
    program.write_text(RUN + ending)
    return launch.run_local(
        ["train"],
        processes=3,
        port=7,
        workdir=tmp_path,
        command=(sys.executable, "-S", str(program)),
    )


def interrupt(number, *, times=1):
    """Sends this process a signal once the three programs are there."""

    def send():
        for _ in range(times):
            time.sleep(1.0)
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


def test_only_the_document_of_process_0_goes_to_standard_output(tmp_path, capfd):
    assert run(tmp_path, "") == 0
    out, err = capfd.readouterr()
    assert out == "document\n"
    assert {"[0] progress", "[1] progress", "[1] chatter", "[2] chatter"} <= set(err.splitlines())
    assert "[0] document" not in err


def test_a_killed_process_stops_all_and_is_named(tmp_path, capfd):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    begun = time.monotonic()
    ending = "os.kill(os.getpid(), signal.SIGKILL) if index == 2 else time.sleep(60)"
    assert run(tmp_path, ending) == 1
    assert time.monotonic() - begun < 20
    err = capfd.readouterr().err
    assert re.search(
        r"repalign: process 2 of 3 \(pid \d+\) was killed by SIGKILL; the other 2 were stopped\. "
        r"In .* the last checkpoint is of step 40\. The same command continues",
        err,
    )
    for pid in map(int, re.search(r"\(pids ([\d ]+)\)", err)[1].split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("ended", "status"), [(1, 1), (2, 2), (134, 1)])
def test_the_first_that_fails_is_named(tmp_path, capfd, ended, status):
    ending = f"time.sleep(60) if index != 1 else sys.exit({ended})"
    assert run(tmp_path, ending) == status
    err = capfd.readouterr().err
    assert f") ended with {ended}; the other 2 were stopped" in err
    assert "there is no checkpoint yet" in err and ("continues" in err) == (ended != 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_save(tmp_path, capfd, number):
    interrupt(number)
    assert run(tmp_path, "time.sleep(60)") == PREEMPTED
    err = capfd.readouterr().err
    assert err.count("saved") == 3 and "once more to stop without saving" in err


def test_a_second_signal_stops_at_once(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)  # In a job in the background it is ignored.
    interrupt(signal.SIGINT, times=2)
    ending = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert run(tmp_path, ending) == 130
    assert "stopped without saving" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_taken_port_is_the_users_mistake():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={port}: process 0 cannot listen there.*free"):
            launch.check_port(port)
    launch.check_port(launch.free_port())


@pytest.mark.parametrize(
    ("mesh", "batch_size", "devices", "message"),
    [
        (MeshConfig(fsdp=3), 16, 4, "does not use all 4 devices"),
        (MeshConfig(), 16, 3, "batch_size 16 does not divide over the 3 devices.*15 or 18 would"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_before_anything_starts(
    mesh, batch_size, devices, message
):
    with pytest.raises(UserError, match=message):
        launch.check_layout(mesh, batch_size, devices)
    launch.check_layout(MeshConfig(fsdp=2), 16, 4)
