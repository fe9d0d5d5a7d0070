"""Several processes as one run: joining, each one's part of a batch, stopping together.

Every process runs the same program on its own devices and JAX makes one run of them. Process 0
writes, evaluates and prints; all of them take part in steps and checkpoints.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Int

from repalign.registry import UserError
from repalign.typing import PyTree

HEARTBEAT_SECONDS = 60
"""A process that dies without a word is noticed after this long; one that hangs up, at once."""

PREEMPTED = 75
"""Exit status of a run that saved itself on SIGTERM (EX_TEMPFAIL: the same command continues)."""

_JOIN_SECONDS = 300
_MEETING_SECONDS = 24 * 3600
_meetings = itertools.count()
_questions = itertools.count(1)


class Preempted(Exception):
    """SIGTERM ended the run after a whole step, with a checkpoint of it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        coordinator: ``HOST:PORT`` of process 0, where all processes meet, or ``auto``: the cluster
            (TPU VM, GKE, SLURM, Open MPI) knows the place.
        processes: how many there are; None only with ``auto``.
        process_id: the number of this one, from 0; None only with ``auto``.
    """

    coordinator: str
    processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        if self.coordinator == "auto":
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator must be HOST:PORT of process 0, such as 10.0.0.2:8476, or auto on "
                f"a TPU VM, GKE or SLURM, not {self.coordinator!r}."
            )
        if self.processes is None or self.process_id is None:
            raise UserError(
                f"--coordinator={self.coordinator} also needs --processes (how many there are) and "
                "--process_id (which one this is, from 0)."
            )
        if not 0 <= self.process_id < self.processes:
            raise UserError(
                f"--process_id must be between 0 and {self.processes - 1} with "
                f"--processes={self.processes}, not {self.process_id}."
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def place(coordinator: str | None, processes: int | None, process_id: int | None) -> Place | None:
    """Returns where this process belongs, or None if it runs by itself.

    What is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: a part is missing or cannot be.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator is not None:
        return Place(coordinator, processes, process_id)
    if processes is not None or process_id is not None:
        raise UserError(
            "--processes and --process_id need --coordinator HOST:PORT, the address of process 0, "
            "the same in all processes (or auto on a TPU VM, GKE or SLURM)."
        )
    return None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise UserError(f"the environment's {variable} must be a number, not {text!r}.")
    return None if text is None else int(text)


def join(
    where: Place, *, wait_seconds: int = _JOIN_SECONDS, heartbeat_seconds: int = HEARTBEAT_SECONDS
) -> None:
    """Makes this process part of the run; call it before anything uses a device.

    Standard output then carries only what Python prints: native libraries write to standard error.

    Raises:
        UserError: the coordinator's port is taken, nobody answers there in ``wait_seconds``, or
            ``auto`` finds no cluster.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _free_stdout()
    options = {
        "initialization_timeout": wait_seconds,
        "heartbeat_timeout_seconds": heartbeat_seconds,
    }
    if where.coordinator == "auto":
        try:
            jax.distributed.initialize(**options)
        except ValueError as error:
            raise UserError(
                "--coordinator=auto: this is no TPU VM, GKE, SLURM or Open MPI job. Give "
                "--coordinator HOST:PORT, --processes and --process_id."
            ) from error
        return
    if where.process_id == 0:
        _check_free(where)
    else:
        _wait_for(where, wait_seconds)
    try:
        jax.distributed.initialize(
            where.coordinator,
            where.processes,
            where.process_id,
            cluster_detection_method="deactivate",
            **options,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {where.process_id} of {where.processes} could not join the run at "
            f"{where.coordinator} in {wait_seconds} s: {str(error).splitlines()[0]} Start all "
            f"{where.processes} processes, each with its own --process_id."
        ) from error


def _free_stdout() -> None:
    """Keeps standard output for Python; gloo and others write to descriptor 1."""
    sys.stdout.flush()
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # Somebody has replaced it by an object without one.
    if descriptor == 1:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)


def _check_free(where: Place) -> None:
    host, port = where.address
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--coordinator={where.coordinator}: process 0 cannot listen there "
                f"({error.strerror}). Give an address of this machine and a free port, the same "
                "in all processes."
            ) from error


def _wait_for(where: Place, seconds: float) -> None:
    """Waits until process 0 listens; JAX's own client would end the process without a word."""
    until = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(where.address, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"process {where.process_id} of {where.processes}: nobody answers at the "
                    f"coordinator {where.coordinator} ({error}). Start process 0 there, and give "
                    "all processes the same --coordinator."
                ) from error
        time.sleep(0.2)


def leave(status: int) -> None:
    """Ends this process's part with an exit status, without waiting for others that failed.

    After a success or a preemption all processes arrive here and part in order. After a failure
    the others may wait in a collective for ever, so this one hangs up at once, and they notice.
    """
    if not jax.distributed.is_initialized():
        return
    if status in (0, PREEMPTED):
        jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_primary() -> bool:
    """Returns whether this process writes, evaluates and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Lets process 0 run the block before the others do: it fills a cache that they read."""
    if not is_primary():
        meet(name)
    yield
    if is_primary():
        meet(name)


def meet(name: str) -> None:
    """Waits for all processes, without a collective: those give up after a time."""
    if jax.process_count() > 1:
        key = f"repalign/{name}/{next(_meetings)}"
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * _MEETING_SECONDS)


def local_rows(
    sharding: jax.sharding.Sharding, batch_size: int, *, axis: int = 0
) -> Int[np.ndarray, " rows"]:
    """Returns which rows of a global batch the devices of this process need, ascending.

    Processes whose devices hold copies of the same rows get the same rows.

    Args:
        sharding: of the batch.
        batch_size: of the global batch.
        axis: the batch axis of an array; those before it are not split.
    """
    spans = sharding.addressable_devices_indices_map((1,) * axis + (batch_size,)).values()
    ranges = {span[axis].indices(batch_size)[:2] for span in spans}
    return np.concatenate([np.arange(*one) for one in sorted(ranges)])


def to_host(tree: PyTree) -> PyTree:
    """Returns the whole arrays in the memory of every process; all processes have to call it."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


class PreemptionWatch:
    """Tells after which step to stop once SIGTERM has come; a context manager.

    In one process that is the next step. Among several any process may get the signal, and JAX's
    coordination service finds a step that none of them has passed.

    Args:
        alone: this process steps by itself, whatever others there are.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._shared = jax.process_count() > 1 and not alone
        self._received = False
        self._previous: Any = None

    def __enter__(self) -> "PreemptionWatch":
        # Among several processes JAX's own handler has to stay; other threads cannot have one.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def reached(self) -> bool:
        """Returns whether to stop after this step; call it once in every step."""
        if self._shared:
            # JAX compares numbers of calls: they start at 1 whatever step a run resumes at, so that
            # a signal before the first step is not lost.
            return multihost_utils.reached_preemption_sync_point(next(_questions))
        return self._received
