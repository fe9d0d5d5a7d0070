"""How long a step can take on a chip: products, memory and links, each at its published peak."""

from collections.abc import Callable
from typing import NamedTuple

from repalign.parallel.chips import Chip
from repalign.parallel.hlo_cost import Collective, Cost

ASSUMPTIONS = (
    "Products run at the chip's bf16 peak, memory and links at their published bandwidth.",
    "Each operation takes the longer of its products and its HBM traffic; operations follow one "
    "another. Elementwise arithmetic, padding of small matrices to the matrix unit and launch "
    "overheads cost nothing.",
    "Collectives are rings over the links that the group's chips share; `serial` adds them to the "
    "rest, `bound` hides whatever can be hidden: the longest of products, HBM and links.",
    "Collectives along several axes at once do not slow one another; input and checkpoints cost "
    "nothing.",
)
"""What every figure below rests on: all of them flatter the machine."""


class Roofline(NamedTuple):
    """Seconds of one step on one device.

    Attributes:
        compute: all products at peak.
        memory: all HBM traffic at full bandwidth.
        links: all collectives, one after the other.
        serial: every operation's longer part of the first two, then the collectives: nothing
            overlaps.
        bound: the longest of the first three: everything overlaps. No run can be quicker.
    """

    compute: float
    memory: float
    links: float
    serial: float
    bound: float

    @property
    def binding(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip, bandwidth: Callable[[Collective], float]) -> Roofline:
    """Returns the times of a step.

    Args:
        cost: of the compiled program.
        chip: the device.
        bandwidth: bytes a second that a device can send in a collective.
    """
    local = sum(
        one.count * max(one.flops / chip.peak_flops, one.hbm_bytes / chip.memory_bandwidth)
        for one in cost.operations
    )
    links = sum(
        one.count * one.collective.sent / bandwidth(one.collective) for one in cost.collectives
    )
    compute, memory = cost.flops / chip.peak_flops, cost.hbm_bytes / chip.memory_bandwidth
    return Roofline(compute, memory, links, local + links, max(compute, memory, links))
