"""Plans as text, as Markdown tables and as the files of ``docs/plans``."""

import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from repalign.parallel import chips
from repalign.parallel import plan as compiling
from repalign.parallel.chips import GIB
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train.mesh_search import Search, search, with_mesh
from repalign.train.plan import (
    LIMIT_SECONDS,
    DoesNotCompile,
    OutOfMemory,
    Plan,
    Request,
    mesh_overrides,
    mesh_text,
    plan,
)

SCALING_CHIPS = (8, 16, 32, 64, 128, 256)
"""Sizes of the weak-scaling table."""

TABLE_TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
"""What `write_table` plans every full-scale config for."""

_CONSTANT = 0.01


def plan_command(name: str, topology: str, overrides: Sequence[str], flags: Any) -> int:
    """Carries out ``repalign plan`` for one config; returns the exit status."""
    mesh = () if flags.mesh is None else mesh_overrides(flags.mesh)
    request = Request(name, topology, (*overrides, *mesh))
    planned = functools.partial(plan, limit=float(flags.limit or LIMIT_SECONDS))
    if flags.search:
        found = search(request, planned=planned)
        document: Any = {**found._asdict(), "estimates": [one._asdict() for one in found.estimates]}
        shown = search_text(found)
    elif flags.scaling:
        document = scaling(request, planned=planned)
        shown = scaling_table(document)
        if flags.out is not None:
            write_scaling(pathlib.Path(flags.out), request, document)
    else:
        document = planned(request)
        shown = text(document)
    print(json.dumps(document) if flags.format == "json" else shown)
    return 0


