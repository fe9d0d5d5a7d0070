"""Every loss with terms across examples: 8 devices equal one, with the collectives counted.

Two meshes: one axis ``data``, on which each loss is compiled alone and its collectives are counted,
and ``data`` x ``fsdp``, over which the batch is split as well, with all losses as one program. The
devices have to exist before JAX starts, so one process (this file as a script) measures everything
and prints a JSON document; its ``collectives`` and ``in_loops`` are what collectives.json records.
"""

import collections
import json
import pathlib
import re

import jax
import loss_cases
import pytest
import simulated_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from loss_cases import CASES

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SIZE = 128

# Options whose program differs in kind from the first case of their function.
FURTHER = {
    "info_nce/queue",
    "info_nce/positives_outside",
    "sup_con/inside",
    "intl/channel",
    "capi_clustering/together",
    "swapped_assignment/queue",
}
CROSS = {}
for name, case in CASES.items():
    if case.cross and (name in FURTHER or case.of not in {other.of for other in CROSS.values()}):
        CROSS[name] = case


def shapes(text):
    """Yields (collective, dimensions) for every array that a collective of the program returns."""
    kinds = "|".join(COLLECTIVES)
    for found in re.finditer(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", text):
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", found[1]):
            yield found[2], [int(size) for size in dimensions.split(",") if size]


def count(text):
    """How often each collective occurs in a program; one in a loop's body counts once."""
    kinds = re.findall(rf"= [^=\n]*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return {kind: kinds.count(kind) for kind in COLLECTIVES if kind in kinds}


def in_loops(text):
    """The number of collectives outside the program's entry."""
    entry = re.search(r"^ENTRY .*?^\}", text, re.M | re.S)[0]
    return sum(count(text).values()) - sum(count(entry).values())


def is_of_pairs(dimensions):
    """Whether an array is a matrix of pairs of examples, or the rows of some devices."""
    large = sorted(dimensions)[-2:]
    return len(large) == 2 and large[1] >= SIZE and large[0] > 0 and large[0] % (SIZE // 8) == 0


def errors(expected, actual):
    def error(x, y):
        return float(abs(x - y).max() / max(abs(x).max(), 1e-3))

    return {
        name: max(jax.tree.leaves(jax.tree.map(error, expected[name], actual[name])))
        for name in actual
    }


def measure():
    arrays = loss_cases.batch(SIZE)
    expected = jax.device_get(loss_cases.compiled(CROSS, SIZE)(*arrays))

    def sharded(cases, shape, axes):
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
        split = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(axes)))
        with jax.set_mesh(mesh):
            step = jax.jit(loss_cases.evaluate(cases)).lower(*split).compile(loss_cases.QUICKLY)
            return step.as_text(), errors(expected, jax.device_get(step(*split)))

    report = {"data": {}, "collectives": {}, "pairs": {}, "in_loops": {}}
    for name, case in CROSS.items():
        text, error = sharded({name: case}, (8,), ("data",))
        report["data"] |= error
        report["collectives"][name] = count(text)
        report["pairs"][name] = [x for x in shapes(text) if is_of_pairs(x[1])]
        report["in_loops"][name] = in_loops(text)
    text, report["data x fsdp"] = sharded(CROSS, (2, 4), ("data", "fsdp"))
    report["total"] = count(text)
    return report


@pytest.fixture(scope="module")
def report():
    return json.loads(simulated_devices.output(__file__))


@pytest.mark.parametrize("mesh", ["data", "data x fsdp"])
def test_equals_one_device(report, mesh):
    wrong = {name: error for name, error in report[mesh].items() if not error < 1e-4}
    assert not wrong
    assert report[mesh].keys() == CROSS.keys()


@pytest.fixture(scope="module")
def recorded():
    return json.loads((pathlib.Path(__file__).parent / "collectives.json").read_text())


def test_collectives_of_each_loss_are_no_more_than_recorded(report, recorded):
    assert recorded["collectives"].keys() == CROSS.keys()
    more = {
        name: counts
        for name, counts in report["collectives"].items()
        if not collections.Counter(counts) <= collections.Counter(recorded["collectives"][name])
    }
    assert not more
    assert all(report["collectives"].values()), "a loss over pairs has to communicate"
    several = collections.Counter()
    for counts in report["collectives"].values():
        several.update(counts)
    assert collections.Counter(report["total"]) <= several


def test_collectives_in_loops_are_no_more_than_recorded(report, recorded):
    assert not {
        name: number
        for name, number in report["in_loops"].items()
        if number > recorded["in_loops"][name]
    }


def test_no_matrix_of_pairs_travels(report):
    assert not {name: found for name, found in report["pairs"].items() if found}


if __name__ == "__main__":
    print(json.dumps(measure()))
