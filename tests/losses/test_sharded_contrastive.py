"""Contrastive losses on 8 simulated devices equal those on one, in value and gradient.

The devices have to exist before JAX starts, so the measurement runs in one process of its own (this
file as a script), which prints one JSON document for all tests.
"""

import json
import re

import contrastive_cases
import jax
import jax.numpy as jnp
import pytest
import simulated_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repalign.kernels.contrastive import api, sweep

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# Collectives that move embeddings, in the compiled step (values and both gradients). The dense form
# gathers each set of columns once and sums their gradient once; the streamed one gathers each side
# as values and normalisation mask (XLA moves the gather before that last select) and never sums.
EXPECTED = {
    "info_nce": {"all-gather": 1, "all-reduce": 1},
    "nt_xent": {"all-gather": 1, "all-reduce": 1},
    "clip": {"all-gather": 2, "all-reduce": 1},
    "siglip": {"all-gather": 1, "all-reduce": 1},
    "info_nce/streamed": {"all-gather": 4},
    "siglip/streamed": {"all-gather": 4},
}

# What has no term across examples, or is a special case of another entry, is left out.
NO_NEED = {
    "triplet",
    "alignment",
    "patch_info_nce",
    "mochi",
    "info_nce",
    "nt_xent",
    "dcl",
    "sup_con",
}
CROSS_EXAMPLE = {
    name: loss for name, loss in contrastive_cases.LOSSES.items() if name not in NO_NEED
}
STREAMED = ("info_nce", "nt_xent_where", "dclw", "sup_con", "sup_con_inside", "clip", "siglip")


def computations(text):
    """Splits compiled text into {name: body}; the entry is called ENTRY."""
    found = re.findall(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    return {"ENTRY" if entry else name: body for entry, name, body in found}


def count(text, shape=""):
    """Counts the collectives whose result's shape matches a pattern."""
    pattern = r"= [^\n=]*{}[^\n=]* {}(?:-start)?\("
    counts = {name: len(re.findall(pattern.format(shape, name), text)) for name in COLLECTIVES}
    return {name: number for name, number in counts.items() if number}


DIM = 8
EMBEDDINGS = rf"\[(?:\d+,)*{DIM}(?:,\d+)*\]"


def measure():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    a = jax.random.normal(jax.random.key(0), (128, DIM))
    b = jax.random.normal(jax.random.key(1), (128, DIM))

    def compiled(losses, *arrays):
        return jax.jit(contrastive_cases.evaluate(losses)).lower(*arrays).compile()

    def error(expected, actual):
        largest = jnp.maximum(jnp.max(jnp.abs(expected)), 1e-3)
        return float(jnp.max(jnp.abs(expected - actual)) / largest)

    report = {"errors": {}, "collectives": {}, "in_loops": {}}
    streamed = {name: contrastive_cases.LOSSES[name] for name in STREAMED}
    expected = compiled(CROSS_EXAMPLE | streamed, a, b)(a, b)
    sharded = jax.device_put((a, b), by_rows)
    with jax.set_mesh(mesh):
        for form in ("", "/streamed"):
            if form:
                api.DENSE_ENTRIES, sweep.BLOCK = 0, 32
                jax.clear_caches()
            losses = streamed if form else CROSS_EXAMPLE
            step = compiled(losses, *sharded)
            actual = step(*sharded)
            for name in losses:
                pairs = jax.tree.map(
                    error, jax.device_get(expected[name]), jax.device_get(actual[name])
                )
                report["errors"][name + form] = max(jax.tree.leaves(pairs))
            if form:
                bodies = computations(step.as_text())
                entry = bodies.pop("ENTRY")
                report["in_loops"] = {
                    name: count(body) for name, body in bodies.items() if count(body)
                }
                report["loops"] = entry.count(" while(")
                report["entry"] = count(entry)
            for name in EXPECTED:
                if name.endswith("/streamed") == bool(form):
                    bare = name.removesuffix("/streamed")
                    text = compiled({bare: contrastive_cases.LOSSES[bare]}, *sharded).as_text()
                    report["collectives"][name] = count(text, EMBEDDINGS)
    return report


@pytest.fixture(scope="module")
def report():
    return json.loads(simulated_devices.output(__file__, optimize=False))


def test_equal_to_one_device(report):
    wrong = {name: error for name, error in report["errors"].items() if not error < 1e-4}
    assert not wrong
    assert len(report["errors"]) == len(CROSS_EXAMPLE) + len(STREAMED)


def test_streaming_moves_nothing_inside_its_loops(report):
    assert report["loops"] >= 3 * len(STREAMED), "a forward and two backward passes each"
    assert report["entry"]["all-gather"] > 0
    assert not report["in_loops"]


@pytest.mark.parametrize("name", EXPECTED)
def test_collectives(report, name):
    assert report["collectives"][name] == EXPECTED[name]


if __name__ == "__main__":
    print(json.dumps(measure()))
