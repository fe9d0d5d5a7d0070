"""Several processes of one run on this machine: start, watch, stop together.

The processes meet over loopback and compute on the CPU, one device each: a pod's program in small.
Machines with accelerators need one process each, and `repalign.parallel.job_files` for clusters.
"""

import io
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax

from repalign.parallel.distributed import PREEMPTED
from repalign.parallel.mesh import MeshConfig, check_batch
from repalign.parallel.rules import MESH_AXES
from repalign.registry import UserError

_INTERRUPTED = 130


def check_layout(
    mesh: MeshConfig, batch_size: int, devices: int, *, accumulate_steps: int = 1
) -> None:
    """Raises UserError if a mesh does not use so many devices, or the batch does not divide."""
    sizes = mesh.sizes(devices)
    check_batch(
        batch_size,
        jax.sharding.AbstractMesh(sizes, MESH_AXES),
        accumulate_steps=accumulate_steps,
    )


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def check_port(port: int) -> None:
    """Raises UserError if the port of the loopback interface is taken or does not exist."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port={port}: process 0 cannot listen there ({error}). Leave it out for a free "
                f"one, such as {free_port()}."
            ) from error


class LocalProcesses:
    """The processes of a run on this machine.

    Standard output of process 0 goes to standard output as it is; everything else goes to standard
    error with the number of its process in front.

    Args:
        arguments: of ``repalign``, ``("train", "--config", ...)``.
        processes: how many.
        port: where they meet.
        command: what runs ``repalign``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        processes: int,
        port: int,
        command: Sequence[str] = (sys.executable, "-m", "repalign.cli"),
    ) -> None:
        self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._children = [
            subprocess.Popen(
                [
                    *command,
                    *arguments,
                    f"--coordinator=127.0.0.1:{port}",
                    f"--processes={processes}",
                    f"--process_id={index}",
                ],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches only us; we tell them in our own way.
            )
            for index in range(processes)
        ]
        for index, child in enumerate(self._children):
            self._start(self._forward, index, child.stdout, index == 0)
            self._start(self._forward, index, child.stderr, False)
            self._start(self._wait_for, index, child)

    def _start(self, function: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _forward(self, index: int, stream: io.TextIOWrapper, plain: bool) -> None:
        with stream:
            for line in stream:
                target, text = (sys.stdout, line) if plain else (sys.stderr, f"[{index}] {line}")
                target.write(text)
                target.flush()

    def _wait_for(self, index: int, child: subprocess.Popen) -> None:
        self._ended.put((index, child.wait()))

    @property
    def pids(self) -> list[int]:
        """The system's numbers of the processes."""
        return [child.pid for child in self._children]

    def signal(self, number: int) -> None:
        """Sends a signal to every process that still runs."""
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def next_end(self, timeout: float) -> tuple[int, int] | None:
        """Returns (process, its status) of the next one to end, in the order of their ends."""
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends what still runs and waits until all output is forwarded."""
        self.signal(signal.SIGKILL)
        for thread in self._threads:
            thread.join()


def run_local(
    arguments: Sequence[str], *, processes: int, port: int, workdir: pathlib.Path, **options: Any
) -> int:
    """Runs ``repalign`` in several processes; returns the exit status of the whole.

    If one process fails, the others are stopped and standard error says which one failed and how.
    The first Ctrl-C or SIGTERM lets all finish their step, save and end; the second ends them.

    Args:
        arguments: of ``repalign``.
        processes: how many.
        port: of the loopback interface, where they meet.
        workdir: whose checkpoints the message names.
        options: see `LocalProcesses`.

    Returns:
        0; 2 if a process ended so (a mistake of the user's); 75 after a stop with a checkpoint; 130
        after a second Ctrl-C; 1 after any other end of a process.
    """
    signals: list[int] = []
    handlers = {
        number: signal.signal(number, lambda received, frame: signals.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    running = LocalProcesses(arguments, processes=processes, port=port, **options)
    pids = " ".join(map(str, running.pids))
    _say(f"{processes} processes meet at 127.0.0.1:{port} (pids {pids})")
    told, statuses = 0, list[int]()
    try:
        while len(statuses) < processes:
            if len(signals) > told:
                told = len(signals)
                if told > 1:
                    _say("stopped without saving.")
                    return _INTERRUPTED
                _say("stopping after the current step; once more to stop without saving.")
                running.signal(signal.SIGTERM)
            end = running.next_end(timeout=0.1)
            if end is None:
                continue
            index, status = end
            if status not in (0, PREEMPTED):
                running.close()
                _say(_failure(index, processes, running.pids[index], status, workdir))
                return 2 if status == 2 else 1
            statuses.append(status)
        return max(statuses)
    finally:
        running.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def newest_checkpoint(workdir: pathlib.Path) -> int | None:
    """Returns the step of the newest complete checkpoint of a run, by the names of its folders."""
    folder = workdir / "checkpoints"
    steps = [int(one.name) for one in folder.glob("*") if one.name.isdigit()]
    return max(steps, default=None)


def _failure(index: int, processes: int, pid: int, status: int, workdir: pathlib.Path) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    step = newest_checkpoint(workdir)
    kept = (
        "there is no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
    )
    others = f"the other {processes - 1} were stopped" if processes > 1 else "the run is stopped"
    again = (
        ""
        if status == 2
        else (" The same command continues from there, with this or another number of processes.")
    )
    return (
        f"process {index} of {processes} (pid {pid}) {how}; {others}. In {workdir} {kept}.{again}"
    )


def _environment() -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=1".strip(),
    }


def _say(text: str) -> None:
    print(f"repalign: {text}", file=sys.stderr, flush=True)
