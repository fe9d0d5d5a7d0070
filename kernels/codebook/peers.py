"""Libraries' nearest codes, timed in an interpreter that has them; ``bench`` runs this.

Takes a JSON object as its argument and prints one: the seconds of each call, the growth of the
process's peak memory, and the file of its indices; null where the library is not installed.
"""

import importlib.util
import json
import pathlib
import resource
import sys
import time

import numpy as np

KIB = 1024  # the unit of ru_maxrss on Linux

# What users hold as one matrix goes by rows where the matrix would pass this.
MATRIX_BYTES = 2**31


def _in_rows(nearest, z, codes):
    import torch

    rows = max(1, MATRIX_BYTES // (4 * codes))
    return lambda: torch.cat([nearest(part) for part in z.split(rows)]).numpy()


def torch_search(z, codebook, request):
    """``torch.cdist`` and ``argmin``; for cosine the product of unit vectors."""
    import torch

    torch.set_num_threads(request["threads"])
    z, codebook = torch.from_numpy(z), torch.from_numpy(codebook)

    def nearest(z):
        if request["distance"] == "cosine":
            return (torch.nn.functional.normalize(z) @ unit.T).argmax(1)
        return torch.cdist(z, codebook).argmin(1)

    unit = torch.nn.functional.normalize(codebook)
    return _in_rows(nearest, z, request["codes"])


def vector_quantize_pytorch_search(z, codebook, request):
    """``VectorQuantize`` in evaluation mode."""
    import torch
    from vector_quantize_pytorch import VectorQuantize

    torch.set_num_threads(request["threads"])
    cosine = request["distance"] == "cosine"
    module = VectorQuantize(
        dim=request["dim"], codebook_size=request["codes"], use_cosine_sim=cosine
    ).eval()
    codes = torch.from_numpy(codebook)
    module.codebook = torch.nn.functional.normalize(codes) if cosine else codes

    @torch.no_grad()
    def nearest(z):
        return module(z[None])[1][0]

    return _in_rows(nearest, torch.from_numpy(z), request["codes"])


def faiss_search(z, codebook, request):
    """A flat index; for cosine of unit vectors."""
    import faiss

    faiss.omp_set_num_threads(request["threads"])
    if request["distance"] == "cosine":
        z, codebook = z.copy(), codebook.copy()
        faiss.normalize_L2(z)
        faiss.normalize_L2(codebook)
        index = faiss.IndexFlatIP(request["dim"])
    else:
        index = faiss.IndexFlatL2(request["dim"])
    index.add(codebook)
    return lambda: index.search(z, 1)[1][:, 0]


SEARCHES = {
    "torch": torch_search,
    "vector_quantize_pytorch": vector_quantize_pytorch_search,
    "faiss": faiss_search,
}


def main():
    """Times one library and prints the result."""
    request = json.loads(sys.argv[1])
    if importlib.util.find_spec(request["peer"]) is None:
        print("null")
        return
    with np.load(request["data"]) as data:
        z, codebook = data["z"], data["codebook"]
    search = SEARCHES[request["peer"]](z, codebook, request)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    indices = search()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = []
    for _ in range(request["repeats"]):
        start = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - start)
    found = pathlib.Path(request["data"]).with_name("indices.npy")
    np.save(found, indices)
    print(json.dumps({"seconds": seconds, "temp_bytes": KIB * grown, "indices": str(found)}))


if __name__ == "__main__":
    main()
