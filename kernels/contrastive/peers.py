"""One library's losses, timed in an interpreter that has it; ``bench.Peer`` runs this file.

Reads a JSON object a line, answers each with one: ``{"prepare": {...}}`` with the loss's value at
given sizes and the growth of the process's peak memory over a call of value and gradients (null if
the library is not installed), ``{"call": null}`` with the seconds of one more such call.
"""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time

import numpy as np


def peak_bytes():
    """Returns the peak of this process's resident memory (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def torch_losses(request):
    """Returns the dense losses as users write them: one matrix of logits, a cross-entropy."""
    import torch
    from torch.nn import functional

    count = request["examples"]

    def nt_xent(a, b, scale, bias):
        views = torch.cat([a, b])
        logits = scale * views @ views.T
        logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool), float("-inf"))
        return functional.cross_entropy(logits, torch.arange(2 * count).roll(count))

    def info_nce(a, b, scale, bias):
        return functional.cross_entropy(scale * a @ b.T, torch.arange(count))

    def clip(a, b, scale, bias):
        logits, labels = scale * a @ b.T, torch.arange(count)
        return 0.5 * (
            functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)
        )

    def siglip(a, b, scale, bias):
        labels = 2 * torch.eye(count) - torch.ones(count, count)
        return -functional.logsigmoid(labels * (scale * a @ b.T + bias)).sum() / count

    def moco(a, b, queue, scale, bias):
        logits = scale * torch.cat([(a * b).sum(1, keepdim=True), a @ queue.T], dim=1)
        return functional.cross_entropy(logits, torch.zeros(count, dtype=torch.long))

    def spectral_contrastive(a, b, scale, bias):
        off_diagonal = (a @ b.T).masked_fill(torch.eye(count, dtype=torch.bool), 0.0)
        negatives = off_diagonal.square().sum() / (count * (count - 1))
        return negatives - 2.0 * (a * b).sum(1).mean()

    losses = (nt_xent, info_nce, clip, siglip, moco, spectral_contrastive)
    return {loss.__name__: loss for loss in losses}


def lightly_losses(request):
    """Returns lightly's losses."""
    from lightly import loss

    temperature = 1.0 / request["scale"]
    criteria = {
        "nt_xent": lambda: loss.NTXentLoss(temperature=temperature),
        "dcl": lambda: loss.DCLLoss(temperature=temperature),
        "dclw": lambda: loss.DCLWLoss(temperature=temperature),
        "barlow_twins": loss.BarlowTwinsLoss,
        "vicreg": loss.VICRegLoss,
        "tico": loss.TiCoLoss,
    }

    def called(make):
        # A new criterion a call: TiCo's keeps the covariance of the calls before.
        return lambda a, b, scale, bias: make()(a, b)

    return {name: called(make) for name, make in criteria.items()}


def open_clip_losses(request):
    """Returns open_clip's losses."""
    from open_clip.loss import ClipLoss, SigLipLoss

    return {
        "clip": lambda a, b, scale, bias: ClipLoss()(a, b, scale),
        "siglip": lambda a, b, scale, bias: SigLipLoss()(a, b, scale, bias),
    }


def metric_learning_losses(request):
    """Returns pytorch-metric-learning's losses."""
    import torch
    from pytorch_metric_learning.losses import SupConLoss

    criterion = SupConLoss(temperature=1.0 / request["scale"])
    labels = torch.arange(request["examples"]).repeat(2)
    return {"sup_con": lambda a, b, scale, bias: criterion(torch.cat([a, b]), labels)}


LIBRARIES = {
    "torch": torch_losses,
    "lightly": lightly_losses,
    "open_clip": open_clip_losses,
    "pytorch_metric_learning": metric_learning_losses,
}


@functools.lru_cache(maxsize=1)
def data(counts, dim):
    """Returns unit vectors, the same as ``bench.data``."""
    rng, vectors = np.random.default_rng(0), []
    for count in counts:
        x = rng.standard_normal((count, dim), dtype=np.float32)
        vectors.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return vectors


DISTRIBUTIONS = {
    "torch": "torch",
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
}


def prepare(request):
    """Returns a call of value and gradients at the sizes asked for; it returns the value."""
    import torch

    torch.set_num_threads(request["threads"])
    counts = (request["examples"],) * 2 + (request["queue"],) * bool(request["queue"])
    dtype = getattr(torch, request["dtype"])
    vectors = [torch.from_numpy(x).to(dtype) for x in data(counts, request["dim"])]
    if request["loss"] == "matmul":
        return lambda: float((vectors[0] @ vectors[1].T)[0, 0])
    for x in vectors[:2]:
        x.requires_grad_()
    scale = torch.tensor(request["scale"], requires_grad=True)
    bias = torch.tensor(request["bias"])
    function = LIBRARIES[request["peer"]](request)[request["loss"]]

    def call():
        value = function(*vectors, scale, bias)
        value.backward()
        for x in (*vectors, scale):
            x.grad = None
        return value.item()

    return call


def main():
    """Answers requests until there are no more."""
    call = None
    for line in sys.stdin:
        message = json.loads(line)
        if "call" in message:
            start = time.perf_counter()
            call()
            answer = {"seconds": time.perf_counter() - start}
        else:
            request, call, answer = message["prepare"], None, None
            installed = importlib.util.find_spec
            if installed("torch") is not None and installed(request["peer"]) is not None:
                call = prepare(request)
                # Starts the peak anew: importing took more than a small loss does.
                pathlib.Path("/proc/self/clear_refs").write_text("5")
                before, start = peak_bytes(), time.perf_counter()
                answer = {"value": call(), "first_seconds": time.perf_counter() - start}
                answer["temp_bytes"] = peak_bytes() - before
                distribution = DISTRIBUTIONS[request["peer"]]
                answer["version"] = importlib.metadata.version(distribution)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
