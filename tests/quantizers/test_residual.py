"""Residual, product and grouped quantizers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.residual import (
    grouped_residual_vector_quantize,
    nested_dropout_length,
    prefix_mask,
    product_quantize,
    residual_codes,
    residual_losses,
    residual_vector_quantize,
)
from repalign.quantizers.vector import vector_quantize

residual_vector_quantize_jit = jax.jit(residual_vector_quantize)


def test_residual_matches_the_reference(golden_losses):
    z, codebooks = (jnp.asarray(golden_losses[f"residual_vq/in/{n}"]) for n in ("z", "codebooks"))
    result = residual_vector_quantize(z, codebooks)
    np.testing.assert_array_equal(result.indices, golden_losses["residual_vq/indices"])
    np.testing.assert_allclose(
        result.quantized, golden_losses["residual_vq/quantized"], rtol=2e-5, atol=1e-6
    )


def _operands():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (5, 6)), jax.random.normal(keys[1], (3, 8, 6))


def test_depth_leaves_out_levels():
    z, codebooks = _operands()
    full = residual_vector_quantize_jit(z, codebooks)
    depth = jnp.asarray([0, 1, 2, 3, 3])
    some = residual_vector_quantize_jit(z, codebooks, depth=depth)
    used = np.arange(3) < np.asarray(depth)[:, None]
    np.testing.assert_array_equal(some.indices, np.where(used, full.indices, -1))
    np.testing.assert_array_equal(some.quantized[0], 0.0)
    np.testing.assert_array_equal(some.quantized[1], codebooks[0, full.indices[1, 0]])
    np.testing.assert_array_equal(residual_losses(z, codebooks, some.indices)[0], 0.0)


def test_losses_of_each_level_and_their_gradients():
    z, codebooks = _operands()
    indices = residual_vector_quantize_jit(z, codebooks).indices

    @jax.jit
    def losses(z, codebooks):
        return residual_losses(z, codebooks, indices, codebook_weight=1.0)

    residual, expected = np.asarray(z), []
    for level in range(3):
        codes = codebooks[level, indices[:, level]]
        expected.append(1.25 * np.mean(np.square(residual - codes), axis=1))
        residual = residual - codes
    np.testing.assert_allclose(losses(z, codebooks), np.stack(expected, 1), rtol=1e-5)
    # The last level's loss reaches its own codebook only.
    gradient = jax.grad(lambda c: jnp.sum(losses(z, c)[:, 2]))(codebooks)
    np.testing.assert_array_equal(gradient[:2], 0.0)
    assert np.any(np.asarray(gradient[2]) != 0.0)
    passed = jax.grad(lambda z: jnp.sum(residual_vector_quantize_jit(z, codebooks).quantized))(z)
    np.testing.assert_array_equal(passed, 1.0)


def test_product_and_grouped_equal_their_parts():
    z, codebooks = _operands()
    heads = codebooks[:, :, :2]
    product = jax.jit(partial(product_quantize, codebook_weight=1.0))(z, heads)
    stacks = jnp.stack([heads, heads[::-1], heads[:, ::-1]])
    grouped = jax.jit(grouped_residual_vector_quantize)(z, stacks)
    quantize = jax.jit(partial(vector_quantize, codebook_weight=1.0))
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        one = quantize(z[:, part], heads[head])
        np.testing.assert_array_equal(product.indices[:, head], one.indices)
        np.testing.assert_array_equal(product.quantized[:, part], one.quantized)
        levels = residual_vector_quantize_jit(z[:, part], stacks[head])
        np.testing.assert_array_equal(grouped.indices[:, head], levels.indices)
        np.testing.assert_array_equal(grouped.quantized[:, part], levels.quantized)
    np.testing.assert_allclose(
        jnp.mean(product.loss), 1.25 * np.mean(np.square(z - product.quantized)), rtol=1e-5
    )


def test_nested_dropout():
    uniform = np.asarray(nested_dropout_length(jax.random.key(0), (8000,), length=4))
    assert set(uniform) == {1, 2, 3, 4}
    assert np.all(np.abs(np.bincount(uniform)[1:] / 8000 - 0.25) < 4 * np.sqrt(0.1875 / 8000))
    lengths = nested_dropout_length(jax.random.key(1), (8000,), length=3, continuation=0.5)
    shares = np.bincount(np.asarray(lengths), minlength=4)[1:] / 8000
    assert np.all(np.abs(shares - [0.5, 0.25, 0.25]) < 4 * np.sqrt(0.25 / 8000))
    mask = prefix_mask(jnp.asarray([[0, 2], [3, 1]]), length=3)
    np.testing.assert_array_equal(mask[0, 1], [True, True, False])
    np.testing.assert_array_equal(jnp.sum(mask, axis=-1), [[0, 2], [3, 1]])


def test_degenerate_input():
    z, codebooks = _operands()
    assert residual_vector_quantize_jit(z[:0], codebooks).indices.shape == (0, 3)
    np.testing.assert_array_equal(residual_vector_quantize_jit(z, codebooks[:, :1]).indices, 0)
    np.testing.assert_array_equal(
        residual_codes(codebooks, jnp.asarray([[-1, 2, -1]]))[0], codebooks[1, 2]
    )
    with pytest.raises(ValueError, match="project z"):
        residual_vector_quantize(z[:, :4], codebooks)
    with pytest.raises(ValueError, match="equal groups"):
        product_quantize(z[:, :5], codebooks[:, :, :2])
    with pytest.raises(ValueError, match="continuation"):
        nested_dropout_length(jax.random.key(0), (2,), length=3, continuation=1.0)
