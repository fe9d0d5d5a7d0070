"""Heads: REPA's projector, the projection MLP of contrastive methods, and a linear classifier."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from repalign.models.layout import split_examples
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
        rows = nn.silu(nn.Dense(self.hidden, name="linear_1", **dense)(split_examples(rows)))
        rows = split_examples(rows, hidden=True)
        rows = split_examples(nn.silu(nn.Dense(self.hidden, name="linear_2", **dense)(rows)))
        out = split_examples(nn.Dense(self.features, name="linear_3", **dense)(rows))
        return out.reshape(*x.shape[:-1], self.features)


class MLPHead(nn.Module):
    """SimCLR's projection head: (Linear, norm, ReLU) x (layers - 1), Linear, and maybe a last norm.

    ``norm="batch"`` normalises by the statistics of the batch it is given, in training and in
    evaluation alike (no running averages, hence no mutable state); ``"layer"`` per example; any
    other name is a UserError. ``norm_last`` normalises the output too, without a bias, as the
    official SimCLR does (google-research/simclr@be133b3:model_util.py:71-124). A linear layer
    before a batch norm has no bias: the norm would take it away.
    """

    features: int = 128
    hidden: int = 2048
    layers: int = 2
    norm: str | None = None
    norm_last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch features"]:
        for number in range(1, self.layers + 1):
            last = number == self.layers
            normalized = self.norm is not None and (self.norm_last or not last)
            x = nn.Dense(
                self.features if last else self.hidden,
                use_bias=not (normalized and self.norm == "batch"),
                dtype=self.dtype,
                name=f"linear_{number}",
            )(x)
            if normalized:
                batch_norm = functools.partial(BatchStandardize, use_bias=not last)
                norm = lookup({"batch": batch_norm, "layer": LayerNorm}, self.norm, kind="norm")
                x = norm(dtype=self.dtype, name=f"norm_{number}")(x)
            if not last:
                x = nn.relu(x)
        return x


class BatchStandardize(nn.Module):
    """Batch normalisation without running averages: ``(x - mean) / sqrt(var + 1e-5)``, affine."""

    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        out = nn.standardize(x.astype(jnp.float32), axis=0, epsilon=1e-5) * scale
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return out.astype(self.dtype)


class LinearClassifier(nn.Module):
    """One linear layer that starts at zero: every class is equally likely."""

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape classes"]:
        zeros = nn.initializers.zeros
        return nn.Dense(self.classes, kernel_init=zeros, dtype=self.dtype, name="linear")(x)
