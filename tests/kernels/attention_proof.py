"""What the tests of attention share: arrays, masks, value with gradients, and error bounds."""

import functools

import jax
import jax.numpy as jnp
from kernel_proof import error_bound

from repalign.kernels.attention import reference
from repalign.kernels.attention.reference import Masks

BLIND_QUERIES = (5, 6)
UNSEEN_KEY = 3


def arrays(queries, keys, heads, dim, dtype=jnp.float32, batch=2):
    """Returns q, k, v and the output's cotangent."""
    lengths = (queries, keys, keys, queries)
    draws = zip(jax.random.split(jax.random.key(0), 4), lengths, strict=True)
    return [jax.random.normal(key, (batch, n, heads, dim)).astype(dtype) for key, n in draws]


def segments(queries, keys):
    """Segments of unequal lengths; the last of the queries' has no keys."""
    return Masks(None, (jnp.arange(queries) // 7 % 5)[None], (jnp.arange(keys) // 5 % 4)[None])


def holes(queries, keys, *, heads=1, batch=1):
    """A random mask with queries that see nothing and a key that nothing sees."""
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (batch, heads, queries, keys))
    mask = mask.at[:, :, jnp.array(BLIND_QUERIES)].set(False)
    return Masks(mask.at[:, :, :, UNSEEN_KEY].set(False))


def value_and_gradients(attention, q, k, v, cotangent, masks, *, causal):
    """Returns the output and dq, dk, dv, by name."""
    call = functools.partial(attention, masks=masks, scale=q.shape[3] ** -0.5, causal=causal)
    out, gradients = jax.vjp(call, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients(cotangent)), strict=True))


def expected(operands, masks, *, causal):
    """What the reference says in float32 about the same rounded arrays."""
    wide = [x.astype(jnp.float32) for x in operands]
    run = functools.partial(value_and_gradients, reference.attention, causal=causal)
    return jax.jit(run)(*wide, masks=masks)


def bound(operands):
    """The error that rounding explains.

    A gradient is a chain of sums over dim (logits, and products with the cotangent), keys (softmax)
    and queries. 16-bit arrays round the output (which the gradients' mean reads), the weights or
    the slopes, and the result.
    """
    q, k = operands[:2]
    length = 2 * q.shape[3] + k.shape[1] + q.shape[1]
    return error_bound(length, rounded=[] if q.dtype == jnp.float32 else [q.dtype] * 3)
