"""Twenty steps of whole experiments on 8 simulated devices equal those on one, mesh by mesh.

The devices have to exist before JAX starts, so this file runs as a script in one process of its
own, which prints one JSON document for all tests. What is compared: the loss of every step and all
parameters, the moving average among them, after the last.

Losses agree to LOSS relative, single-precision sums in another order; parameters to PARAMETERS of
each array's largest entry (of 1e-3 at least). Adam divides a gradient by its own size and so makes
much of noise: parameters whose gradient is zero but for rounding (the key's bias in attention,
which softmax does not see) would go anywhere. Hence an epsilon above that noise.
"""

import collections
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated_devices

from repalign.parallel.mesh import batch_sharding, make_mesh, state_shardings
from repalign.train import config as configs
from repalign.train import loop
from repalign.train.experiment import assemble

STEPS, BATCH = 20, 16
LOSS, PARAMETERS = 2e-5, 1e-3

TINY_VIT = {"model.width": 16, "model.depth": 2, "model.heads": 2}
EXPERIMENTS = {
    "repa:repa": {
        **TINY_VIT,
        "model.scan": True,
        "data.columns": {},
        "objective.repa.projector_width": 32,
    },
    "simclr:fashion_mnist": {
        "model.widths": (8, 16),
        "forward.head_hidden": 32,
        "forward.head_features": 16,
    },
    "mae:fashion_mnist": {
        **TINY_VIT,
        "forward.decoder_width": 16,
        "forward.decoder_depth": 1,
    },
    "vq_vae:vq_ema": {
        "model.width": 8,
        "model.dim": 8,
        "model.blocks": 0,
        "model.multipliers": (1, 1),
        "forward.quantizer.size": 64,
    },
}
MESHES = {
    "8x1x1": {"data": 8},
    "1x8x1": {"fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "8x1x1 explicit": {"data": 8, "explicit": True},
    "1x8x1 explicit": {"fsdp": 8, "explicit": True},
}
RUNS = [(name, mesh) for name in EXPERIMENTS for mesh in MESHES]
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def experiment(name, mesh):
    """A small variant of an experiment on a mesh."""
    raw = configs.complete(configs.load_config(name))
    fields = EXPERIMENTS[name] | {
        "data.batch_size": BATCH,
        "total_steps": STEPS,
        "optimizer.learning_rate": 1e-3,
        "optimizer.eps": 1e-4,
        "optimizer.average_decay": 0.9,
        "optimizer.warmup_steps": 2,
        "mesh.rules.smallest": 64,
        **{f"mesh.{axis}": size for axis, size in mesh.items()},
    }
    with raw.unlocked():
        for path, value in fields.items():
            *sections, key = path.split(".")
            functools.reduce(lambda section, part: section[part], sections, raw)[key] = value
    return assemble(raw)


def batches(name):
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = {
            "image": generator.integers(0, 256, (BATCH, 28, 28, 1)).astype(np.uint8),
            "label": generator.integers(0, 10, BATCH).astype(np.int32),
        }
        if name == "repa:repa":
            batch["teacher/patches"] = generator.normal(size=(BATCH, 16, 24)).astype(np.float32)
        yield batch


def initial_state(name):
    """The state before the first step, on one device, and the shapes of a batch."""
    setup = experiment(name, {})
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(batches(name)))
    init = jax.jit(loop.initializer(setup, STEPS))
    return init(loop.run_keys(setup.config.seeds), loop.zeros(spec)), spec


def train(name, mesh_fields, devices, start, spec):
    """Twenty steps; returns the losses, the state and the compiled step."""
    setup = experiment(name, mesh_fields)
    start = jax.tree.map(jnp.copy, start)  # The step takes its state's memory.
    mesh = make_mesh(setup.config.mesh, devices)
    rules, sharding = setup.config.mesh.sharding_rules(), batch_sharding(mesh, replicas=False)
    with jax.set_mesh(mesh):
        shardings = state_shardings(start, mesh, replicas=False, rules=rules)
        state = jax.device_put(start, shardings)
        step = loop.compile_step(setup, STEPS, state, loop.as_specs(spec, sharding))
        losses = []
        for batch in batches(name):
            state, metrics = step(state, jax.device_put(batch, sharding))
            losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses)), state, step


