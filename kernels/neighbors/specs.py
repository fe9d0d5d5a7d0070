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
        dtype: of the queries and the database.
    """

    queries: int
    database: int
    dim: int
    k: int
    metric: str = "inner_product"
    dtype: str = "float32"


SHAPES = {
    "small": Shape(500, 2000, 32, 10),
    "small_euclidean": Shape(500, 2000, 32, 10, "euclidean"),
    "cifar_5k": Shape(2_000, 5_000, 512, 20),
    "cknna_sit_b": Shape(10_000, 10_000, 768, 10),
    "nnclr_queue": Shape(4_096, 98_304, 256, 1, dtype="bfloat16"),
    "cifar_knn_200": Shape(10_000, 50_000, 512, 200),
    "knn_probe_imagenet_vit_b": Shape(50_000, 1_281_167, 768, 20),
    "knn_probe_imagenet_vit_b_bf16": Shape(50_000, 1_281_167, 768, 20, dtype="bfloat16"),
    "precision_recall_50k_inception": Shape(50_000, 50_000, 2048, 3, "euclidean"),
}
