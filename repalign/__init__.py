"""Learning, aligning, quantizing and generating from representations, functionally, in JAX."""

__version__ = "0.1.0"
