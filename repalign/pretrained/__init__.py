"""Importers of published checkpoints."""

from repalign.pretrained.official_repa import from_official_repa

__all__ = ["from_official_repa"]
