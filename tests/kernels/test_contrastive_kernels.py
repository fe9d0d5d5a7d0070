"""The streamed reductions equal the obvious ones, in linear memory."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.kernels.chips import CHIPS
from repalign.kernels.contrastive import api, bench, entries, reference, sweep
from repalign.kernels.contrastive.specs import SHAPES, Shape

ROWS, COLUMNS, DIM = 19, 23, 5

IDS = (jnp.arange(ROWS) // 2, jnp.arange(COLUMNS))
GROUPS = (jnp.arange(ROWS) % 3, jnp.arange(COLUMNS) % 4)
WHERE = jnp.arange(COLUMNS) % 5 != 1


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = jax.random.normal(keys[0], (ROWS, DIM)), jax.random.normal(keys[1], (COLUMNS, DIM))
    return (
        a.astype(dtype),
        b.astype(dtype),
        jax.random.uniform(keys[2], (ROWS,), minval=0.5, maxval=1.5),
    )


def log_sum_exp(implementation, a, b, scale, bias, *, options):
    return api.log_sum_exp(a, b, scale=scale, implementation=implementation, **options)


def sigmoid_loss(implementation, a, b, scale, bias, *, options):
    return api.sigmoid_loss(a, b, scale=scale, bias=bias, implementation=implementation, **options)


CASES = {
    "all": (log_sum_exp, {}),
    "exclude": (log_sum_exp, {"exclude": IDS}),
    "include": (log_sum_exp, {"exclude": IDS, "include": GROUPS, "where": WHERE}),
    "sigmoid": (sigmoid_loss, {"positive": IDS, "where": WHERE}),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sweep, "BLOCK", 8)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.float32) for case in CASES),
        ("include", jnp.bfloat16),
        ("sigmoid", jnp.bfloat16),
    ],
)
def test_streamed_equals_reference(case, dtype, small_blocks):
    function, options = CASES[case]
    a, b, weights = arrays(dtype)

    def run(implementation):
        def total(a, b, scale, bias):
            values = function(implementation, a, b, scale, bias, options=options)
            return jnp.sum(weights * jnp.where(jnp.isfinite(values), values, 0.0)), values

        return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(a, b, 3.0, -2.0)

    (expected_grads, expected), (grads, values) = run("reference"), run("xla")
    np.testing.assert_allclose(values, expected, rtol=2e-6)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2  # the gradient itself is rounded to bfloat16
    for grad, known in zip(grads, expected_grads, strict=True):
        assert grad.dtype == known.dtype
        grad, known = np.asarray(grad, np.float32), np.asarray(known, np.float32)
        assert np.linalg.norm(grad - known) <= tolerance * np.linalg.norm(known)


def test_against_a_loop_over_entries():
    a, b, _ = (np.asarray(x, np.float64) for x in arrays())
    kept = (IDS[0][:, None] != IDS[1]) & (GROUPS[0][:, None] == GROUPS[1]) & WHERE
    expected = [
        np.log(sum(np.exp(1.5 * a[i] @ b[j]) for j in range(COLUMNS) if kept[i, j]))
        for i in range(ROWS)
    ]
    options = {"exclude": IDS, "include": GROUPS, "where": WHERE}
    actual = api.log_sum_exp(jnp.asarray(a), jnp.asarray(b), scale=1.5, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_empty_rows_and_large_logits_stay_finite(implementation, small_blocks):
    a, b, weights = arrays()

    @jax.jit
    def run(scale, where):
        def total(a, b, scale):
            values = api.log_sum_exp(a, b, scale=scale, where=where, implementation=implementation)
            return jnp.sum(weights * jnp.where(jnp.isfinite(values), values, 0.0)), values

        return jax.grad(total, (0, 1, 2), has_aux=True)(a, b, scale)

    for scale in (0.0, 1.0, 1e4):
        grads, values = run(scale, WHERE)
        assert all(np.all(np.isfinite(x)) for x in (values, *grads))
        grads, values = run(scale, jnp.zeros(COLUMNS, bool))
        assert np.all(np.isneginf(values))
        assert all(np.all(x == 0.0) for x in grads)


def test_choice():
    assert api.choose(1024, 1024).implementation == "reference"
    assert api.choose(16, 65536).implementation == "reference"
    assert api.choose(1025, 1024).implementation == "xla"
    assert api.choose(8193, 8192).implementation == "xla"
    assert api.choose(8, 8, axis="data").implementation == "xla"
    for chip, expected in {
        "v5e": "pallas_tpu",
        "tpu7x": "pallas_tpu",
        "h100": "pallas_gpu",
    }.items():
        with jax.sharding.use_abstract_mesh(CHIPS[chip].described()):
            assert api.choose(8192, 8192).implementation == "reference"
            assert api.choose(8193, 8192).implementation == expected
            with jax.enable_x64(True):
                assert "64-bit" in api.choose(8193, 8192).reason
    blackwell = CHIPS["h100"]._replace(device_kind="NVIDIA B200")
    with jax.sharding.use_abstract_mesh(blackwell.described()):
        assert api.choose(8193, 8192).implementation == "xla"
        assert "NVIDIA B200" in api.choose(8193, 8192).reason


def test_mistakes():
    a, b, _ = arrays()
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; valid: reference, xla"):
        api.log_sum_exp(a, b, scale=1.0, implementation="cuda")
    with pytest.raises(ValueError, match="expected"):
        api.log_sum_exp(a, b.T, scale=1.0)
    with pytest.raises(ValueError, match="masks the 23 columns"):
        api.log_sum_exp(a, b, scale=1.0, where=jnp.ones(ROWS, bool))
    # A kernel that is named never falls back, also where it cannot run.
    with pytest.raises(ValueError, match="interpret mode"):
        jax.jit(lambda: api.log_sum_exp(a, b, scale=1.0, implementation="pallas_tpu"))()


def test_bench(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(8, 4, "nt_xent"))
    # This interpreter has no torch, so that its peers have no row.
    rows = bench.run(["tiny"], repeats=1, python=sys.executable)
    assert [row["implementation"] for row in rows] == ["reference", "xla", "optax"]
    np.testing.assert_allclose([row["value"] for row in rows], rows[0]["value"], rtol=1e-6)
    assert all(row["ratio"] > 0 for row in rows)
    cases = bench.cases("xla")
    assert set(cases) >= {f"{name}/{part}" for name in SHAPES for part in ("forward", "backward")}
    assert cases["tiny/backward"].flops == 3 * cases["tiny/forward"].flops == 3 * 2 * 16 * 16 * 4


def temp_bytes(function, examples, dim):
    shape = jax.ShapeDtypeStruct((examples, dim), jnp.float32)
    step = jax.jit(jax.grad(lambda a, b: jnp.sum(function(a, b)), (0, 1)))
    return step.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_batch():
    spec = SHAPES["clip_16k"]._replace(dim=128)
    ids = jnp.arange(spec.examples)
    pair = (ids, ids)
    streamed = functools.partial(api.log_sum_exp, scale=10.0, exclude=pair)
    sigmoid = functools.partial(api.sigmoid_loss, scale=10.0, bias=-10.0, positive=pair)
    matrix = 4 * spec.examples**2
    inputs = 2 * 4 * spec.examples * spec.dim
    for function in (streamed, sigmoid):
        assert temp_bytes(function, spec.examples, spec.dim) < 5 * inputs + 8 * 4 * sweep.BLOCK**2
    # The test can fail: the obvious form needs the matrix.
    dense = functools.partial(streamed, implementation="reference")
    assert temp_bytes(dense, spec.examples, spec.dim) > matrix


def test_reference_is_the_definition():
    a, b, _ = arrays()
    logits = 2.0 * a @ b.T
    np.testing.assert_allclose(
        reference.log_sum_exp(a, b, jnp.asarray(2.0), None, None, None),
        jax.nn.logsumexp(logits, axis=1),
        rtol=1e-6,
    )


def test_logarithm_of_one_plus_a_small_number():
    x = jnp.exp(jnp.linspace(-30.0, 0.0, 2001))
    exact = np.log1p(np.asarray(x, np.float64))
    # The rounding of 1 + x, of at least 1/16 in relation to x, and of the result.
    bound = (16 + 2) * 2**-24
    np.testing.assert_allclose(entries.log_one_plus(x), exact, rtol=bound)


def both_ways(implementation, a, b, scale, *, where=None, **options):
    where = None if where is None else (jnp.arange(ROWS) % 7 != 2, where)
    options |= {"scale": scale, "where": where, "implementation": implementation}
    return api.log_sum_exp_both_ways(a, b, **options)


def within(implementation, a, b, scale, *, where=None, exclude=None, include=None):
    first = [None if ids is None else ids[1] for ids in (exclude, include)]
    options = {"scale": scale, "where": where, "implementation": implementation}
    return (api.log_sum_exp_within(b, exclude=first[0], include=first[1], **options),)


@pytest.mark.parametrize("held_dim", [1, 512])
@pytest.mark.parametrize("case", ["all", "include"])
@pytest.mark.parametrize("function", [both_ways, within])
def test_one_sweep_for_both_sides(function, case, held_dim, small_blocks, monkeypatch):
    """Against two calls, one for each side, in values and gradients."""
    monkeypatch.setattr(sweep, "HELD_DIM", held_dim)
    a, b, _ = arrays()
    options = CASES[case][1]

    def run(implementation):
        def total(a, b, scale):
            values = function(implementation, a, b, scale, **options)
            finite = [jnp.where(jnp.isfinite(x), x, 0.0) for x in values]
            return sum(jnp.sum(x * (1.5 + jnp.cos(jnp.arange(len(x))))) for x in finite), values

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(a, b, 3.0)

    (expected_grads, expected), (grads, values) = run("reference"), run("xla")
    for value, known in zip(values, expected, strict=True):
        # A value near 0 is exact to the rounding of the logits that it is the sum of.
        largest = np.max(np.abs(known), where=np.isfinite(known), initial=0.0)
        np.testing.assert_allclose(value, known, rtol=2e-6, atol=2**-22 * largest)
    for grad, known in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(grad - known) <= 1e-5 * np.linalg.norm(known)
    if case == "include":  # What does not count has no value; the rest is that of one side alone.
        assert np.isneginf(values[0]).any()
    one = api.log_sum_exp(a, b, scale=3.0) if function is both_ways else None
    if one is not None and case == "all":
        np.testing.assert_allclose(values[0], one, rtol=2e-6)
        np.testing.assert_allclose(values[1], api.log_sum_exp(b, a, scale=3.0), rtol=2e-6)
