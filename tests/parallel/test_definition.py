"""FLOPs and memory of a function's definition, against sums done by hand."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from repalign.parallel.definition import model_flops, peak_live_bytes


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def stack(weights, x, *, policy=None):
    def layer(x, weight):
        return jnp.tanh(x @ weight)

    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    return jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0])


def test_products_and_loops():
    forward = 6 * 2 * 32 * 64 * 64
    weights, x = shape(6, 64, 64), shape(32, 64)
    assert model_flops(stack, weights, x) == forward
    assert model_flops(jax.grad(stack), weights, x) == 3 * forward
    again = functools.partial(stack, policy=jax.checkpoint_policies.nothing_saveable)
    assert model_flops(jax.grad(again), weights, x) == 4 * forward
    batched = jax.vmap(stack, in_axes=(None, 0))
    assert model_flops(batched, weights, shape(5, 32, 64)) == 5 * forward


def test_convolutions():
    def convolve(x, kernel, *, groups=1, stride=1):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x = shape(2, 8, 8, 4)
    assert model_flops(convolve, x, shape(3, 3, 4, 16)) == 2 * (2 * 8 * 8 * 16) * 9 * 4
    depthwise = functools.partial(convolve, groups=4)
    assert model_flops(depthwise, x, shape(3, 3, 1, 4)) == 2 * (2 * 8 * 8 * 4) * 9
    halved = functools.partial(convolve, stride=2)
    once = 2 * (2 * 4 * 4 * 16) * 9 * 4
    assert model_flops(halved, x, shape(3, 3, 4, 16)) == once
    gradient = jax.grad(lambda x, k: jnp.sum(halved(x, k)), argnums=(0, 1))
    # No convolution is needed forward: only its two gradients are, each as dear.
    assert model_flops(gradient, x, shape(3, 3, 4, 16)) in (2 * once, 3 * once)


def test_branches_and_unknown_loops():
    def either(which, x):
        return lax.cond(which, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert model_flops(either, jax.ShapeDtypeStruct((), bool), shape(8, 8)) == 2 * 2 * 8**3
    again = functools.partial(lax.while_loop, lambda x: jnp.sum(x) < 9.0, lambda x: x @ x)
    assert model_flops(again, shape(8, 8)) == 2 * 8**3


def test_what_lives_at_once():
    def chain(x):
        for _ in range(4):
            x = x + 1.0
        return x

    size = 4 * 1000
    # What is added to and the sum; the last sum is returned and does not count.
    assert peak_live_bytes(chain, shape(1000)) == 2 * size

    def kept(x):
        parts = [x + float(one) for one in range(4)]
        return sum(parts[1:], start=parts[0])

    assert peak_live_bytes(kept, shape(1000)) == 5 * size


def test_what_a_backward_pass_keeps():
    weights, x = shape(6, 64, 64), shape(32, 64)
    activation = 4 * 32 * 64
    live = functools.partial(peak_live_bytes, parameters={weights.shape})
    everything = live(jax.grad(stack), weights, x)
    again = functools.partial(stack, policy=jax.checkpoint_policies.nothing_saveable)
    nothing = live(jax.grad(again), weights, x)
    # Of each of 6 layers its input and two arrays for the derivative of tanh, and what one
    # iteration adds; with rematerialisation the input alone.
    assert 3 * 6 * activation <= everything < 4 * 6 * activation
    assert 6 * activation <= nothing < 2 * 6 * activation
