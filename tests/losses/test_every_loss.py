"""What holds of every loss: invariances, and finite values and gradients on degenerate inputs."""

import functools

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CASES, WIDTH, batch

SIZE = 12
# (Sinkhorn balances against what is not masked, and gives every row its assignment.)
MASKED = {name: case for name, case in CASES.items() if case.masks and name != "sinkhorn"}
FEW = settings(max_examples=6, derandomize=True, deadline=None)


@functools.cache
def program(count=SIZE, dtype=jnp.float32, *, where=False):
    """Values and gradients of all cases (with ``where``, of those that mask), compiled once."""
    cases = MASKED if where else CASES
    if count == 1:
        # Stratified weights are not defined for a single example; others do not act on each other.
        cases = {
            name: case
            for name, case in cases.items()
            if case.cross and name != "decompose_kl/stratified"
        }
    return loss_cases.compiled(cases, count, dtype=dtype, where=where)


def not_finite(results):
    return {
        name
        for name, tree in results.items()
        if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
    }


def differ(actual, expected, *, tolerance=1e-4):
    """Whether arrays differ, relative to the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.max(np.abs(actual - expected), initial=0.0)
    return not error <= tolerance * max(np.max(np.abs(expected), initial=0.0), 1e-2)


def test_every_public_function_is_a_case_or_a_part():
    covered = {
        f"{case.of.__module__.removeprefix('repalign.losses.')}.{case.of.__name__}"
        for case in CASES.values()
    }
    parts = {f"{module}.{name}" for module, names in loss_cases.PARTS.items() for name in names}
    assert not covered & parts
    assert covered | parts == set(loss_cases.public_functions())


def test_claims_follow_the_docstrings():
    """A loss that says it normalises its inputs is tested for it."""
    unclaimed = [
        name
        for name, case in CASES.items()
        if "normalised inside" in case.of.__doc__ and case.scale != "rows"
    ]
    assert not unclaimed


def test_gradients_reach_every_argument_that_is_not_fixed_and_no_other():
    for name, (_, gradients) in program()(*batch(SIZE)).items():
        for argument, gradient in zip("ab", gradients, strict=True):
            assert np.any(gradient) != (argument in CASES[name].fixed), (name, argument)


@FEW
@given(order=st.permutations(range(SIZE)), seed=st.integers(0, 1000))
def test_a_permutation_of_the_batch_permutes_values_and_gradients(order, seed):
    a, b, ids = batch(SIZE, seed)
    order = np.asarray(order)
    before, after = program()(a, b, ids), program()(a[order], b[order], ids[order])
    wrong = []
    for name, (values, gradients) in before.items():
        moved, moved_gradients = after[name]
        if values.ndim:
            values = values.reshape(-1, SIZE)[:, order].reshape(-1)
        gradients = np.stack(gradients)[:, order]
        if differ(moved, values) or differ(moved_gradients, gradients, tolerance=1e-3):
            wrong.append(name)
    assert not [name for name in wrong if CASES[name].permutes]


@FEW
@given(exponents=st.tuples(*[st.integers(-6, 6)] * (2 * SIZE)), seed=st.integers(0, 1000))
def test_scale_does_not_matter_where_it_is_said_not_to(exponents, seed):
    a, b, ids = batch(SIZE, seed)
    factors = np.exp2(np.asarray(exponents, np.float32)).reshape(2, SIZE, 1)
    plain = program()(a, b, ids)
    for kind, (first, second) in {"rows": factors, "whole": factors[:, :1]}.items():
        scaled = program()(first * a, second * b, ids)
        claims = [name for name, case in CASES.items() if case.scale == kind]
        assert not [name for name in claims if differ(scaled[name][0], plain[name][0])]


@FEW
@given(seed=st.integers(0, 1000))
def test_rotation_does_not_matter_where_it_is_said_not_to(seed):
    a, b, ids = batch(SIZE, seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0]
    rotation = rotation.astype(np.float32)
    plain, turned = program()(a, b, ids), program()(a @ rotation, b @ rotation, ids)
    claims = [name for name, case in CASES.items() if case.rotation]
    assert not [name for name in claims if differ(turned[name][0], plain[name][0])]
    wrong = [
        name
        for name in claims
        if differ(turned[name][1], np.stack(plain[name][1]) @ rotation, tolerance=1e-3)
    ]
    assert not wrong


def degenerate(kind, count=SIZE):
    a, b, ids = batch(count)
    zeros = np.zeros_like(a)
    if kind == "a zero row":
        a[0], b[-1] = 0.0, 0.0
    elif kind == "two equal rows":
        a[-1], b[-1] = a[0], b[0]
    rows = {
        "zeros": (zeros, zeros),
        "zeros against rows": (zeros, b),
        "rows against zeros": (a, zeros),
        "a zero row": (a, b),
        "two equal rows": (a, b),
        "all rows equal": (np.broadcast_to(a[:1], a.shape), np.broadcast_to(a[:1], a.shape)),
        "equal sides": (a, a),
        "constant rows": (np.ones_like(a), np.ones_like(b)),
        "tiny": (1e-25 * a, 1e-25 * b),
        "large": (1e3 * a, -1e3 * b),
    }
    return *rows[kind], ids


KINDS = (
    "zeros",
    "zeros against rows",
    "rows against zeros",
    "a zero row",
    "two equal rows",
    "all rows equal",
    "equal sides",
    "constant rows",
    "tiny",
    "large",
)

# exp of a log variance of 1000 is infinite in float32, and so is the divergence.
OVERFLOWS = {
    "gaussian_kl",
    "gaussian_kl_between",
    "distribution_alignment",
    "decompose_kl/weighted",
    "decompose_kl/stratified",
    "dip/ii",
}


@pytest.mark.parametrize("kind", KINDS)
def test_finite_on_degenerate_inputs(kind):
    found = not_finite(program()(*degenerate(kind)))
    assert found <= (OVERFLOWS if kind == "large" else set())


@pytest.mark.parametrize("kind", ["two equal rows", "zeros", "large"])
def test_finite_on_a_single_example(kind):
    found = not_finite(program(1)(*degenerate(kind, 1)))
    assert found <= (OVERFLOWS if kind == "large" else set())


def test_masked_examples_reach_neither_values_nor_gradients():
    """Whatever a masked row holds, even NaN: the rest is as without it, and its gradient is 0."""
    a, b, ids = batch(SIZE)
    where = np.arange(SIZE) % 3 != 2
    run = program(where=True)
    poison = [np.where(where[:, None], x, np.nan).astype(np.float32) for x in (a, b)]
    other = [np.where(where[:, None], x, 7.0).astype(np.float32) for x in (a, b)]
    everything, poisoned, others = (
        run(a, b, ids, np.ones(SIZE, bool)),
        run(*poison, ids, where),
        run(*other, ids, where),
    )
    wrong = []
    for name, (values, gradients) in poisoned.items():
        gradients = np.stack(gradients)
        zero = not np.any(gradients[:, ~where])
        if values.ndim:
            zero &= not np.any(values.reshape(-1, SIZE)[:, ~where])
        same = not differ(values, others[name][0]) and not differ(gradients, others[name][1])
        if not (zero and same) or np.array_equal(values, everything[name][0]):
            wrong.append(name)
    assert not wrong


def test_masking_nothing_is_no_mask():
    a, b, ids = batch(SIZE)
    masked, plain = program(where=True)(a, b, ids, np.ones(SIZE, bool)), program()(a, b, ids)
    wrong = [
        name
        for name, (values, gradients) in masked.items()
        if differ(values, plain[name][0]) or differ(gradients, plain[name][1], tolerance=1e-3)
    ]
    assert not wrong


@pytest.mark.parametrize("content", [np.nan, 0.0, 1e3])
def test_an_all_masked_batch_is_finite_and_passes_no_gradient(content):
    poison = np.full((SIZE, WIDTH), content, np.float32)
    ids = np.arange(SIZE, dtype=np.int32)
    results = program(where=True)(poison, poison, ids, np.zeros(SIZE, bool))
    assert not not_finite(results)
    assert not [name for name, (_, gradients) in results.items() if np.any(gradients)]


def test_bfloat16_decides_in_float32():
    a, b, ids = batch(SIZE)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
    half = program(dtype=jnp.bfloat16)(*low, ids)
    full = program()(*(x.astype(jnp.float32) for x in low), ids)
    assert not not_finite(half)
    types = {(values.dtype, *(x.dtype for x in grads)) for values, grads in half.values()}
    assert types == {tuple(map(jnp.dtype, ("float32", "bfloat16", "bfloat16")))}
    assert not [name for name, tree in half.items() if differ(tree[0], full[name][0])]
