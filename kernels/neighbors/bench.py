"""Times every implementation beside scikit-learn's brute force and, where installed, faiss."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from repalign.kernels.neighbors.api import IMPLEMENTATIONS, top_k
from repalign.kernels.neighbors.specs import SHAPES, Shape


def run(
    names: Sequence[str] = ("small", "small_euclidean"), *, repeats: int = 5
) -> list[dict[str, str | int | float]]:
    """Returns one row per named shape and implementation.

    ``seconds`` is the median of ``repeats`` calls after one that warms up, between
    ``seconds_min`` and ``seconds_max``; ``agreement`` is the share of indices equal to the
    reference's. A shape whose full score matrix passes 4 GB is not run on the implementations that
    would hold it, and its agreement is then with ``xla``.
    """
    rows = []
    for name in names:
        shape = SHAPES[name]
        rng = np.random.default_rng(0)
        queries = rng.standard_normal((shape.queries, shape.dim), dtype=np.float32)
        database = rng.standard_normal((shape.database, shape.dim), dtype=np.float32)
        expected = None
        for implementation, search in _searches(shape, queries, database).items():
            indices, seconds = _time(search, repeats)
            expected = indices if expected is None else expected
            rows.append(
                {
                    "shape": name,
                    "implementation": implementation,
                    "seconds": statistics.median(seconds),
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "agreement": float(np.mean(indices == expected)),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **shape._asdict(),
                }
            )
    return rows


def _searches(
    shape: Shape, queries: np.ndarray, database: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    device_queries, device_database = jax.device_put((queries, database))

    def ours(implementation: str) -> Callable[[], np.ndarray]:
        search = jax.jit(
            lambda queries, database: (
                top_k(
                    queries,
                    database,
                    k=shape.k,
                    metric=shape.metric,
                    implementation=implementation,
                ).indices
            )
        )
        return lambda: np.asarray(search(device_queries, device_database))

    fits = 4 * shape.queries * shape.database <= 4e9
    searches = {name: ours(name) for name in IMPLEMENTATIONS if fits or name != "reference"}
    if shape.metric == "euclidean":
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=shape.k, algorithm="brute").fit(database)
        searches["scikit-learn"] = lambda: model.kneighbors(queries, return_distance=False)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        flat = {"euclidean": faiss.IndexFlatL2, "inner_product": faiss.IndexFlatIP}
        index = flat[shape.metric](shape.dim)
        index.add(database)
        searches["faiss"] = lambda: index.search(queries, shape.k)[1]
    return searches


def _time(search: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, list[float]]:
    indices = search()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - start)
    return indices, seconds
