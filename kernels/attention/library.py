"""Attention by kernels that others wrote, under the contract of ``reference.attention``."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import flash_attention as flash_tpu

from repalign.kernels.attention.reference import Masks, visible

FLASH_TPU_BLOCKS = (512, 256, 128)


def _refuse_masks(masks: Masks, name: str) -> None:
    if any(x is not None for x in masks):
        raise ValueError(
            f"{name} takes neither a mask nor segment ids: its rows that see no key are no zeros."
        )


def jax_nn(q: Array, k: Array, v: Array, masks: Masks, *, scale: float, causal: bool) -> Array:
    """``jax.nn.dot_product_attention`` as XLA compiles it, zeros where no key is visible."""
    kept = visible(masks, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), causal=False)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=kept, scale=scale, is_causal=causal, implementation="xla"
    )
    if kept is None:
        return out
    every = visible(masks, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), causal=causal)
    seen = jnp.swapaxes(jnp.any(every, axis=3), 1, 2)[..., None]
    return jnp.where(seen, out, jnp.zeros((), out.dtype))


def jax_cudnn(q: Array, k: Array, v: Array, masks: Masks, *, scale: float, causal: bool) -> Array:
    """cuDNN's fused attention through ``jax.nn.dot_product_attention``; unmasked or causal."""
    _refuse_masks(masks, "jax_cudnn")
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )


def fits_flash_tpu(queries: int, keys: int) -> bool:
    """Whether JAX's TPU kernel takes these lengths: both multiples of 128."""
    return queries % FLASH_TPU_BLOCKS[-1] == 0 and keys % FLASH_TPU_BLOCKS[-1] == 0


def jax_flash_tpu(
    q: Array, k: Array, v: Array, masks: Masks, *, scale: float, causal: bool
) -> Array:
    """``jax.experimental.pallas.ops.tpu.flash_attention`` with the largest blocks that fit."""
    _refuse_masks(masks, "jax_flash_tpu")
    queries, keys = q.shape[1], k.shape[1]
    if not fits_flash_tpu(queries, keys):
        raise ValueError(f"jax_flash_tpu needs multiples of 128 tokens, got {queries} and {keys}.")
    rows = next(size for size in FLASH_TPU_BLOCKS if queries % size == 0)
    columns = next(size for size in FLASH_TPU_BLOCKS if keys % size == 0)
    blocks = flash_tpu.BlockSizes(
        block_q=rows, block_k_major=columns, block_k=columns, block_b=1,
        block_q_major_dkv=rows, block_k_major_dkv=columns, block_k_dkv=columns, block_q_dkv=rows,
        block_k_major_dq=columns, block_k_dq=columns, block_q_dq=rows,
    )  # fmt: skip
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = flash_tpu.flash_attention(*heads_first, causal=causal, sm_scale=scale, block_sizes=blocks)
    return jnp.swapaxes(out, 1, 2)
