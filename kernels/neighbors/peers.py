"""Libraries' exact nearest neighbours, timed in an interpreter that has them; ``bench`` runs this.

Takes a JSON object as its argument and prints one: for every library installed the seconds of each
call, the growth of the process's peak memory, and the file of its indices.
"""

import importlib.util
import json
import pathlib
import sys
import time

import numpy as np


def resident_bytes(field):
    """Returns the resident memory of this process (``VmRSS``) or its peak (``VmHWM``), on Linux."""
    status = pathlib.Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith(field))
    return 1024 * int(kibibytes)


def torch_search(queries, database, request):
    """The whole matrix of scores, then ``topk``, as users write it."""
    import torch

    torch.set_num_threads(request["threads"])
    queries, database = torch.from_numpy(queries), torch.from_numpy(database)

    def search():
        if request["metric"] == "euclidean":
            return torch.cdist(queries, database).topk(request["k"], largest=False).indices.numpy()
        return (queries @ database.T).topk(request["k"]).indices.numpy()

    return search


def faiss_search(queries, database, request):
    """A flat index."""
    import faiss

    faiss.omp_set_num_threads(request["threads"])
    kinds = {"euclidean": faiss.IndexFlatL2, "inner_product": faiss.IndexFlatIP}
    index = kinds[request["metric"]](request["dim"])
    index.add(database)
    return lambda: index.search(queries, request["k"])[1]


def sklearn_search(queries, database, request):
    """Brute force, which has no inner product."""
    if request["metric"] != "euclidean":
        return None
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(n_neighbors=request["k"], algorithm="brute").fit(database)
    return lambda: model.kneighbors(queries, return_distance=False)


SEARCHES = {"torch": torch_search, "faiss": faiss_search, "sklearn": sklearn_search}


def main():
    """Times one library and prints the result, null where it lacks the metric or is not there."""
    request = json.loads(sys.argv[1])
    if importlib.util.find_spec(request["peer"]) is None:
        print("null")
        return
    with np.load(request["data"]) as data:
        queries, database = data["queries"], data["database"]
    search = SEARCHES[request["peer"]](queries, database, request)
    if search is None:
        print("null")
        return
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    indices = search()
    grown = resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(request["repeats"]):
        start = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - start)
    found = pathlib.Path(request["data"]).with_name("indices.npy")
    np.save(found, indices)
    print(json.dumps({"seconds": seconds, "temp_bytes": grown, "indices": str(found)}))


if __name__ == "__main__":
    main()
