"""Zero vectors, duplicates and a single example: finite values and finite gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import (
    alignment,
    backward_compatibility,
    consistency,
    contrastive,
    cross_modal,
    distillation,
    equivariance,
    gated_contrastive,
    visual_words,
)

WIDTH = 6
FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
WORDS = jnp.asarray(np.random.default_rng(3).normal(size=(5, WIDTH)), jnp.float32)


def tokens(x):
    return jnp.stack([x, 2.0 * x, x[::-1]], axis=1)


def labels(x):
    return jnp.arange(x.shape[0]) % 2


def gated(a, b):
    gates = jax.nn.sigmoid(b)
    same = gated_contrastive.pair_gated_info_nce(a, gates, labels(a), labels(a))
    closed = gated_contrastive.pair_gated_info_nce(a, b, labels(a), 1 - labels(a))
    return jnp.sum(same) + jnp.sum(closed)


LOSSES = {
    "sie": lambda a, b: equivariance.split_invariant_equivariant(a, b, b, a, a - b),
    "orthogonal_equivariance": equivariance.orthogonal_equivariance,
    "counting": lambda a, b: equivariance.counting(a, tokens(b), b),
    "words": lambda a, b: visual_words.word_prediction(
        a @ WORDS.T, visual_words.bag_of_visual_words(tokens(b), WORDS, jnp.float32(0.0))[0]
    ),
    "words_at_the_features": lambda a, b: visual_words.bag_of_visual_words(
        tokens(a), b, jnp.float32(0.0)
    )[0],
    "distribution_alignment": lambda a, b: cross_modal.distribution_alignment(
        a, jnp.clip(b, -20.0, 20.0), b, jnp.clip(a, -20.0, 20.0)
    ),
    "assignment": lambda a, b: cross_modal.assignment_prediction(a, b, WORDS, jnp.ones(5)),
    "assignment_to_zero": lambda a, b: cross_modal.assignment_prediction(
        a, a, b, jnp.ones(len(b)), assignment="prior"
    ),
    "gated": gated,
    "consistency": consistency.consistency,
    "patch_kernel": lambda a, b: alignment.patch_kernel_alignment(tokens(a), tokens(b)),
    "patch_kernel_of_nothing": lambda a, b: alignment.patch_kernel_alignment(
        tokens(a), tokens(b), where=jnp.zeros((len(a), 3), bool)
    ),
    "matryoshka_2d": lambda a, b: alignment.matryoshka_2d(
        functools.partial(contrastive.nt_xent, temperature=0.5),
        *(jnp.stack([x, 2.0 * x]) for x in (a, b)),
        prefixes=(2, WIDTH),
    ),
    "perceptual": lambda a, b: distillation.perceptual([tokens(a), a], [tokens(b), b]),
    "basis": lambda a, b: backward_compatibility.basis_transformation(
        a, b, jnp.eye(WIDTH), jnp.eye(WIDTH), jnp.eye(WIDTH), extra=2
    )[0],
}


@pytest.fixture(scope="module", params=[4, 1])
def compiled(request):
    """The losses and their gradients in one program: one compilation for many cases."""
    count = request.param

    def everything(a, b):
        return {
            name: jax.value_and_grad(lambda a, b, loss=loss: jnp.sum(loss(a, b)), (0, 1))(a, b)
            for name, loss in LOSSES.items()
        }

    argument = jax.ShapeDtypeStruct((count, WIDTH), jnp.float32)
    return count, jax.jit(everything).lower(argument, argument).compile(FAST_COMPILATION)


def test_values_and_gradients_are_finite(compiled):
    count, run = compiled
    rng = np.random.default_rng(1)
    zeros = np.zeros((count, WIDTH), np.float32)
    ordinary = rng.normal(size=(count, WIDTH)).astype(np.float32)
    repeated = np.repeat(ordinary[:1], count, axis=0)
    one_zero = ordinary.copy()
    one_zero[0] = 0.0
    cases = [(zeros, zeros), (zeros, ordinary), (ordinary, zeros), (repeated, repeated)]
    for a, b in [*cases, (one_zero, repeated), (100.0 * ordinary, -100.0 * ordinary)]:
        for name, (value, gradients) in run(a, b).items():
            assert np.isfinite(value), f"{name}: value {value}"
            for gradient in gradients:
                assert np.all(np.isfinite(gradient)), f"{name}: gradient"


def test_bfloat16_decides_in_float32():
    a, b = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, WIDTH)), jnp.bfloat16)
    # Those whose arguments this file itself computes from the inputs round there.
    own = {"words", "gated", "sie"}
    losses = {name: loss for name, loss in LOSSES.items() if name not in own}

    def values(a, b):
        return {name: jnp.sum(loss(a, b)) for name, loss in losses.items()}

    half = jax.jit(values).lower(a, b).compile(FAST_COMPILATION)(a, b)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    full = jax.jit(values).lower(a, b).compile(FAST_COMPILATION)(a, b)
    for name in losses:
        assert half[name].dtype == jnp.float32, name
        np.testing.assert_allclose(half[name], full[name], rtol=1e-3, atol=1e-4, err_msg=name)
