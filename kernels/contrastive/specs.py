"""Real shapes, by name; the tests, the bench and the tuning read the same table."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One contrastive batch.

    Attributes:
        examples: pairs in the global batch.
        dim: the width of an embedding.
        loss: ``"nt_xent"`` (2N views, each against all others), ``"clip"`` (both directions),
            ``"siglip"`` or ``"moco"`` (N queries against a queue).
        dtype: of the embeddings.
        queue: negatives of the queue, for ``"moco"``.
    """

    examples: int
    dim: int
    loss: str
    dtype: str = "float32"
    queue: int = 0


SHAPES = {
    "simclr_512": Shape(512, 128, "nt_xent"),
    "simclr_4k": Shape(4096, 128, "nt_xent"),
    "simclr_8k": Shape(8192, 128, "nt_xent"),
    "moco_v2": Shape(256, 128, "moco", queue=65536),
    "clip_1k": Shape(1024, 512, "clip"),
    "clip_4k": Shape(4096, 512, "clip"),
    "siglip_4k": Shape(4096, 768, "siglip"),
    "clip_16k": Shape(16384, 512, "clip", "bfloat16"),
    "clip_32k_float32": Shape(32768, 1024, "clip"),
    "clip_64k": Shape(65536, 512, "clip", "bfloat16"),
    "siglip_32k": Shape(32768, 1024, "siglip", "bfloat16"),
}
QUICK = ("simclr_512", "clip_1k")
