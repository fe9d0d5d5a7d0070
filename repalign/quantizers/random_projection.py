"""The random-projection quantizer of BEST-RQ: frozen targets for masked prediction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, l2_normalize
from repalign.quantizers.vector import nearest_indices
from repalign.typing import Array, Float, Int, Key


class RandomProjection(NamedTuple):
    """Projections [heads, dim, code_dim], unit-norm codebooks [heads, codes, code_dim]; frozen."""

    projections: Float[Array, "heads dim code_dim"]
    codebooks: Float[Array, "heads codes code_dim"]


def init_random_projection(
    key: Key[Array, ""], *, dim: int, code_dim: int, num_codes: int, heads: int = 1
) -> RandomProjection:
    """Draws a Xavier-normal projection and a normalized Gaussian codebook for every head.

    Source: Chiu et al. 2022 (arXiv 2202.01855), section 3.
    """
    projection_key, codebook_key = jax.random.split(key)
    deviation = (2.0 / (dim + code_dim)) ** 0.5
    return RandomProjection(
        deviation * jax.random.normal(projection_key, (heads, dim, code_dim)),
        l2_normalize(jax.random.normal(codebook_key, (heads, num_codes, code_dim))),
    )


def random_projection_indices(
    x: Float[Array, "*batch dim"], state: RandomProjection, *, normalize: bool = True
) -> Int[Array, "*batch heads"]:
    """Returns ``argmin_k | c_k - A x / |A x| |`` for every head. No gradient.

    With ``normalize`` x first gets mean 0 and variance 1 over its dimensions (variance + 1e-5, as
    a layer norm without parameters; section 3 of the paper warns of collapse without it).

    Raises:
        ValueError: x and projections of different dimensions.

    Source: Chiu et al. 2022 (arXiv 2202.01855), section 3; layer norm as in
    vector-quantize-pytorch 1.32.0: random_projection_quantizer.py.
    """
    if x.shape[-1] != state.projections.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} dimensions, projections {state.projections.shape[1]}."
        )
    x = lax.stop_gradient(as_float(x))
    if normalize:
        x = (x - jnp.mean(x, axis=-1, keepdims=True)) * lax.rsqrt(
            jnp.var(x, axis=-1, keepdims=True) + 1e-5
        )

    def head_indices(head):
        projected = jnp.matmul(x, head.projections, precision=lax.Precision.HIGHEST)
        return nearest_indices(projected, head.codebooks, distance="cosine")

    return jnp.moveaxis(lax.map(head_indices, state), 0, -1)
