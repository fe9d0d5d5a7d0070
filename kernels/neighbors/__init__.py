"""Exact nearest neighbours by inner product or Euclidean distance."""

from .api import Neighbors, top_k

__all__ = ["Neighbors", "top_k"]
