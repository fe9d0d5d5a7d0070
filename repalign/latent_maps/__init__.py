"""Closed-form maps between latent spaces."""

from repalign.latent_maps.relative import relative_representation

__all__ = ["relative_representation"]
