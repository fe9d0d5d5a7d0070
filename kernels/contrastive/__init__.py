"""Reductions over all pairs of two sets of embeddings: log-sum-exp and the sigmoid loss."""
