"""Bottlenecks: each is the function it stands for, with its own parameters and state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers import binary, bottleneck, scalar, vector

KEY = jax.random.key(0)
Z = jax.random.normal(jax.random.key(1), (2, 3, 3, 4))


def same(found, expected):
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.quantized, expected.quantized, rtol=1e-6)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5, atol=1e-7)


def test_vector_quantizer():
    quantizer = bottleneck.VectorQuantizer(16, commitment_weight=0.5, gradient="rotation")
    params, state = quantizer.init(KEY, 4)
    assert state == {} and np.abs(params["codebook"]).max() <= 1 / 16
    found, new = quantizer.apply(params, state, Z)
    expected = vector.vector_quantize(
        Z, params["codebook"], commitment_weight=0.5, codebook_weight=1.0, gradient="rotation"
    )
    same(found, expected)
    assert new == {} and quantizer.codes(4) == 16

    def loss(params):
        return jnp.sum(quantizer.apply(params, {}, Z)[0].loss)

    used = np.unique(found.indices)
    moved = np.flatnonzero(np.any(jax.grad(loss)(params)["codebook"], axis=1))
    np.testing.assert_array_equal(moved, used)


def test_ema_quantizer_renews_its_state_and_nothing_else():
    quantizer = bottleneck.EmaVectorQuantizer(16, decay=0.5)
    params, state = quantizer.init(KEY, 4)
    assert params == {}
    found, new = quantizer.apply(params, state, Z)
    same(found, vector.vector_quantize(Z, state["codebook"]))
    expected = vector.ema_update(state["statistics"], Z, found.indices, decay=0.5)
    np.testing.assert_allclose(new["codebook"], expected.codebook, rtol=1e-6)
    np.testing.assert_allclose(new["statistics"].cluster_size, expected.statistics.cluster_size)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    again, _ = quantizer.apply(params, new, Z)
    assert np.mean((again.quantized - Z) ** 2) < np.mean((found.quantized - Z) ** 2)
    slope = jax.grad(lambda z: jnp.sum(quantizer.apply({}, state, z)[1]["codebook"]))(Z)
    assert not np.any(slope)
    # A state whose leaves share a buffer could not be donated to a step.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_basis", [True, False])
def test_sim_vq(bias, train_basis):
    quantizer = bottleneck.SimVQ(64, train_basis=train_basis, bias=bias)
    params, state = quantizer.init(KEY, 4)
    assert set(params) | set(state) == {"basis", "transform"} | ({"bias"} if bias else set())
    basis = (params if train_basis else state)["basis"]
    np.testing.assert_allclose(np.std(basis), 0.5, rtol=0.1)
    expected = vector.sim_vq(
        Z,
        basis,
        params["transform"],
        bias=params["bias"] if bias else None,
        gradient="straight_through",
    )
    found, _ = quantizer.apply(params, state, Z)
    same(found, expected)
    gradient = jax.grad(lambda params: jnp.sum(quantizer.apply(params, state, Z)[0].loss))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_quantizers_without_parameters():
    fsq = bottleneck.FSQ((5, 5, 4, 3))
    assert fsq.init(KEY, 4) == ({}, {}) and fsq.codes(4) == 300
    found, _ = fsq.apply({}, {}, Z)
    expected = scalar.fsq(Z, levels=(5, 5, 4, 3))
    same(found, vector.Quantized(*expected, jnp.zeros(Z.shape[:-1])))
    with pytest.raises(ValueError, match="FSQ with 4 levels quantizes as many dimensions, not 8"):
        fsq.init(KEY, 8)
    lfq = bottleneck.LFQ(commitment_weight=0.1)
    assert lfq.init(KEY, 4) == ({}, {}) and lfq.codes(4) == 16
    same(lfq.apply({}, {}, Z)[0], binary.lfq(Z, commitment_weight=0.1))


def test_quantization_loss_is_the_mean_over_positions():
    losses = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_allclose(bottleneck.quantization_loss(losses), [2.5, 8.5])
