"""One library's contrastive loss, timed in an interpreter that has it; ``bench`` runs this file.

Takes a JSON object as its argument and prints one: seconds of every call of value and gradients,
the value, and the growth of the process's peak memory; or null if the library is not installed.
"""

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

    return {"nt_xent": nt_xent, "clip": clip, "siglip": siglip, "moco": moco}


def library_losses(request):
    """Returns the losses of the library asked for, which is installed."""
    if request["peer"] == "torch":
        return torch_losses(request)
    if request["peer"] == "lightly":
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(temperature=1.0 / request["scale"])
        return {"nt_xent": lambda a, b, scale, bias: criterion(a, b)}
    from open_clip.loss import ClipLoss, SigLipLoss

    return {
        "clip": lambda a, b, scale, bias: ClipLoss()(a, b, scale),
        "siglip": lambda a, b, scale, bias: SigLipLoss()(a, b, scale, bias),
    }


def main():
    """Times the loss and prints the result."""
    request = json.loads(sys.argv[1])
    installed = importlib.util.find_spec
    if installed("torch") is None or installed(request["peer"]) is None:
        print("null")
        return
    import torch

    torch.set_num_threads(request["threads"])
    rng, counts = np.random.default_rng(0), [request["examples"]] * 2
    vectors = []
    for count in counts + [request["queue"]] * bool(request["queue"]):
        x = rng.standard_normal((count, request["dim"]), dtype=np.float32)
        x = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))
        vectors.append(x.to(getattr(torch, request["dtype"])))
    for x in vectors[:2]:
        x.requires_grad_()
    scale = torch.tensor(request["scale"], requires_grad=True)
    bias = torch.tensor(request["bias"])
    function = library_losses(request)[request["loss"]]
    # Starts the peak anew: importing took more than a small loss does.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    seconds = []
    for _ in range(1 + request["repeats"]):
        start = time.perf_counter()
        value = function(*vectors, scale, bias)
        value.backward()
        seconds.append(time.perf_counter() - start)
        for x in (*vectors, scale):
            x.grad = None
    grown = peak_bytes() - before
    result = {"seconds": seconds[1:], "value": value.item(), "temp_bytes": grown}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
