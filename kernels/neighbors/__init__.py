"""Exact nearest neighbours by inner product or Euclidean distance."""

from repalign.kernels.neighbors.api import Neighbors, choose, top_k

__all__ = ["Neighbors", "choose", "top_k"]
