"""Real shapes, by name; the tests and the bench read the same table."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One search.

    Attributes:
        queries: number of queries.
        database: number of points searched.
        dim: their dimension.
        k: neighbours per query.
        metric: as in ``api.top_k``.
    """

    queries: int
    database: int
    dim: int
    k: int
    metric: str = "inner_product"


SHAPES = {
    "small": Shape(500, 2000, 32, 10),
    "small_euclidean": Shape(500, 2000, 32, 10, "euclidean"),
    "cknna_sit_b": Shape(10_000, 10_000, 768, 10),
    "knn_probe_imagenet_vit_b": Shape(50_000, 1_281_167, 768, 20),
    "precision_recall_50k_inception": Shape(50_000, 50_000, 2048, 3, "euclidean"),
}
