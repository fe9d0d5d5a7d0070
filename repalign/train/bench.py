"""What the training loop costs beside the compiled step, how long a start takes, what data does."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from repalign.data import pipeline
from repalign.parallel.mesh import batch_sharding, make_mesh
from repalign.train.experiment import Experiment
from repalign.train.loop import (
    as_specs,
    batch_spec,
    compile_step,
    initializer,
    load_frozen,
    run_keys,
    zeros,
)


def bench_train(
    experiment: Experiment, source: Any, *, steps: int = 20, rounds: int = 9
) -> dict[str, float]:
    """Times the train step of an experiment on real batches, in rounds of ``steps``; medians.

    Returns, in milliseconds a step: ``loop_ms``, fetching batches and stepping as the loop does,
    waiting for the device only at the end of a round; ``alone_ms``, the same on one batch that is
    already there; ``dispatch_ms``, a call of a compiled function that has the step's arguments and
    does nothing; ``overhead_ms``, ``loop_ms - alone_ms + dispatch_ms``: the framework's time
    outside the compiled step. In seconds: ``compile_s``, lowering and compilation (from the cache
    if it holds the program), and ``start_s``, from nothing to the end of the first step.
    """
    begun = time.perf_counter()
    config = experiment.config
    replicated = config.replicas > 1
    mesh, rules = make_mesh(config.mesh), config.mesh.sharding_rules()
    sharding = batch_sharding(mesh, replicas=replicated)
    total_steps = config.steps(len(source))
    batches = pipeline.TrainingBatches(
        source,
        config.data.batch_size,
        seed=None if replicated else config.seeds[0],
        replicas=config.seeds if replicated else None,
    )
    with (
        pipeline.DeviceLoader(pipeline.Loader(batches), sharding=sharding) as loader,
        jax.set_mesh(mesh),
    ):
        spec = batch_spec(experiment, source.columns)
        init = initializer(experiment, total_steps)
        state = jax.jit(init)(run_keys(config.seeds), zeros(spec))
        state = dataclasses.replace(state, frozen=load_frozen(experiment.forward, mesh, rules))
        compiling = time.perf_counter()
        compiled = compile_step(experiment, total_steps, state, as_specs(spec, sharding))
        compile_s = time.perf_counter() - compiling
        state, metrics = jax.block_until_ready(compiled(state, next(loader)))
        start_s = time.perf_counter() - begun
        batch = next(loader)
        nothing = jax.jit(lambda state, batch: (state, metrics), donate_argnums=0)
        nothing = nothing.lower(state, as_specs(spec, sharding)).compile()

        def milliseconds(step: Callable[..., Any], batches: Iterator[Any]) -> float:
            nonlocal state
            at = time.perf_counter()
            for one in itertools.islice(batches, steps):
                state, _ = step(state, one)
            jax.block_until_ready(state)
            return 1e3 * (time.perf_counter() - at) / steps

        times: dict[str, list[float]] = {"loop_ms": [], "alone_ms": [], "dispatch_ms": []}
        for _ in range(rounds):  # In turn, so that a change of the machine's speed meets all.
            times["loop_ms"].append(milliseconds(compiled, loader))
            times["alone_ms"].append(milliseconds(compiled, itertools.repeat(batch)))
            times["dispatch_ms"].append(milliseconds(nothing, itertools.repeat(batch)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    images = config.data.batch_size * config.replicas
    return {
        **medians,
        "overhead_ms": medians["loop_ms"] - medians["alone_ms"] + medians["dispatch_ms"],
        "images_per_second": 1e3 * images / medians["loop_ms"],
        "compile_s": compile_s,
        "start_s": start_s,
    }


def bench_input(
    experiment: Experiment, source: Any, *, steps: int = 50, rounds: int = 9
) -> list[dict[str, Any]]:
    """Times the input pipeline of an experiment beside what its train step takes in; medians.

    Returns a row for each of: ``host``, batches made by grain's threads; ``device``, the same
    copied to the devices as in training; ``step``, what the compiled step of this machine needs
    (see `bench_train`, ``alone_ms``). A row has ``images_per_second``, ``ms_per_batch`` and
    ``times_the_step``, how many times what the step needs it delivers. A step that comes before the
    pipeline has filled its buffers waits longer; rounds start with full ones.
    """
    config = experiment.config
    replicated = config.replicas > 1
    sharding = batch_sharding(make_mesh(config.mesh), replicas=replicated)
    batches = pipeline.TrainingBatches(
        source,
        config.data.batch_size,
        seed=None if replicated else config.seeds[0],
        replicas=config.seeds if replicated else None,
    )

    def milliseconds(loader: Iterator[Any]) -> float:
        next(loader)
        times = []
        for _ in range(rounds):
            at = time.perf_counter()
            for batch in itertools.islice(loader, steps):
                jax.block_until_ready(batch)
            times.append(1e3 * (time.perf_counter() - at) / steps)
        return statistics.median(times)

    with pipeline.Loader(batches) as host:
        found = {"host": milliseconds(host)}
    with pipeline.DeviceLoader(pipeline.Loader(batches), sharding=sharding) as device:
        found["device"] = milliseconds(device)
    found["step"] = bench_train(experiment, source, steps=5, rounds=3)["alone_ms"]
    images = config.data.batch_size * config.replicas
    return [
        {
            "part": part,
            "images_per_second": 1e3 * images / ms,
            "ms_per_batch": ms,
            "times_the_step": found["step"] / ms,
        }
        for part, ms in found.items()
    ]