def table_command(flags: Any) -> int:
    """Carries out ``repalign plan --table``; returns the exit status."""
    topologies = TABLE_TOPOLOGIES if flags.topology is None else tuple(flags.topology.split(","))
    for one in topologies:
        compiling.check_compiler(chips.topology(one))
    directory = pathlib.Path(flags.table)
    made = write_table(
        directory,
        topologies=topologies,
        names=None if flags.config is None else flags.config.split(","),
        planned=functools.partial(plan, limit=float(flags.limit or LIMIT_SECONDS)),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if flags.format == "json":
        print(json.dumps({"made": made, "directory": str(directory)}))
    else:
        print(f"{made} plans made; {directory / 'README.md'} written")
    return 0


def text(one: Plan) -> str:
    """Returns a plan as the command line prints it."""
    memory, seconds, flops = one["memory"], one["seconds"], one["flops"]
    free = memory["capacity"] - memory["total"]
    verdict = "fits" if free >= 0 else "does not fit"
    per_chip = one["devices"] // one["chips"]
    of_chip = f" (a chip is {per_chip} devices)" if per_chip > 1 else ""
    batch = f"{one['batch_size']:,}"
    if one["accumulate_steps"] > 1:
        batch += f" in {one['accumulate_steps']} microbatches"
    schedule = one["schedule"]
    lines = [
        f"{one['config']} on {one['topology']}: {one['chips']} chips, mesh "
        f"{mesh_text(one['mesh'])}, global batch {batch}, {one['parameters'] / 1e6:,.1f} M "
        "trained parameters",
        "",
        f"memory of a device{of_chip}",
        f"  arguments     {_gib(memory['arguments'])}",
        f"  temporaries   {_gib(memory['temporaries'])}",
        f"  outputs       {_gib(memory['outputs'])}   of which {_gib(memory['aliased']).strip()} "
        "over the arguments",
        f"  total         {_gib(memory['total'])}   of {_gib(memory['capacity']).strip()}: "
        f"{verdict}, {_gib(abs(free)).strip()} {'free' if free >= 0 else 'too much'}",
        "",
        "work of a device",
        f"  model FLOPs   {flops['model'] * _share(one) / 1e12:.3f} T "
        f"({flops['model'] / 1e9:,.1f} G an example)",
        f"  compiled      {flops['compiled'] / 1e12:.3f} T "
        f"({flops['compiled'] / (flops['model'] * _share(one)):.2f} of the model's)",
        f"  HBM traffic   {one['hbm_bytes'] / 1e9:.2f} GB",
    ]
    for row in one["collectives"]:
        lines.append(
            f"  {row['kind']} over {row['axes'] or 'nothing'} ({row['devices']} devices): "
            f"{row['calls']} calls, {row['bytes'] / 1e6:,.1f} MB in, "
            f"{row['sent_bytes'] / 1e6:,.1f} MB sent, {_ms(row['seconds'])}; mostly "
            f"{row['mostly'] or 'unnamed'}"
        )
    lines += [
        "",
        "time of a step (estimates)",
        f"  products {_ms(seconds['compute'])}, HBM {_ms(seconds['memory'])}, links "
        f"{_ms(seconds['links'])}: {seconds['binding']} binds",
        f"  without overlap {_ms(seconds['serial'])}, at best {_ms(seconds['bound'])}",
        f"  {_both(one['examples_per_second'], '{:,.1f}')} examples/s/chip, "
        f"model FLOPs utilization {_both(one['mfu'], '{:.1%}')}",
        f"  {schedule['steps']:,} steps: {_both(schedule['hours'], '{:,.1f}')} h, "
        f"{_both(schedule['chip_hours'], '{:,.0f}')} chip-hours",
        "",
        "assumptions",
        *(f"  {one}" for one in one["assumptions"]),
        *(f"  not counted: {note}" for note in one["notes"]),
        f"compiled in {one['compile_seconds']:.0f} s",
    ]
    return "\n".join(lines)


def search_text(found: Search) -> str:
    """Returns what a search found, and the plan of the best mesh."""
    lines = ["mesh" + " " * 26 + "memory, estimated   compiled   step without overlap"]
    plans = {mesh_text(one["mesh"]): one for one in found.plans}
    for estimate in found.estimates:
        name = mesh_text(estimate.mesh)
        line = f"{name:30}{estimate.memory / GIB:8.2f} GiB"
        if name in plans:
            memory, seconds = plans[name]["memory"]["total"], plans[name]["seconds"]["serial"]
            line += f"        {memory / GIB:8.2f} GiB {_ms(seconds):>12}"
        elif name in found.failed:
            line += "        did not compile"
        lines.append(line)
    lines += ["", found.reason]
    lines += [f"{name}: {why}" for name, why in found.failed.items()]
    if found.best is not None:
        lines += ["", text(found.best)]
    return "\n".join(lines)


def scaling(request: Request, *, planned: Callable[[Request], Plan] = plan) -> list[Plan]:
    """Plans the same work per chip on 8 to 256 chips of the request's kind.

    The batch grows with the chips; the mesh is the request's, with ``data`` taking what is left.

    Raises:
        UserError: the batch does not divide over the chips.
    """
    topology = chips.topology(request.topology)
    config = request.experiment().config
    share = config.data.batch_size / topology.chips
    if share != int(share) or config.mesh.data != -1:
        raise UserError(
            f"--scaling keeps the batch of a chip: {config.data.batch_size} examples on "
            f"{topology.chips} chips must be a whole number each, and mesh.data be -1."
        )
    names = chips.with_chips(topology.chip.name)
    plans = []
    for count in SCALING_CHIPS:
        if count in names:
            batch = f"--config.data.batch_size={int(share) * count}"
            one = request._replace(topology=names[count], overrides=(*request.overrides, batch))
            plans.append(planned(one))
    return plans


def scaling_table(plans: Sequence[Plan]) -> str:
    """Returns the weak-scaling table in Markdown, with what is not constant and why."""
    rows = [
        (
            one["topology"],
            f"{one['batch_size']:,}",
            f"{one['flops']['compiled'] / 1e12:.4f}",
            f"{one['hbm_bytes'] / 1e9:.2f}",
            f"{sum(row['bytes'] for row in one['collectives']) / 1e9:.3f}",
            f"{_sent(one) / 1e9:.3f}",
            _ms(one["seconds"]["links"]),
            _ms(one["seconds"]["serial"]),
        )
        for one in plans
    ]
    heading = ("topology", "batch", "TFLOP/chip", "HBM GB/chip", "collectives GB/chip")
    heading += ("sent GB/chip", "links", "step without overlap")
    return f"{_markdown(heading, rows)}\n\n{' '.join(_why(plans))}"


def _why(plans: Sequence[Plan]) -> list[str]:
    first, last = plans[0], plans[-1]
    sentences = []
    measures: tuple[tuple[str, Callable[[Plan], float]], ...] = (
        ("Products", lambda one: one["flops"]["compiled"]),
        ("HBM traffic", lambda one: one["hbm_bytes"]),
        (
            "What a chip gives to collectives",
            lambda one: sum(r["bytes"] for r in one["collectives"]),
        ),
    )
    for name, measure in measures:
        values = [measure(one) for one in plans]
        ratio = max(values) / min(values) - 1 if min(values) else math.inf
        same = "is constant" if name != "Products" else "are constant"
        if ratio <= _CONSTANT:
            sentences.append(f"{name} per chip {same} within {ratio:.2%}.")
        else:
            sentences.append(
                f"{name} per chip: {values[0]:.4g} on {first['chips']} chips, {values[-1]:.4g} on "
                f"{last['chips']} ({values[-1] / values[0] - 1:+.1%})."
            )
    growth = _sent(last) / _sent(first) if _sent(first) else 1.0
    sentences.append(
        f"What a chip sends grows {growth:.3f}-fold: a ring of n chips sends (n-1)/n of the data "
        f"for every reduction or gathering, {first['chips'] - 1}/{first['chips']} at first and "
        f"{last['chips'] - 1}/{last['chips']} at last; anything beyond is in the rows of "
        "collectives. A torus of more sides, or closed ones, has more links to send it over."
    )
    return sentences


def full_scale_configs() -> list[str]:
    """Returns the variants that declare ``data.spec``, as ``key:variant``: those of the papers."""
    found = []
    for key in configs.experiment_files():
        module = configs.load_experiment(key)
        for variant in module.VARIANTS:
            spec = module.get_config(variant).data
            if "spec" in spec and spec.spec is not None:
                found.append(f"{key}:{variant}")
    return found


def write_table(
    directory: pathlib.Path,
    *,
    topologies: Sequence[str] = TABLE_TOPOLOGIES,
    names: Sequence[str] | None = None,
    planned: Callable[[Request], Plan] = plan,
    progress: Callable[[str], None],
) -> int:
    """Plans full-scale configs for topologies; writes a JSON file each and ``README.md``.

    What is there already is kept if its config has not changed since, so an interrupted call
    continues. A config that does not fit replicated is planned again with parameters split over 16
    devices.

    Returns:
        How many plans were made now.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = 0
    for name in full_scale_configs() if names is None else names:
        digest = configs.digest(configs.load_config(name))
        for topology in topologies:
            path = directory / f"{name}_{topology}.json".replace(":", "_")
            if path.exists() and json.loads(path.read_text())["config_sha256"] == digest:
                continue
            progress(f"{name} on {topology}")
            outcome = _planned_or_why(Request(name, topology), planned)
            document = {"config_sha256": digest, "name": name, "on": topology, **outcome}
            path.write_text(json.dumps(document, indent=1) + "\n")
            made += 1
    write_readme(directory)
    return made


def write_readme(directory: pathlib.Path) -> None:
    """Writes ``README.md`` from the JSON files of a directory."""
    documents = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    plans = [one for one in documents if "plan" in one]
    scalings = [one for one in documents if "scaling" in one]
    refused = [one for one in documents if "refused" in one]
    rows = [_row(one["plan"]) for one in plans]
    parts = [
        "# Plans of the full-scale experiments",
        "Written by `repalign plan --table docs/plans`; one JSON file a row has everything "
        "`repalign plan` prints. Nobody has run these: each is the experiment's real train step, "
        "compiled for the topology without having it. Memory is the compiler's; the rest are "
        "estimates from the compiled text, each as *without overlap* / *at best*.",
        _markdown(_HEADING, rows),
        "A run of the paper's schedule costs the chip-hours of the last column.",
    ]
    if plans:
        parts.append("What the estimates assume: " + " ".join(plans[0]["plan"]["assumptions"]))
    parts += [f"* {one['name']} on {one['on']}: {one['refused']}" for one in refused]
    for one in scalings:
        parts += [
            f"## Weak scaling of `{one['name']}`",
            f"Written by `{one['command']}`. The same batch per chip, from "
            f"{one['scaling'][0]['chips']} to {one['scaling'][-1]['chips']} chips.",
            scaling_table(one["scaling"]),
        ]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n")


def write_scaling(directory: pathlib.Path, request: Request, plans: Sequence[Plan]) -> None:
    """Adds a weak-scaling table to a directory of plans."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = request.topology.partition(":")[0]
    command = " ".join(
        ["repalign plan --scaling", f"--config {request.config}", f"--topology {request.topology}"]
        + list(request.overrides)
    )
    document = {"name": request.config, "on": request.topology, "command": command}
    path = directory / f"scaling_{request.config}_{kind}.json".replace(":", "_")
    path.write_text(json.dumps({**document, "scaling": list(plans)}, indent=1) + "\n")
    write_readme(directory)


_SPLIT = 16
_HEADING = (
    "config", "topology", "mesh", "batch", "memory of a device, GiB", "model TFLOP/chip",
    "HBM GB/chip", "sent GB/chip", "step, ms", "binds", "examples/s/chip", "MFU", "steps",
    "chip-hours",
)  # fmt: skip


def _planned_or_why(request: Request, planned: Callable[[Request], Plan]) -> dict[str, Any]:
    try:
        return {"plan": planned(request)}
    except OutOfMemory:
        try:
            mesh = {"fsdp": _SPLIT}
            return {"plan": planned(with_mesh(request, mesh))}
        except DoesNotCompile as error:
            return {"refused": str(error)}
    except UserError as error:
        return {"refused": str(error)}


def _row(one: Plan) -> tuple[str, ...]:
    memory, seconds = one["memory"], one["seconds"]
    return (
        f"`{one['config']}`",
        one["topology"],
        mesh_text(one["mesh"]),
        f"{one['batch_size']:,}",
        f"{memory['total'] / GIB:.2f} of {memory['capacity'] / GIB:.2f}",
        f"{one['flops']['model'] * _share(one) / 1e12:.3f}",
        f"{one['hbm_bytes'] / 1e9:.1f}",
        f"{_sent(one) / 1e9:.2f}",
        f"{1e3 * seconds['serial']:.1f} / {1e3 * seconds['bound']:.1f}",
        seconds["binding"],
        _both(one["examples_per_second"], "{:,.0f}"),
        _both(one["mfu"], "{:.1%}"),
        f"{one['schedule']['steps']:,}",
        _both(one["schedule"]["chip_hours"], "{:,.0f}"),
    )


def _share(one: Plan) -> float:
    """Returns how many examples of a step one device has."""
    return one["batch_size"] / one["devices"]


def _sent(one: Plan) -> float:
    return sum(row["sent_bytes"] for row in one["collectives"])


def _both(values: dict[str, float], form: str) -> str:
    return f"{form.format(values['serial'])} / {form.format(values['bound'])}"


def _gib(size: int | float) -> str:
    return f"{size / GIB:7.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
