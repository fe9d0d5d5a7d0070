"""Which mesh for an experiment on a topology: estimates for all, compilation for the best."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from repalign.parallel import chips
from repalign.parallel.chips import GIB, Topology
from repalign.parallel.definition import peak_live_bytes
from repalign.parallel.mesh import BATCH_AXES
from repalign.parallel.rules import MESH_AXES
from repalign.registry import UserError
from repalign.train import plan as planning
from repalign.train.plan import IMAGENET_EXAMPLES, Plan, Request

COMPILED = 3
"""How many meshes a search compiles."""

MARGIN = 1.25
"""A mesh is left out if its estimate is above this share of a device: estimates are high."""

_TENSOR = (1, 2, 4, 8)


class Estimate(NamedTuple):
    """What a mesh is expected to need, before anything is compiled.

    Attributes:
        mesh: sizes of the axes.
        arguments: bytes of state and batch on a device: exact.
        temporaries: bytes of gradients and of what the step's definition keeps alive at once, on
            one device's share of the batch, as if nothing were fused and ``tensor`` split all of
            it; rough (see `repalign.parallel.definition`).
        sent: bytes that a device sends: gradients over ``data`` and ``replica``; over ``fsdp``
            parameters twice and gradients once; over ``tensor`` half of what is kept alive.
        seconds: to read and write the state once and to send that over two links. Products take
            equally long on every mesh and are left out.
    """

    mesh: Mapping[str, int]
    arguments: int
    temporaries: int
    sent: float
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of a device."""
        return self.arguments + self.temporaries


class Search(NamedTuple):
    """What a search found.

    Attributes:
        best: the plan with the shortest serial time of those that fit; None if none does.
        plans: those that compiled, best first.
        failed: meshes (as text) that did not, and why.
        estimates: of every mesh that divides devices and batch, quickest first.
        reason: why the best one, in words.
    """

    best: Plan | None
    plans: list[Plan]
    failed: dict[str, str]
    estimates: list[Estimate]
    reason: str


def search(
    request: Request,
    *,
    compiled: int = COMPILED,
    planned: Callable[[Request], Plan] = planning.plan,
) -> Search:
    """Finds a mesh: estimates all that divide, compiles the ``compiled`` most promising.

    Meshes that the estimate puts above a device's memory are left out; those that do not compile in
    time, do not fit after all or crash the compiler are reported, and the next is taken.

    Raises:
        UserError: see `repalign.train.plan.plan`; or no mesh divides the batch.
    """
    planning.check(request._replace(overrides=_without_mesh(request.overrides)))
    every = planning.estimated(request)
    capacity = chips.topology(request.topology).chip.usable_memory
    fitting = [one for one in every if one.memory <= MARGIN * capacity]
    queue = _diverse(fitting) or sorted(every, key=lambda one: one.memory)[:compiled]
    plans: list[Plan] = []
    failed: dict[str, str] = {}
    for one in queue:
        if len(plans) == compiled or len(failed) == compiled:
            break
        try:
            plans.append(planned(with_mesh(request, one.mesh)))
        except planning.DoesNotCompile as error:
            failed[planning.mesh_text(one.mesh)] = str(error)
    plans.sort(key=lambda one: one["seconds"]["serial"])
    return Search(plans[0] if plans else None, plans, failed, every, _reason(plans, every, fitting))


def _diverse(every: list[Estimate]) -> list[Estimate]:
    """Puts the quickest of each size of ``tensor`` first: estimates say least about these."""
    first = {one.mesh["tensor"]: one for one in reversed(every)}
    chosen = [one for one in every if one is first[one.mesh["tensor"]]]
    return chosen + [one for one in every if one not in chosen]


def estimates(request: Request) -> list[Estimate]:
    """Returns an estimate for every mesh that divides the devices and the batch, quickest first.

    Raises:
        UserError: none does.
    """
    topology = chips.topology(request.topology)
    experiment = request.experiment()
    config = experiment.config
    _, state = planning.abstract(experiment, config.steps(IMAGENET_EXAMPLES))
    microbatch = config.data.batch_size // config.optimizer.accumulate_steps
    # A peak grows with the examples: in proportion, or nearly so.
    one, two = (_live_bytes(request, examples) for examples in (1, 2))
    found = []
    for mesh in meshes(topology.devices):
        shards = math.prod(mesh[axis] for axis in BATCH_AXES)
        if microbatch % shards:
            continue
        try:
            placed = planning.place(
                experiment, state, jax.sharding.AbstractMesh(tuple(mesh.values()), MESH_AXES)
            )
        except UserError:  # The rules cannot split an array this way.
            continue
        if mesh["tensor"] > 1 and not _splits(placed, "tensor"):
            continue
        examples = microbatch // shards
        live = int(one + (examples - 1) * (two - one))
        found.append(_estimate(mesh, placed, live, topology))
    if not found:
        raise UserError(
            f"no mesh of {request.topology} divides a batch of {config.data.batch_size} in "
            f"{config.optimizer.accumulate_steps} part(s): with tensor=8, "
            f"--config.data.batch_size has to be a multiple of {max(topology.devices // 8, 1)}."
        )
    return sorted(found, key=lambda one: one.seconds)


