"""Real shapes, by name; the tests and the bench read the same table."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One contrastive batch.

    Attributes:
        examples: pairs in the global batch.
        dim: the width of an embedding.
        queue: extra negatives shared by all queries.
    """

    examples: int
    dim: int
    queue: int = 0


SHAPES = {
    "simclr_512": Shape(512, 128),
    "simclr_4096": Shape(4096, 128),
    "simclr_8192": Shape(8192, 128),
    "moco_v2": Shape(256, 128, queue=65536),
    "clip_vit_b_16k": Shape(16384, 512),
    "clip_vit_b_32k": Shape(32768, 512),
    "siglip_vit_l_32k": Shape(32768, 1024),
}
