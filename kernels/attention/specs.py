"""Real attention shapes, by name; tests, bench and tuning read the same table."""

from typing import NamedTuple


class Spec(NamedTuple):
    """One self-attention layer's call.

    Attributes:
        batch: sequences on one device.
        tokens: queries, and keys.
        heads: attention heads.
        dim: the width of a head.
        causal: whether a token sees only itself and those before it.
        segmented: whether sequences are packed, told apart by segment ids.
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    causal: bool = False
    segmented: bool = False


SPECS = {
    "sit_xl_2_256px": Spec(32, 256, 16, 72),
    "sit_b_2_256px": Spec(32, 256, 12, 64),
    "mae_vit_l_16": Spec(32, 197, 16, 64),
    "dinov2_b_14": Spec(32, 257, 12, 64),
    "mae_vit_h_14": Spec(32, 257, 16, 80),
    "sit_xl_2_512px": Spec(16, 1_024, 16, 72),
    "llamagen_xl_384px": Spec(16, 576, 20, 64, causal=True),
    "sit_xl_2_1024px": Spec(4, 4_096, 16, 72),
    "text_96": Spec(2, 4_096, 32, 96, causal=True),
    "packed_128": Spec(2, 8_192, 32, 128, causal=True, segmented=True),
    "dino_video_16k": Spec(1, 16_384, 16, 64),
}

QUICK = ("sit_xl_2_256px", "sit_xl_2_512px")
"""What ``repalign bench attention`` times on a CPU, with one sequence of the batch."""
