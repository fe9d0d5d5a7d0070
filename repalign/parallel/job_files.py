"""Job files that run one config on many machines: TPU VMs, GKE and SLURM.

Nothing here talks to a cloud: each function returns the text of a file that a person reads and
submits. Sources: Cloud TPU's and GKE's documentation (cloud.google.com/tpu/docs/runtimes,
sdk/gcloud/reference/compute/tpus/queued-resources, kubernetes-engine/docs/concepts/plan-tpus; read
2026-11), JobSet's TPU example (kubernetes-sigs/jobset@08dfbdf:
site/static/examples/tpu-multislice/v6e-jax-workload.yaml), Google's own launcher
(AI-Hypercomputer/xpk@367c838:src/xpk/core/system_characteristics.py), SLURM's man pages.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import yaml

from repalign.parallel.chips import Topology
from repalign.parallel.distributed import PREEMPTED
from repalign.registry import UserError

GRACE_SECONDS = 180
"""From SIGTERM to SIGKILL, for one step and one checkpoint; Google's spot machines give 30 at most.

What a run loses if that is too short is bounded by ``checkpoint_every``.
"""

_MOUNT = "/gcs"
_MAX_RESTARTS = 10


class _TpuNames(NamedTuple):
    """What Google's products call a chip.

    Attributes:
        cloud_type: of the Cloud TPU API; None where only GKE offers the chip.
        runtime: ``--runtime-version`` of the Cloud TPU API.
        accelerator: GKE's node label cloud.google.com/gke-tpu-accelerator.
    """

    cloud_type: str | None
    runtime: str | None
    accelerator: str


_TPUS: Mapping[str, _TpuNames] = MappingProxyType(
    {
        "v4": _TpuNames("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
        "v5e": _TpuNames("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
        "v5p": _TpuNames("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
        "v6e": _TpuNames("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
        "tpu7x": _TpuNames(None, None, "tpu7x"),
    }
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        name: a DNS label, which every product here takes.
        topology: the machines of one slice, or the hosts and their GPUs.
        arguments: of ``repalign train`` without ``--workdir``.
        workdir: ``gs://BUCKET/PATH`` on Google's clouds, a path of the shared file system on SLURM.
        slices: how many such slices, joined by the network (JobSet only).
        image: a container image in which ``repalign`` runs (Google's clouds).
        project, zone: of Google's cloud (TPU VMs).
        spot: whether to take machines that can be called back at any time.
        time: SLURM's limit, such as ``24:00:00``.
        partition, account: SLURM's, where it wants them.

    Raises:
        UserError: a name that is no DNS label.
    """

    name: str
    topology: Topology
    arguments: Sequence[str]
    workdir: str
    slices: int = 1
    image: str | None = None
    project: str | None = None
    zone: str | None = None
    spot: bool = False
    time: str | None = None
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--name {self.name!r} must start with a lower-case letter and hold only those, "
                f"digits and hyphens, 40 at most, such as {default_name(self.name)!r}."
            )

    @property
    def devices(self) -> int:
        """Devices of all slices, as JAX counts them."""
        return self.slices * self.topology.devices


def default_name(text: str) -> str:
    """Returns a DNS label that resembles a text."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (label if label[:1].isalpha() else f"run-{label}")[:40].strip("-")


def tpu_vm(job: Job) -> str:
    """Returns a shell script: a queued resource, and the run on all its workers.

    The script can be run again at any time: it creates only what is missing, and the run continues
    from its last checkpoint.

    Raises:
        UserError: the topology is none of the Cloud TPU API, a flag is missing, or there is more
            than one slice.
    """
    names = _tpu_names(job, "tpu-vm")
    if names.cloud_type is None:
        raise UserError(
            f"--topology {job.topology.name}: the Cloud TPU API has no {job.topology.chip.name}; "
            "use repalign launch gke."
        )
    if job.slices != 1:
        raise UserError("--slices: tpu-vm runs one slice; use repalign launch gke for several.")
    image, project, zone = (
        _required(job, field, "tpu-vm") for field in ("image", "project", "zone")
    )
    bucket, workdir = _bucket(job)
    mount = f"{_MOUNT}/{bucket}"
    place = f"--project={shlex.quote(project)} --zone={shlex.quote(zone)}"
    key, packages = "/usr/share/keyrings/cloud.google.asc", "https://packages.cloud.google.com/apt"
    prepare = f"""set -e
