import json
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from repalign.parallel import chips, job_files
from repalign.parallel.distributed import PREEMPTED
from repalign.registry import UserError

SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())["schema"]

GCLOUD = {
    "compute tpus queued-resources create": (
        "zone project runtime-version accelerator-type topology type node-id node-count "
        "node-prefix async boot-disk data-disk description guaranteed internal-ips labels metadata "
        "metadata-from-file network range reserved scopes service-account shielded-secure-boot "
        "spot subnetwork tags valid-after-duration valid-after-time valid-until-duration "
        "valid-until-time"
    ),
    "compute tpus queued-resources describe": "zone project format",
    "compute tpus queued-resources delete": "zone project async force quiet",
    "compute tpus tpu-vm ssh": (
        "zone project dry-run force-key-file-overwrite internal-ip plain ssh-flag ssh-key-file "
        "strict-host-key-checking worker command output-directory ssh-key-expiration "
        "ssh-key-expire-after"
    ),
}
"""Flags of each command and gcloud's own: cloud.google.com/sdk/gcloud/reference, read 2026-11."""

SBATCH = {
    "job-name": r"[a-z0-9-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "signal": r"(B:|R:)?\w+@\d+",
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "partition": r"\S+",
    "account": r"\S+",
    "requeue": r"",
}
"""Options of sbatch and what they take, those used here: slurm.schedmd.com/sbatch.html."""


def job(topology, **changes):
    given = {
        "name": "repa-xl2",
        "arguments": ("--config", "repa:imagenet256_xl2", "--config.mesh.fsdp=4"),
        "workdir": "gs://bucket/runs/xl2",
        "image": "us-docker.pkg.dev/p/r/repalign:1",
        "project": "a-project",
        "zone": "us-west4-a",
        "time": "24:00:00",
    }
    return job_files.Job(topology=chips.topology(topology), **(given | changes))


def faults(value, schema, place="JobSet"):
    """What of a value a structural schema of Kubernetes refuses; unknown fields are faults too."""
    if "x-kubernetes-int-or-string" in schema:
        return [] if isinstance(value, int | str) else [f"{place}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{place}: {value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value!r} is none of {schema['enum']}"]
    if isinstance(value, list):
        return [
            fault
            for index, one in enumerate(value)
            for fault in faults(one, schema["items"], f"{place}[{index}]")
        ]
    if not isinstance(value, dict):
        return []
    missing = {*schema["required"]} - {*value} if "required" in schema else set()
    found = [f"{place}: no {name}" for name in sorted(missing)]
    for name, one in value.items():
        if "properties" in schema and name in schema["properties"]:
            found += faults(one, schema["properties"][name], f"{place}.{name}")
        elif "additionalProperties" in schema:
            found += faults(one, schema["additionalProperties"], f"{place}.{name}")
        else:
            found.append(f"{place}: unknown field {name}")
    return found


