"""Scaled dot-product attention: forward and backward in linear memory on CPU, TPU and GPU."""

from repalign.kernels.attention.api import IMPLEMENTATIONS, QKNorm, attention, choose

__all__ = ["IMPLEMENTATIONS", "QKNorm", "attention", "choose"]
