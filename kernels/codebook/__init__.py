"""Codebook search that never holds a ``[vectors, codes]`` array: nearest, top-k, soft."""

from repalign.kernels.codebook.api import (
    IMPLEMENTATIONS,
    Assignment,
    CodeStatistics,
    choose,
    code_distances,
    code_statistics,
    disagreement_rate,
    nearest_codes,
    soft_assignment,
    top_k_codes,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Assignment",
    "CodeStatistics",
    "choose",
    "code_distances",
    "code_statistics",
    "disagreement_rate",
    "nearest_codes",
    "soft_assignment",
    "top_k_codes",
]
