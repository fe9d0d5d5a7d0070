"""What the training loop costs beside the compiled step, and how long a start takes."""

import dataclasses
import statistics
import time
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


def bench_train(experiment: Experiment, source: Any, *, steps: int = 100) -> dict[str, float]:
    """Times the train step of an experiment on real batches; medians.

    Returns, in milliseconds: ``step_ms``, one step as the loop does it; ``fetch_ms``, the part of
    it that waits for the next batch; ``dispatch_ms``, a call of a compiled function that has the
    step's arguments and does nothing; ``overhead_ms``, those two together: the framework's time
    outside the compiled step. In seconds: ``compile_s``, lowering and compilation (from the cache
    if it holds the program), and ``start_s``, from nothing to the end of the first step.
    """
    begun = time.perf_counter()
    config = experiment.config
    replicated = config.replicas > 1
    mesh = make_mesh(config.mesh)
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
        state = dataclasses.replace(state, frozen=load_frozen(experiment.forward, mesh))
        compiling = time.perf_counter()
        compiled = compile_step(experiment, total_steps, state, as_specs(spec, sharding))
        compile_s = time.perf_counter() - compiling
        state, _ = jax.block_until_ready(compiled(state, next(loader)))
        start_s = time.perf_counter() - begun
        stepping, fetching = [], []
        for _ in range(steps):
            at = time.perf_counter()
            batch = next(loader)
            fetching.append(time.perf_counter() - at)
            state, metrics = jax.block_until_ready(compiled(state, batch))
            stepping.append(time.perf_counter() - at)
        nothing = jax.jit(lambda state, batch: (state, metrics), donate_argnums=0)
        nothing = nothing.lower(state, as_specs(spec, sharding)).compile()
        dispatching = []
        for _ in range(steps):
            at = time.perf_counter()
            state, _ = jax.block_until_ready(nothing(state, batch))
            dispatching.append(time.perf_counter() - at)
    fetch, dispatch = statistics.median(fetching), statistics.median(dispatching)
    step_s = statistics.median(stepping)
    return {
        "step_ms": 1e3 * step_s,
        "fetch_ms": 1e3 * fetch,
        "dispatch_ms": 1e3 * dispatch,
        "overhead_ms": 1e3 * (fetch + dispatch),
        "images_per_second": config.data.batch_size * config.replicas / step_s,
        "compile_s": compile_s,
        "start_s": start_s,
    }