def measure():
    report = {}
    for name in EXPERIMENTS:
        start, spec = initial_state(name)
        expected, one, _ = train(name, {}, jax.devices()[:1], start, spec)
        kept = jax.device_get((one.params, one.average))
        for mesh in (mesh for other, mesh in RUNS if other == name):
            losses, state, step = train(name, MESHES[mesh], jax.devices(), start, spec)
            text = step.as_text()
            entry = text[text.index("\nENTRY ") :]
            counts, outside = count(text), count(entry)
            report[f"{name} {mesh}"] = {
                "loss": float(np.max(np.abs(losses - expected) / np.abs(expected))),
                "parameters": max(
                    jax.tree.leaves(jax.tree.map(error, kept, (state.params, state.average)))
                ),
                "collectives": dict(counts),
                "in_loops": dict(counts - outside),
                "split": [
                    sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
                    for tree in (state.params, state.average, state.optimizer)
                ],
                "donated": aliases(text) == len(jax.tree.leaves(state)),
                "first": float(expected[0]),
                "last": float(expected[-1]),
            }
    return report


def count(text):
    """How many collectives of each kind a compiled program's text has."""
    return collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))


def aliases(text):
    """How many outputs of a compiled program take the memory of an argument."""
    header = text[: text.index("\n")]
    return len(re.findall(r"\{\d+\}: \(\d+, \{\}, \w+-alias\)", header))


def error(expected, actual):
    """The largest difference relative to the largest entry, or to 1e-3 if that is smaller."""
    largest = max(float(np.max(np.abs(expected))), 1e-3)
    return float(np.max(np.abs(expected - np.asarray(actual)))) / largest


@pytest.fixture(scope="module")
def report():
    return json.loads(simulated_devices.output(__file__, optimize=False))


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_equal_to_one_device(report, name, mesh):
    found = report[f"{name} {mesh}"]
    assert found["loss"] < LOSS
    assert found["parameters"] < PARAMETERS
    assert found["donated"]
    # It trained, and not on copies: the moving average and both moments lie as the parameters do.
    assert found["last"] != pytest.approx(found["first"], rel=1e-3)
    params, average, moments = found["split"]
    assert (params > 0) == (mesh[0] != "8")
    assert 0 <= params - average < 7 and moments == 2 * params


def collectives(report, name, mesh):
    return report[f"{name} {mesh}"]["collectives"]


@pytest.mark.parametrize("name", ["repa:repa", "mae:fashion_mnist", "vq_vae:vq_ema"])
def test_data_parallel_steps_sum_gradients_and_nothing_else(report, name):
    """XLA joins the sums: of all gradients, and of what follows from them (their norm)."""
    found = collectives(report, name, "8x1x1")
    assert found.keys() == {"all-reduce"} and found["all-reduce"] <= 2


def test_global_negatives_gather_the_embeddings_once(report):
    """SimCLR, data-parallel: every image meets the views of all images of the global batch.

    all-gather, 3: the embeddings of all views, the columns of the loss, once; and twice one number
    an example, where the losses of the two views are joined.
    all-reduce, 2: the gradient of those columns, and the gradients of all parameters.
    """
    found = collectives(report, "simclr:fashion_mnist", "8x1x1")
    assert found == {"all-gather": 3, "all-reduce": 2}


def test_fsdp_gathers_each_matrix_before_each_use(report):
    """The counts of REPA with FSDP over 8 devices, blocks scanned (a loop's body counts once).

    all-gather, 7 in the forward body: the 5 matrices of a block (qkv, proj, fc1, fc2, modulation)
    and the two biases of 64 and more entries; 5 in the backward body: the matrices again, as they
    are not kept; 9 outside: patch embedding, the time's two, the final two, the projector's three,
    and the labels for the lookup in a table that is split by columns.
    all-to-all, 2: the looked-up embeddings from columns to examples, and their gradient back.
    all-reduce, 1 in the backward body, the gradients of a block (TPU and GPU turn this sum and the
    slice after it into a reduce-scatter, the CPU backend does not); 10 outside: gradients of the
    other arrays, the loss and the norms.
    """
    assert collectives(report, "repa:repa", "1x8x1") == {
        "all-gather": 21,
        "all-to-all": 2,
        "all-reduce": 11,
    }


def test_tensor_parallel_blocks_sum_once_a_branch(report):
    """On 2x2x2 matrices are gathered over fsdp as above, and tensor adds sums of activations.

    Forward body 3 all-reduces: after proj, after fc2 and after the modulation; backward body 2 (of
    the inputs of qkv and of fc1; the modulation's input has no tokens) and the gradients over data
    and fsdp. No all-to-all: whole heads and whole columns of the hidden layer lie on one device.
    """
    found = collectives(report, "repa:repa", "2x2x2")
    assert found.keys() == {"all-gather", "all-reduce", "collective-permute"}
    assert found["all-gather"] <= 24 and found["collective-permute"] <= 4
    assert report["repa:repa 2x2x2"]["in_loops"] == {"all-reduce": 8, "all-gather": 11}


if __name__ == "__main__":
    print(json.dumps(measure()))