if ! command -v gcsfuse > /dev/null; then
  curl -fsSL {packages}/doc/apt-key.gpg | sudo tee {key} > /dev/null
  echo "deb [signed-by={key}] {packages} gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse
fi
sudo mkdir -p {mount}
mountpoint -q {mount} || sudo gcsfuse --implicit-dirs -o allow_other {bucket} {mount}
sudo docker start {job.name} 2> /dev/null ||
  sudo docker run --detach --name {job.name} --privileged --net=host \\
  --stop-timeout {GRACE_SECONDS} -v {mount}:{mount} {shlex.quote(image)} \\
  {shlex.join(_train(job, workdir))}"""
    follow = f"sudo docker logs --follow {job.name}; exit $(sudo docker wait {job.name})"
    spot = " --spot" if job.spot else ""
    # A flat slice is known by its number of chips; cubes of one number of chips differ in shape.
    kind = (
        f"--accelerator-type={names.cloud_type}-{job.topology.chips}"
        if len(job.topology.shape) == 2
        else f"--type={names.cloud_type} --topology={_sides(job)}"
    )
    return f"""#!/usr/bin/env bash
# {_title(job)}
# Run it again after an interruption: the run continues from its last checkpoint.
set -euo pipefail
trap 'echo "To give the machines back: gcloud compute tpus queued-resources delete" \
  "{job.name} {place} --force"' EXIT

state() {{
  gcloud compute tpus queued-resources describe {job.name} \\
    {place} --format='value(state.state)' 2> /dev/null || true
}}

case "$(state)" in
  SUSPENDED | FAILED)
    gcloud compute tpus queued-resources delete {job.name} \\
      {place} --force --quiet ;;
esac
if [ -z "$(state)" ]; then
  gcloud compute tpus queued-resources create {job.name} --node-id={job.name} \\
    {place} \\
    {kind} --runtime-version={names.runtime}{spot}
fi
until [ "$(state)" = ACTIVE ]; do
  case "$(state)" in
    SUSPENDED | FAILED) echo "the queued resource {job.name} is $(state)" >&2; exit 1 ;;
  esac
  sleep 30
done

PREPARE=$(cat << 'END'
{prepare}
END
)
gcloud compute tpus tpu-vm ssh {job.name} \\
  {place} --worker=all --command="$PREPARE"
gcloud compute tpus tpu-vm ssh {job.name} \\
  {place} --worker=all --command={shlex.quote(follow)}
