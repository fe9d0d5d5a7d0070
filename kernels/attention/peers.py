"""torch's attention, timed in an interpreter that has it; ``bench`` runs this file.

Takes a JSON object as its argument and prints one: of each pass the seconds of every call and the
growth of the process's peak memory; or null if torch is not installed.
"""

import importlib.util
import json
import resource
import sys
import time

import numpy as np

KIB = 1024  # the unit of ru_maxrss on Linux


def main():
    """Times the output, then the output with gradients, and prints the result."""
    request = json.loads(sys.argv[1])
    if importlib.util.find_spec("torch") is None:
        print("null")
        return
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(request["threads"])
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    rng = np.random.default_rng(0)
    shape = tuple(request[name] for name in ("batch", "tokens", "heads", "dim"))
    arrays = [
        torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device, dtype)
        for _ in range(4)
    ]
    q, k, v, cotangent = (x.transpose(1, 2) for x in arrays)

    def forward():
        with torch.no_grad():
            scaled_dot_product_attention(q, k, v, is_causal=request["causal"])

    def backward():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, is_causal=request["causal"])
        torch.autograd.grad(out, leaves, cotangent)

    result = {}
    for name, call in (("forward", forward), ("backward", backward)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        seconds = []
        for _ in range(request["repeats"]):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result[name] = {"seconds": seconds, "temp_bytes": KIB * grown}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