def shell_faults(text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    return done.stderr


@pytest.mark.parametrize(
    ("topology", "hosts", "chips_of_one", "accelerator"),
    [
        ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v6e:1x1", 1, 1, "tpu-v6e-slice"),
        ("v5p:4x4x8", 32, 4, "tpu-v5p-slice"),
        ("v4:2x2x2", 2, 4, "tpu-v4-podslice"),
        ("tpu7x:4x4x4", 16, 4, "tpu7x"),
    ],
)
def test_a_job_set_fits_the_schema_and_the_slice(topology, hosts, chips_of_one, accelerator):
    job_set = yaml.safe_load(job_files.gke(job(topology, slices=2, spot=True)))
    assert faults(job_set, SCHEMA) == []
    (slices,) = job_set["spec"]["replicatedJobs"]
    one = slices["template"]["spec"]
    pod = one["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2 and one["parallelism"] == one["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips_of_one}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    assert container["command"] == [
        *("repalign", "train", "--config", "repa:imagenet256_xl2", "--config.mesh.fsdp=4"),
        *("--workdir=/gcs/bucket/runs/xl2", "--coordinator=auto"),
    ]
    mount = container["volumeMounts"][0]
    assert mount == {"name": pod["volumes"][0]["name"], "mountPath": "/gcs/bucket"}
    codes, condition = one["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [2, PREEMPTED]
    preempted, mistake = job_set["spec"]["failurePolicy"]["rules"]
    message = "Container repalign for pod a/b failed with exit code {} matching FailJob rule"
    for status, rule in ((PREEMPTED, preempted), (2, mistake)):
        patterns = rule["onJobFailureMessagePatterns"]
        assert any(re.fullmatch(one, message.format(status) + " at index 0") for one in patterns)
        assert not any(re.search(one, message.format(22)) for one in patterns)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(replicatedJob=spec.pop("replicatedJobs")),
        lambda spec: spec["failurePolicy"].update(maxRestarts="10"),
        lambda spec: spec["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda spec: spec["replicatedJobs"][0].pop("name"),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(change):
    job_set = yaml.safe_load(job_files.gke(job("v5e:4x4")))
    change(job_set["spec"])
    assert faults(job_set, SCHEMA)


def gcloud_calls(script):
    """The calls of gcloud in a script: (command, its flags)."""
    joined = script.replace("\\\n", " ")
    calls = []
    for command in GCLOUD:
        for call in re.findall(rf"gcloud {command} ([^\n;)\"]*)", joined):
            calls.append((command, set(re.findall(r"--([a-z-]+)", call.partition("'")[0]))))
    return calls


@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        ("v5e:16x16", "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite"),
        ("v6e:16x16", "--accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e"),
        ("v5p:4x4x8", "--type=v5p --topology=4x4x8 --runtime-version=v2-alpha-tpuv5"),
        ("v4:4x4x4", "--type=v4 --topology=4x4x4 --runtime-version=tpu-ubuntu2204-base"),
    ],
)
def test_a_tpu_vm_script_is_shell_and_its_flags_exist(topology, kind):
    script = job_files.tpu_vm(job(topology, spot=True))
    assert shell_faults(script) == "" and f"{kind} --spot" in script
    calls = gcloud_calls(script)
    assert {command for command, _ in calls} == set(GCLOUD)
    for command, used in calls:
        assert used <= set(GCLOUD[command].split()), command
    assert script.count("--worker=all") == 2
    train = "repalign train --config repa:imagenet256_xl2 --config.mesh.fsdp=4"
    assert f"{train} --workdir=/gcs/bucket/runs/xl2 --coordinator=auto" in script


def test_what_the_workers_run_survives_the_quoting(tmp_path):
    """The script runs for real here, with a gcloud that only writes down what it is given."""
    log = tmp_path / "calls"
    fake = tmp_path / "gcloud"
    fake.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> "$LOG"; printf "\\n\\0" >> "$LOG"\n'
        'case "$*" in *describe*) [ -e "$LOG.made" ] && echo ACTIVE ;;\n'
        '*create*) touch "$LOG.made" ;; esac\n'
    )
    fake.chmod(0o755)
    script = job_files.tpu_vm(job("v5e:4x4", arguments=("--config", "it's:one two")))
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "To give the machines back" in done.stdout, done.stderr
    calls = [call.strip("\0").split("\0") for call in log.read_text().split("\0\n\0") if call]
    assert ["create" in call for call in calls] == [False, False, True, False, False, False]
    prepare, follow = (call[-1].removeprefix("--command=") for call in calls[-2:])
    assert shell_faults(prepare) == "" and shell_faults(follow) == ""
    assert shlex.split(prepare.splitlines()[-1]) == [
        *("repalign", "train", "--config", "it's:one two"),
        *("--workdir=/gcs/bucket/runs/xl2", "--coordinator=auto"),
    ]
    assert follow == "sudo docker logs --follow repa-xl2; exit $(sudo docker wait repa-xl2)"


def test_an_sbatch_script_is_shell_and_its_options_exist():
    script = job_files.slurm(job("h100:4x8", workdir="/shared/xl2", partition="gpu", account="lab"))
    assert shell_faults(script) == ""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, flags=re.MULTILINE))
    for name, value in options.items():
        assert re.fullmatch(SBATCH[name], value), name
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (
        ("4", "8", "8")
    )
    directives = script.splitlines()
    last = max(i for i, line in enumerate(directives) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in directives[: last + 1])


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (PREEMPTED, True), (1, False)])
def test_an_sbatch_script_queues_again_after_a_preemption_only(tmp_path, status, requeued):
    log = tmp_path / "calls"
    for name, ends in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {log}\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", job_files.slurm(job("h100:8", workdir="/shared/xl2"))],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"},
    )
    calls = log.read_text().splitlines()
    assert done.returncode == status
    assert calls[0].startswith("srun --kill-on-bad-exit=1 repalign train --config repa:imagenet256")
    assert calls[1:] == (["scontrol requeue 17"] if requeued else [])


@pytest.mark.parametrize(
    ("make", "topology", "changes", "message"),
    [
        ("gke", "h100:8", {}, "gke runs TPUs, such as v5e:16x16; GPUs run on slurm"),
        ("tpu_vm", "tpu7x:2x2x1", {}, "the Cloud TPU API has no tpu7x; use repalign launch gke"),
        ("tpu_vm", "v5e:4x4", {"slices": 2}, "tpu-vm runs one slice; use repalign launch gke"),
        ("tpu_vm", "v5e:4x4", {"zone": None}, "repalign launch tpu-vm needs --zone"),
        ("gke", "v5e:4x4", {"image": None}, "repalign launch gke needs --image"),
        ("gke", "v5e:4x4", {"workdir": "/data/x"}, "share no disk; give gs://BUCKET/PATH"),
        ("slurm", "v5e:4x4", {}, "slurm runs GPUs, such as h100:4x8"),
        ("slurm", "h100:8", {}, "give a path of the file system that all nodes share"),
        ("slurm", "h100:8", {"workdir": "/x", "time": None}, "launch slurm needs --time"),
        ("slurm", "h100:8", {"workdir": "/x", "slices": 2}, "give more hosts in --topology"),
        ("gke", "v5e:4x4", {"name": "Repa_XL"}, "such as 'repa-xl'"),
    ],
)
def test_mistakes_say_what_works(make, topology, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(job_files, make)(job(topology, **changes))


def test_default_names_are_labels():
    assert job_files.default_name("repa:imagenet256_xl2") == "repa-imagenet256-xl2"
    assert job_files.default_name("9/Lives") == "run-9-lives"
    assert len(job_files.default_name("a" * 90)) == 40
