"""Plans an experiment's train step for machines that nobody has at hand: see `plan`.

Every compilation runs in a process of its own: the compilers for TPUs and GPUs need settings that
must be there before jax starts, and a layout whose compilation does not end can be given up.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from repalign.parallel import chips, roofline
from repalign.parallel import plan as compiling
from repalign.parallel.definition import model_flops
from repalign.parallel.mesh import (
    batch_sharding,
    check_batch,
    make_mesh,
    state_shardings,
)
from repalign.parallel.rules import MESH_AXES
from repalign.registry import UserError, nearest
from repalign.train import config as configs
from repalign.train.experiment import Experiment, assemble
from repalign.train.loop import abstract_state, as_specs, batch_spec, compile_step
from repalign.train.state import TrainState, parameter_count

Plan = dict[str, Any]
"""A plan as JSON has it: see `plan_step` for its keys."""

LIMIT_SECONDS = 600.0
"""How long one compilation may take."""

IMAGENET_EXAMPLES = 1_281_167
"""For configs that count epochs: the data need not be here. All full-scale ones use ImageNet."""


class Request(NamedTuple):
    """What to plan.

    Attributes:
        config: ``key:variant`` or ``file.py:variant``.
        topology: name of a topology (see `repalign.parallel.chips`).
        overrides: ``--config.a.b=c``, the mesh among them.
    """

    config: str
    topology: str
    overrides: tuple[str, ...] = ()

    def experiment(self) -> Experiment:
        """Returns the experiment, checked but not compiled."""
        raw = configs.override(configs.load_config(self.config), self.overrides)
        return assemble(raw)


class DoesNotCompile(UserError):
    """A step that another mesh might make compile: the compiler itself crashed on this one."""


class OutOfMemory(DoesNotCompile):
    """A step that does not fit; the text says by how much, and what would fit."""


class TooSlow(DoesNotCompile):
    """A compilation that was given up."""


def plan(request: Request, *, limit: float = LIMIT_SECONDS) -> Plan:
    """Compiles an experiment's real train step for a topology and returns what it costs.

    Nothing is read or computed: state and batch are shapes with shardings, and the step is compiled
    by `repalign.train.loop.compile_step`, in another process.

    Raises:
        UserError: a topology or config that does not exist, a mesh or batch that does not divide, a
            compiler that is not installed, a step that does not fit (`OutOfMemory`), whose
            compilation takes longer than ``limit`` seconds (`TooSlow`) or on which the compiler
            crashes (`DoesNotCompile`).
    """
    check(request)
    try:
        return _in_another_process("step", request, limit)
    except subprocess.TimeoutExpired as error:
        raise TooSlow(
            f"compiling {request.config} for {request.topology} on mesh "
            f"{mesh_text(sizes(request))} took longer than {limit:.0f} s and was given up; "
            "a smaller fsdp axis or another model.remat compiles quicker."
        ) from error


def estimated(request: Request) -> list[Any]:
    """Returns `repalign.train.mesh_search.estimates`, made in another process."""
    from repalign.train.mesh_search import Estimate

    rows = _in_another_process("estimates", request, LIMIT_SECONDS)
    return [Estimate(*row) for row in rows]


def check(request: Request) -> Experiment:
    """Returns the experiment of a request, or raises UserError for anything wrong with it."""
    topology = chips.topology(request.topology)
    experiment = request.experiment()
    experiment.example_spec()
    sizes = experiment.config.mesh.sizes(topology.devices)
    mesh = jax.sharding.AbstractMesh(sizes, MESH_AXES)
    check_batch(
        experiment.config.data.batch_size,
        mesh,
        accumulate_steps=experiment.config.optimizer.accumulate_steps,
    )
    compiling.check_compiler(topology)
    return experiment


def plan_step(request: Request) -> Plan:
    """Compiles in this process, which must have `repalign.parallel.plan.compiler_environment`.

    Returns:
        ``config``, ``overrides``, ``topology``, ``chips``, ``devices``, ``mesh``, ``batch_size``,
        ``accumulate_steps``, ``parameters``; ``memory`` (bytes of one device, ``capacity`` among
        them), ``flops`` (``model``: of the definition, without recomputation, for one example;
        ``compiled``: of the compiled step, for one device), ``hbm_bytes`` (of one device),
        ``collectives`` (rows by kind and mesh axes, for one device), ``seconds`` (a
        `repalign.parallel.roofline.Roofline`), ``examples_per_second`` (of one chip) and ``mfu``
        (share of the peak that the model's own FLOPs take), both for ``serial`` and ``bound``;
        ``schedule`` (the whole run: steps, hours and chip-hours), ``notes``, ``assumptions``,
        ``compile_seconds``, ``versions``.

    Raises:
        repalign.parallel.plan.OutOfMemory: the compiler found no way to fit the step.
    """
    topology = chips.topology(request.topology)
    experiment = request.experiment()
    config = experiment.config
    total_steps = config.steps(IMAGENET_EXAMPLES)
    mesh = make_mesh(config.mesh, compiling.devices(topology))
    spec, state = abstract(experiment, total_steps)
    placed = place(experiment, state, mesh)
    batch = as_specs(spec, batch_sharding(mesh, replicas=config.replicas > 1))
    begun = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = compile_step(experiment, total_steps, placed, batch)
    except jax.errors.JaxRuntimeError as error:
        full = compiling.out_of_memory(error)
        if full is None:
            raise
        raise full from error
    seconds = time.perf_counter() - begun
    step = compiling.measure(compiled, mesh, topology)
    examples = config.data.batch_size * config.replicas
    flops = model_flops_per_example(request, examples)
    times = {"serial": step.roofline.serial, "bound": step.roofline.bound}
    peak = topology.devices * topology.chip.peak_flops
    return {
        "config": request.config,
        "overrides": list(request.overrides),
        "topology": topology.name,
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": dict(mesh.shape),
        "batch_size": config.data.batch_size,
        "accumulate_steps": config.optimizer.accumulate_steps,
        "parameters": parameter_count(state.params) // config.replicas,
        "memory": {**step.memory._asdict(), "total": step.memory.total},
        "flops": {"model": flops, "compiled": step.cost.flops},
        "hbm_bytes": step.cost.hbm_bytes,
        "collectives": compiling.collective_rows(step),
        "seconds": {**step.roofline._asdict(), "binding": step.roofline.binding},
        "examples_per_second": {
            name: examples / (value * topology.chips) for name, value in times.items()
        },
        "mfu": {name: flops * examples / (value * peak) for name, value in times.items()},
        "schedule": {
            "steps": total_steps,
            "hours": {name: total_steps * value / 3600 for name, value in times.items()},
            "chip_hours": {
                name: total_steps * value / 3600 * topology.chips for name, value in times.items()
            },
        },
        "notes": list(step.cost.notes),
        "assumptions": list(roofline.ASSUMPTIONS),
        "compile_seconds": seconds,
        "versions": {"jax": jax.__version__},
    }


def abstract(experiment: Experiment, total_steps: int) -> tuple[dict[str, Any], TrainState]:
    """Returns the shapes of the global batch and of the whole state."""
    spec = batch_spec(experiment, experiment.example_spec())
    return spec, abstract_state(experiment, total_steps, spec)


def place(experiment: Experiment, state: TrainState, mesh: Any) -> TrainState:
    """Returns the shapes of a state with the shardings that training gives it on a mesh."""
    config = experiment.config
    rules = config.mesh.sharding_rules()
    own = dataclasses.replace(state, frozen=None)
    shardings = state_shardings(own, mesh, replicas=config.replicas > 1, rules=rules)
    frozen = state_shardings(state.frozen, mesh, replicas=False, rules=rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        dataclasses.replace(shardings, frozen=frozen),
    )


def model_flops_per_example(request: Request, examples: int) -> float:
    """Returns the FLOPs that one example's step asks for by its definition: no rematerialisation.

    Forward and backward of everything trained, forward of what is frozen. Traced on one device,
    without accumulation.
    """
    raw = configs.override(configs.load_config(request.config), request.overrides)
    with raw.unlocked():
        _without_remat(raw)
        raw.mesh = ml_collections.ConfigDict()
    experiment = assemble(raw)
    spec, state = abstract(experiment, 1)
    step = experiment.step(1)
    if experiment.config.replicas > 1:
        axes = jax.tree.map(lambda leaf: 0, dataclasses.replace(state, frozen=None))
        step = jax.vmap(step, in_axes=(axes, 0), out_axes=(axes, 0))
    return model_flops(step, state, spec) / examples


def _without_remat(section: ml_collections.ConfigDict) -> None:
    for key, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            _without_remat(value)
        elif key == "remat":
            del section[key]
            return _without_remat(section)
    return None


def mesh_overrides(text: str) -> tuple[str, ...]:
    """Turns ``data=64,fsdp=4`` into overrides of the config.

    Raises:
        UserError: an axis that no mesh has, or a size that is no number.
    """
    overrides = []
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES:
            raise UserError(f"--mesh {text}: no axis {axis!r}. {nearest(axis, MESH_AXES)}")
        if not size.lstrip("-").isdigit():
            raise UserError(f"--mesh {text}: give {axis} a number, such as {axis}=4.")
        overrides.append(f"--config.mesh.{axis}={size}")
    return tuple(overrides)


def sizes(request: Request) -> dict[str, int]:
    """Returns the mesh of a request."""
    devices = chips.topology(request.topology).devices
    return dict(zip(MESH_AXES, request.experiment().config.mesh.sizes(devices), strict=True))


def mesh_text(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as ``--mesh`` takes it, without the axes of one device."""
    shown = [f"{axis}={size}" for axis, size in mesh.items() if size > 1 or axis == "data"]
    return ",".join(shown)


def _in_another_process(task: str, request: Request, limit: float) -> Any:
    """Returns what a task of `_TASKS` makes of a request; its UserErrors are raised here."""
    with tempfile.TemporaryDirectory() as directory:
        answer = pathlib.Path(directory) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "repalign.train.plan", task, json.dumps(request), str(answer)],
            env=compiling.compiler_environment(),
            capture_output=True,
            text=True,
            timeout=limit,
        )
        if done.returncode < 0:
            checks = re.findall(r"Check failed: .*", done.stderr)
            raise DoesNotCompile(
                f"the compiler crashed on {request.config} for {request.topology} with "
                f"{mesh_text(sizes(request))}: {checks[0] if checks else f'{done.stderr[-500:]}'} "
                "Another --mesh or topology may compile."
            )
        if done.returncode or not answer.exists():
            raise RuntimeError(f"the compiling process failed:\n{done.stderr[-4000:]}")
        outcome, value = json.loads(answer.read_text())
    if outcome != "done":
        raise {"does not fit": OutOfMemory, "mistake": UserError}[outcome](value)
    return value


def _does_not_fit(request: Request, error: compiling.OutOfMemory) -> str:
    """Says by how much a step is too big, and what is estimated to fit instead."""
    from repalign.train.mesh_search import what_fits

    return (
        f"{request.config} with a batch of {request.experiment().config.data.batch_size} does not "
        f"fit into {request.topology} on mesh {mesh_text(sizes(request))}: a step {error}. "
        f"{what_fits(request, error.needed, error.available)}"
    )


def _estimates(request: Request) -> Any:
    from repalign.train.mesh_search import estimates

    return estimates(request)


_TASKS = {"step": plan_step, "estimates": _estimates}


def _work(task: str, request: Request, answer: pathlib.Path) -> None:
    """Writes what a task makes of a request, or what was wrong with it, to a file."""
    try:
        outcome = "done", _TASKS[task](request)
    except compiling.OutOfMemory as error:
        outcome = "does not fit", _does_not_fit(request, error)
    except UserError as error:
        outcome = "mistake", str(error)
    answer.write_text(json.dumps(outcome))


if __name__ == "__main__":
    config_name, topology_name, flags = json.loads(sys.argv[2])
    _work(sys.argv[1], Request(config_name, topology_name, tuple(flags)), pathlib.Path(sys.argv[3]))
