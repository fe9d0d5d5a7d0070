"""Heads: REPA's projector, the projection MLP of contrastive methods, and a linear classifier."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.transformer import LayerNorm, xavier
from repalign.registry import lookup
from repalign.typing import Array, Float


class Projector(nn.Module):
    """REPA's projector: Linear, SiLU, Linear, SiLU, Linear, all xavier uniform, applied per token.

    Source: sihyun-yu/REPA@67f7145:models/sit.py:17-24 (hidden width 2048).
    """

    features: int
    hidden: int = 2048
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape features"]:
        dense = {"kernel_init": xavier, "dtype": self.dtype}
        rows = x.reshape(-1, x.shape[-1])  # One row axis: see transformer.Mlp.
        rows = nn.silu(nn.Dense(self.hidden, name="linear_1", **dense)(rows))
        rows = nn.silu(nn.Dense(self.hidden, name="linear_2", **dense)(rows))
        out = nn.Dense(self.features, name="linear_3", **dense)(rows)
        return out.reshape(*x.shape[:-1], self.features)


class MLPHead(nn.Module):
    """SimCLR's projection head: (Linear, norm, ReLU) x (layers - 1), Linear.

    ``norm="batch"`` normalises by the statistics of the batch it is given, in training and in
    evaluation alike (no running averages, hence no mutable state); ``"layer"`` per example; any
    other name is a UserError.
    """

    features: int = 128
    hidden: int = 2048
    layers: int = 2
    norm: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch features"]:
        for number in range(1, self.layers):
            x = nn.Dense(self.hidden, dtype=self.dtype, name=f"linear_{number}")(x)
            if self.norm is not None:
                norms = {"batch": BatchStandardize, "layer": LayerNorm}
                norm = lookup(norms, self.norm, kind="norm")
                x = norm(dtype=self.dtype, name=f"norm_{number}")(x)
            x = nn.relu(x)
        return nn.Dense(self.features, dtype=self.dtype, name=f"linear_{self.layers}")(x)


class BatchStandardize(nn.Module):
    """Batch normalisation without running averages: ``(x - mean) / sqrt(var + 1e-5)``, affine."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        standardized = nn.standardize(x, axis=0, epsilon=1e-5)
        return (standardized * scale + bias).astype(self.dtype)


class LinearClassifier(nn.Module):
    """One linear layer that starts at zero: every class is equally likely."""

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape classes"]:
        zeros = nn.initializers.zeros
        return nn.Dense(self.classes, kernel_init=zeros, dtype=self.dtype, name="linear")(x)
