"""Exact nearest neighbours by inner product or Euclidean distance."""

from repalign.kernels.neighbors.api import Neighbors, top_k

__all__ = ["Neighbors", "top_k"]
