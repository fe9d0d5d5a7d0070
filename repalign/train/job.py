"""From a config and a topology to the file that starts the run there, checked beforehand."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from repalign.parallel import job_files, launch
from repalign.parallel.plan import check_compiler
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train.experiment import assemble
from repalign.train.plan import Request, plan


class Cluster(NamedTuple):
    """A kind of cluster.

    Attributes:
        make: returns the text of a job's file.
        suffix: how such files end.
        submit: the command that takes one.
    """

    make: Callable[[job_files.Job], str]
    suffix: str
    submit: str


CLUSTERS: Mapping[str, Cluster] = MappingProxyType(
    {
        "tpu-vm": Cluster(job_files.tpu_vm, "sh", "bash"),
        "gke": Cluster(job_files.gke, "yaml", "kubectl apply -f"),
        "slurm": Cluster(job_files.slurm, "sbatch", "sbatch"),
    }
)


def check_layout(config: str, overrides: Sequence[str], devices: int) -> None:
    """Raises UserError if a config cannot run or does not divide over so many devices."""
    parsed = assemble(configs.override(configs.load_config(config), overrides)).config
    launch.check_layout(
        parsed.mesh,
        parsed.data.batch_size,
        devices,
        accumulate_steps=parsed.optimizer.accumulate_steps,
    )


def job_file(
    cluster: Cluster,
    job: job_files.Job,
    config: str,
    overrides: Sequence[str],
    *,
    compile_first: bool = True,
) -> str:
    """Returns the text of a job's file, after checking that the config fits the machines.

    With ``compile_first`` the train step is compiled for them (see `repalign.train.plan.plan`) and
    a line on standard error says how much of a device's memory it takes; not so without the
    compiler for the topology, which another line says, or for several slices.

    Raises:
        UserError: what is missing or cannot be, and what would fit.
    """
    text = cluster.make(job)
    check_layout(config, overrides, job.devices)
    if not compile_first or job.slices > 1:
        return text
    try:
        check_compiler(job.topology)
    except UserError as error:
        print(f"repalign: not compiled beforehand: {error}", file=sys.stderr)
        return text
    memory = plan(Request(config, job.topology.name, tuple(overrides)))["memory"]
    used, capacity = memory["total"] / 2**30, memory["capacity"] / 2**30
    print(f"repalign: it takes {used:.1f} of {capacity:.1f} GiB a device", file=sys.stderr)
    return text