"""


def gke(job: Job) -> str:
    """Returns a JobSet (YAML): one replicated job a slice, one pod a host of four chips.

    A preempted run (exit status 75, or a node that goes away) restarts without limit, a mistake of
    the user's (2) never, anything else ten times.

    Raises:
        UserError: the topology is no TPU slice, or a flag is missing.
    """
    names = _tpu_names(job, "gke")
    image = _required(job, "image", "gke")
    bucket, workdir = _bucket(job)
    chips = min(job.topology.chips, 4)
    hosts = job.topology.chips // chips
    selector = {
        "cloud.google.com/gke-tpu-accelerator": names.accelerator,
        "cloud.google.com/gke-tpu-topology": _sides(job),
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "repalign",
        "image": image,
        "command": _train(job, workdir),
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "bucket", "mountPath": f"{_MOUNT}/{bucket}"}],
    }
    volume = {
        "name": "bucket",
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": bucket, "mountOptions": "implicit-dirs"},
        },
    }
    pod = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "nodeSelector": selector,
            "containers": [container],
            "volumes": [volume],
        },
    }
    failed = {"containerName": "repalign", "operator": "In"}
    slice_job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": failed | {"values": [2, PREEMPTED]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
            ]
        },
        "template": pod,
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": _MAX_RESTARTS,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [
                            f".*exit code {PREEMPTED} .*",
                            ".*DisruptionTarget.*",
                        ],
                    },
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [".*exit code 2 .*"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": job.slices,
                    "template": {"spec": slice_job},
                }
            ],
        },
    }
    text = yaml.safe_dump(job_set, sort_keys=False, width=100)
    return f"# {_title(job)}\n# kubectl apply -f FILE\n{text}"


def slurm(job: Job) -> str:
    """Returns an sbatch script: one process a GPU, a new start in the queue after a preemption.

    Raises:
        UserError: the topology is none of GPUs, a workdir in a bucket, or a flag is missing.
    """
    if job.topology.chip.platform != "cuda":
        raise UserError(
            f"--topology {job.topology.name}: slurm runs GPUs, such as h100:4x8 (hosts x GPUs); "
            "TPUs run on tpu-vm or gke."
        )
    if job.slices != 1:
        raise UserError("--slices: a SLURM job is one; give more hosts in --topology instead.")
    if "://" in job.workdir:
        raise UserError(
            f"--workdir {job.workdir}: give a path of the file system that all nodes share."
        )
    hosts, gpus = job.topology.shape
    options = {
        "job-name": job.name,
        "nodes": hosts,
        "ntasks-per-node": gpus,
        "gpus-per-node": gpus,
        "time": _required(job, "time", "slurm"),
        "signal": f"TERM@{GRACE_SECONDS}",
        "open-mode": "append",
        "output": f"{job.name}-%j.log",
    }
    options |= {
        field: getattr(job, field)
        for field in ("partition", "account")
        if getattr(job, field) is not None
    }
    lines = "\n".join(f"#SBATCH --{name}={value}" for name, value in options.items())
    return f"""#!/usr/bin/env bash
# {_title(job)}
# sbatch FILE, from the environment in which repalign runs.
{lines}
#SBATCH --requeue

# SLURM sends SIGTERM {GRACE_SECONDS} s before the time is up, and when it preempts the job: the run
# saves itself, ends with status {PREEMPTED} and waits in the queue for its next turn.
status=0
srun --kill-on-bad-exit=1 \\
  {shlex.join(_train(job, job.workdir))} || status=$?
if [ "$status" -eq {PREEMPTED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _train(job: Job, workdir: str) -> list[str]:
    return ["repalign", "train", *job.arguments, f"--workdir={workdir}", "--coordinator=auto"]


def _title(job: Job) -> str:
    slices = f"{job.slices} slices of " if job.slices > 1 else ""
    return f"{slices}{job.topology.name}: {job.devices} devices, {shlex.join(job.arguments)}"


def _sides(job: Job) -> str:
    return "x".join(map(str, job.topology.shape))


def _tpu_names(job: Job, command: str) -> _TpuNames:
    if job.topology.chip.name not in _TPUS:
        raise UserError(
            f"--topology {job.topology.name}: {command} runs TPUs, such as v5e:16x16; GPUs run on "
            "slurm."
        )
    return _TPUS[job.topology.chip.name]


def _required(job: Job, field: str, command: str) -> str:
    value = getattr(job, field)
    if value is None:
        raise UserError(f"repalign launch {command} needs --{field}.")
    return value


def _bucket(job: Job) -> tuple[str, str]:
    """Returns the bucket of the workdir, and the workdir below its mount."""
    found = re.fullmatch(r"gs://([a-z0-9][-_.a-z0-9]{1,61}[a-z0-9])/([^\s']+)", job.workdir)
    if found is None:
        raise UserError(
            f"--workdir {job.workdir}: the workers share no disk; give gs://BUCKET/PATH (a bucket "
            "with a hierarchical namespace, in which orbax can rename folders)."
        )
    return found[1], f"{_MOUNT}/{found[1]}/{found[2]}"
