"""Quantizers as the bottleneck of a model: each with its parameters, its state and its codes.

A bottleneck is a frozen dataclass of hyper-parameters with

* ``init(key, dim) -> (params, state)``: what the optimizer trains, and what only steps renew;
* ``apply(params, state, z) -> (Quantized, new state)``: vectors are the last axis of ``z``;
* ``codes(dim)``: how many codes there are, the range of the indices.

The functions behind them are those of `repalign.quantizers`; a model that wants another bottleneck
needs an object with these three methods.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float
from repalign.quantizers import binary, scalar, vector
from repalign.quantizers.vector import Quantized
from repalign.typing import Array, Float, Key, PyTree

Variables = tuple[PyTree, PyTree]


@dataclasses.dataclass(frozen=True)
class VectorQuantizer:
    """A codebook that is trained by gradient (VQ-VAE, VQGAN).

    It starts uniform in ``[-1 / size, 1 / size]``, as VQGAN's does. See
    `repalign.quantizers.vector.vector_quantize`.

    Attributes:
        size: number of codes.
        commitment_weight, codebook_weight, distance, gradient: as there.
    """

    size: int
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    distance: str = "euclidean"
    gradient: str = "straight_through"

    def init(self, key: Key[Array, ""], dim: int) -> Variables:
        """Returns ``{"codebook": [size, dim]}`` and no state."""
        bound = 1.0 / self.size
        codebook = jax.random.uniform(key, (self.size, dim), minval=-bound, maxval=bound)
        return {"codebook": codebook}, {}

    def apply(
        self, params: PyTree, state: PyTree, z: Float[Array, "*batch dim"]
    ) -> tuple[Quantized, PyTree]:
        """Returns the nearest codes."""
        quantized = vector.vector_quantize(
            z,
            params["codebook"],
            commitment_weight=self.commitment_weight,
            codebook_weight=self.codebook_weight,
            distance=self.distance,
            gradient=self.gradient,
        )
        return quantized, state

    def codes(self, dim: int) -> int:
        """Returns the number of codes."""
        del dim
        return self.size


@dataclasses.dataclass(frozen=True)
class EmaVectorQuantizer:
    """A codebook that follows the running mean of the vectors that choose each code.

    The codebook and its statistics are state; they start from a unit normal distribution. See
    `repalign.quantizers.vector.ema_update`.

    Attributes:
        size: number of codes.
        decay, commitment_weight, distance, gradient: as there.
    """

    size: int
    decay: float = 0.99
    commitment_weight: float = 0.25
    distance: str = "euclidean"
    gradient: str = "straight_through"

    def init(self, key: Key[Array, ""], dim: int) -> Variables:
        """Returns no parameters and the codebook with its statistics."""
        codebook = jax.random.normal(key, (self.size, dim))
        # A copy, for the state's leaves must be distinct buffers when they are donated.
        statistics = vector.init_statistics(jnp.copy(codebook))
        return {}, {"codebook": codebook, "statistics": statistics}

    def apply(
        self, params: PyTree, state: PyTree, z: Float[Array, "*batch dim"]
    ) -> tuple[Quantized, PyTree]:
        """Returns the nearest codes of the old codebook, and the new one."""
        del params
        quantized = vector.vector_quantize(
            z,
            state["codebook"],
            commitment_weight=self.commitment_weight,
            distance=self.distance,
            gradient=self.gradient,
        )
        update = vector.ema_update(
            state["statistics"],
            lax.stop_gradient(z),
            quantized.indices,
            decay=self.decay,
            distance=self.distance,
        )
        return quantized, {"codebook": update.codebook, "statistics": update.statistics}

    def codes(self, dim: int) -> int:
        """Returns the number of codes."""
        del dim
        return self.size


@dataclasses.dataclass(frozen=True)
class SimVQ:
    """A codebook that is one linear layer's image of a random basis.

    See `repalign.quantizers.vector.sim_vq`; the defaults here are those of the official code
    (youngsheen/SimVQ@d8bd94d): a bias, straight-through.

    Attributes:
        size: number of codes.
        train_basis: whether the basis is a parameter too; by default it is frozen state.
        commitment_weight, input_weight, bias, gradient: as there.
    """

    size: int
    train_basis: bool = False
    commitment_weight: float = 1.0
    input_weight: float = 0.25
    bias: bool = True
    gradient: str = "straight_through"

    def init(self, key: Key[Array, ""], dim: int) -> Variables:
        """Returns transform, bias and basis; a frozen basis is state."""
        basis_key, transform_key, bias_key = jax.random.split(key, 3)
        basis = jax.random.normal(basis_key, (self.size, dim)) * dim**-0.5
        # torch's default for a linear layer.
        bound = dim**-0.5
        params = {
            "transform": jax.random.uniform(transform_key, (dim, dim), minval=-bound, maxval=bound)
        }
        if self.bias:
            params["bias"] = jax.random.uniform(bias_key, (dim,), minval=-bound, maxval=bound)
        if self.train_basis:
            return {**params, "basis": basis}, {}
        return params, {"basis": basis}

    def apply(
        self, params: PyTree, state: PyTree, z: Float[Array, "*batch dim"]
    ) -> tuple[Quantized, PyTree]:
        """Returns the nearest codes of ``basis @ transform + bias``."""
        bias = params["bias"] if self.bias else None
        if not self.train_basis:
            quantized = vector.sim_vq(
                z,
                state["basis"],
                params["transform"],
                commitment_weight=self.commitment_weight,
                input_weight=self.input_weight,
                bias=bias,
                gradient=self.gradient,
            )
            return quantized, state
        codebook = jnp.matmul(params["basis"], params["transform"], precision=lax.Precision.HIGHEST)
        if bias is not None:
            codebook = codebook + bias
        quantized = vector.vector_quantize(
            z,
            codebook,
            commitment_weight=self.commitment_weight * self.input_weight,
            codebook_weight=self.commitment_weight,
            gradient=self.gradient,
        )
        return quantized, state

    def codes(self, dim: int) -> int:
        """Returns the number of codes."""
        del dim
        return self.size


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantization: no codebook, no loss; ``len(levels)`` dimensions.

    See `repalign.quantizers.scalar.fsq`.
    """

    levels: tuple[int, ...]
    convention: str = "one_plus_eps"

    def init(self, key: Key[Array, ""], dim: int) -> Variables:
        """Returns nothing to train or to keep.

        Raises:
            ValueError: not one level a dimension.
        """
        del key
        if dim != len(self.levels):
            raise ValueError(
                f"FSQ with {len(self.levels)} levels quantizes as many dimensions, not {dim}: set "
                "the latent dimension of the model to that."
            )
        return {}, {}

    def apply(
        self, params: PyTree, state: PyTree, z: Float[Array, "*batch dim"]
    ) -> tuple[Quantized, PyTree]:
        """Returns the rounded values; the loss is 0."""
        del params
        out = scalar.fsq(z, levels=self.levels, convention=self.convention)
        return Quantized(out.quantized, out.indices, jnp.zeros(z.shape[:-1], jnp.float32)), state

    def codes(self, dim: int) -> int:
        """Returns the number of codes."""
        del dim
        return math.prod(self.levels)


@dataclasses.dataclass(frozen=True)
class LFQ:
    """Lookup-free quantization: the signs of the dimensions, ``2^dim`` codes.

    See `repalign.quantizers.binary.lfq`.
    """

    entropy_weight: float = 0.1
    diversity_gamma: float = 1.0
    commitment_weight: float = 0.25
    inv_temperature: float = 100.0
    group_size: int | None = None

    def init(self, key: Key[Array, ""], dim: int) -> Variables:
        """Returns nothing to train or to keep."""
        del key, dim
        return {}, {}

    def apply(
        self, params: PyTree, state: PyTree, z: Float[Array, "*batch dim"]
    ) -> tuple[Quantized, PyTree]:
        """Returns the signs."""
        del params
        return binary.lfq(z, **dataclasses.asdict(self)), state

    def codes(self, dim: int) -> int:
        """Returns the number of codes."""
        return 2**dim


def quantization_loss(losses: Float[Array, "batch *positions"]) -> Float[Array, "batch"]:
    """Returns the mean over positions of a quantizer's loss per vector: a term of an objective."""
    return jnp.mean(as_float(losses).reshape(losses.shape[0], -1), axis=1)