def meshes(devices: int) -> list[dict[str, int]]:
    """Returns the meshes worth a look: tensor up to 8, fsdp any divisor of what is left."""
    return [
        {"replica": 1, "data": devices // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
        for tensor in _TENSOR
        if devices % tensor == 0
        for fsdp in range(1, devices // tensor + 1)
        if devices // tensor % fsdp == 0
    ]


def with_mesh(request: Request, mesh: Mapping[str, int]) -> Request:
    """Returns the request for another mesh."""
    flags = (f"--config.mesh.{axis}={size}" for axis, size in mesh.items())
    return request._replace(overrides=(*_without_mesh(request.overrides), *flags))


def what_fits(request: Request, needed: float, available: float) -> str:
    """Says what could be changed about a step that needs too much memory, by estimate.

    The estimate of another mesh is corrected by how far the estimate of this one was from what the
    compiler said.
    """
    config = request.experiment().config
    sizes = dict(
        zip(MESH_AXES, config.mesh.sizes(chips.topology(request.topology).devices), strict=True)
    )
    every = estimates(request)
    here = next((one for one in every if one.mesh == sizes), None)
    advice = []
    if here is not None:
        factor = max(needed - here.arguments, 0) / here.temporaries
        other = [
            one for one in every if one.arguments + factor * one.temporaries < 0.95 * available
        ]
        if other:
            size = (other[0].arguments + factor * other[0].temporaries) / GIB
            advice.append(f"--mesh {planning.mesh_text(other[0].mesh)} (about {size:.1f} GiB)")
        room = available - here.arguments
        shards = math.prod(sizes[axis] for axis in BATCH_AXES)
        smaller = int(config.data.batch_size * 0.95 * room / (needed - here.arguments))
        if room > 0 and smaller // shards:
            advice.append(f"--config.data.batch_size={smaller // shards * shards}")
        # The smaller batch holds accumulate_steps microbatches of this size.
        microbatch = smaller // config.optimizer.accumulate_steps
        parts = [
            count
            for count in range(2, config.data.batch_size // shards + 1)
            if config.data.batch_size % (count * shards) == 0
            and config.data.batch_size <= count * microbatch
        ]
        if parts:
            advice.append(f"--config.optimizer.accumulate_steps={parts[0]}")
    said = f"What should fit, by estimate: {'; or '.join(advice)}." if advice else ""
    if "remat" in config.model and config.model["remat"] != "nothing_saveable":
        said += " --config.model.remat=nothing_saveable saves memory for time."
    return said.strip()


def _estimate(mesh: Mapping[str, int], placed: Any, live: int, topology: Topology) -> Estimate:
    chip = topology.chip
    arguments = sum(map(_local_bytes, jax.tree.leaves(placed)))
    copies, split, tensor = mesh["data"] * mesh["replica"], mesh["fsdp"], mesh["tensor"]
    parameters = sent = 0.0
    for leaf in jax.tree.leaves(placed.params):
        own = _local_bytes(leaf)
        parameters += own
        # Parameters and gradients travel as bf16, half of their float32.
        if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            sent += (3 * (split - 1) + 2 * (copies - 1) / copies) * own / 2
        else:
            sent += 2 * (1 - 1 / (copies * split)) * own / 2
    sent += live * (tensor - 1) / tensor / 2
    temporaries = int(live / tensor + parameters)
    seconds = 2 * arguments / chip.memory_bandwidth + sent / (2 * chip.link_bandwidth)
    return Estimate(dict(mesh), arguments, temporaries, sent, seconds)


def _live_bytes(request: Request, examples: int) -> int:
    """Returns the peak of what the step keeps alive for a number of examples on one device."""
    overrides = (
        *_without_mesh(request.overrides),
        f"--config.data.batch_size={examples}",
        "--config.optimizer.accumulate_steps=1",
    )
    experiment = request._replace(overrides=overrides).experiment()
    spec, state = planning.abstract(experiment, 1)
    if experiment.config.replicas > 1:
        axes = jax.tree.map(lambda leaf: 0, dataclasses.replace(state, frozen=None))
        step = jax.vmap(experiment.step(1), in_axes=(axes, 0), out_axes=(axes, 0))
    else:
        step = experiment.step(1)
    shapes = {leaf.shape for leaf in jax.tree.leaves((state.params, state.frozen))}
    return peak_live_bytes(step, state, spec, parameters=shapes)


def _local_bytes(leaf: Any) -> int:
    size = math.prod(leaf.sharding.shard_shape(leaf.shape))
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    return size * (8 if is_key else leaf.dtype.itemsize)


def _splits(placed: Any, axis: str) -> bool:
    """Says whether any array of a state lies split along a mesh axis."""
    return any(
        axis in jax.tree.leaves(tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(placed)
    )


def _without_mesh(overrides: tuple[str, ...]) -> tuple[str, ...]:
    sizes = tuple(f"--config.mesh.{axis}=" for axis in MESH_AXES)
    return tuple(one for one in overrides if not one.startswith(sizes))


def _reason(plans: list[Plan], every: list[Estimate], fitting: list[Estimate]) -> str:
    if not plans:
        return "no mesh that was compiled fits"
    best, *others = plans
    text = (
        f"of {len(every)} meshes {len(fitting)} may fit by estimate; of the {len(plans)} compiled, "
        f"{planning.mesh_text(best['mesh'])} has the shortest step without overlap "
        f"({1e3 * best['seconds']['serial']:.1f} ms, {best['seconds']['binding']} binds)"
    )
    if others:
        rest = ", ".join(
            f"{planning.mesh_text(one['mesh'])} {1e3 * one['seconds']['serial']:.1f} ms"
            for one in others
        )
        text += f"; the others: {rest}"
    return text
