import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.parallel import distributed
from repalign.parallel.distributed import Place
from repalign.registry import UserError


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_flags_or_the_environment_say_which_process_this_is(no_cluster, monkeypatch):
    assert distributed.place(None, None, None) is None
    assert distributed.place("host:1234", 4, 0) == Place("host:1234", 4, 0)
    assert distributed.place("auto", None, None) == Place("auto")
    assert Place("[::1]:80", 1, 0).address == ("::1", 80)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    assert distributed.place(None, None, None) == Place("other:99", 8, 7)
    assert distributed.place(None, None, 3) == Place("other:99", 8, 3)
    monkeypatch.setenv("JAX_PROCESS_ID", "seven")
    with pytest.raises(UserError, match="JAX_PROCESS_ID must be a number, not 'seven'"):
        distributed.place(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 4, 0), "need --coordinator HOST:PORT, the address of process 0"),
        (("host", 4, 0), "must be HOST:PORT of process 0, such as"),
        (("host:port", 4, 0), "must be HOST:PORT of process 0"),
        (("host:70000", 4, 0), "must be HOST:PORT of process 0"),
        (("host:1", None, 0), "also needs --processes"),
        (("host:1", 4, None), "and --process_id"),
        (("host:1", 4, 4), "--process_id must be between 0 and 3 with --processes=4, not 4"),
    ],
)
def test_a_place_that_cannot_be_is_refused(no_cluster, arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.place(*arguments)


JOIN = """
import sys
from repalign.parallel import distributed
from repalign.registry import UserError
try:
    distributed.join(distributed.Place(sys.argv[1], 2, int(sys.argv[2])), wait_seconds=1)
except UserError as error:
    print(error)
"""


def test_joining_where_it_cannot_be_names_the_mistake():
    """A port that is taken, and a coordinator that is not there."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        first = output(taken, 0)
    assert f"--coordinator={taken}: process 0 cannot listen there (Address already in use" in first
    second = output(taken, 1)
    assert f"process 1 of 2: nobody answers at the coordinator {taken}" in second


def output(coordinator, process):
    done = subprocess.run(
        [sys.executable, "-c", JOIN, coordinator, str(process)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return done.stdout


class Interleaved(jax.sharding.Sharding):
    """The examples of a batch over eight devices, of which this process has some."""

    def __init__(self, own):
        self.own = own

    def addressable_devices_indices_map(self, global_shape):
        *leading, rows = global_shape
        share = rows // 8
        spans = [slice(device * share, (device + 1) * share) for device in self.own]
        return {index: (*(slice(None),) * len(leading), span) for index, span in enumerate(spans)}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_process_makes_the_rows_that_its_devices_need(axis):
    """Devices of a TPU host are no neighbours in the batch; copies are made once."""
    rows = distributed.local_rows(Interleaved([5, 0, 4, 1, 0]), 16, axis=axis)
    np.testing.assert_array_equal(rows, [0, 1, 2, 3, 8, 9, 10, 11])
    mesh = jax.make_mesh((1,), ("data",))
    whole = jax.NamedSharding(mesh, jax.P(*(None,) * axis, "data"))
    np.testing.assert_array_equal(distributed.local_rows(whole, 6, axis=axis), np.arange(6))


def test_in_one_process_nothing_waits_and_arrays_stay(capsys):
    order = []
    with distributed.primary_first("data"):
        order.append("made")
    tree = {"a": jnp.arange(3), "b": 2, "key": jax.random.key(0)}
    assert order == ["made"] and distributed.is_primary()
    assert distributed.to_host(tree) is not None
    assert distributed.to_host(tree)["a"] is tree["a"]
    distributed.leave(1)  # Ends nothing: this process joined no other.


def test_sigterm_is_seen_after_the_step_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.PreemptionWatch() as watch:
        assert not watch.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.reached() and watch.reached()
    assert signal.getsignal(signal.SIGTERM) is before
