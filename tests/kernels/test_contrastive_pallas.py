"""The Pallas kernels of the contrastive reductions, interpreted, cross-lowered and mutated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import INTERPRETERS, assert_within, cross_lower, error_bound, interpreted
from mutation import assert_killed, mutated

from repalign.kernels.contrastive import bench, pallas_gpu, pallas_tpu, reference, streamed

MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}
BLOCKS = {
    "tpu": ({"stationary": 128, "streamed": 128}, {"stationary": 256, "streamed": 128}),
    "gpu": ({"columns": 64, "stages": 2}, {"columns": 128, "stages": 3}),
}
# No multiple of any block, nor of one another; each side takes several blocks.
ROWS, COLUMNS, DIM = 150, 200, 24
EMPTY = 7  # the one row that no column counts for

KEYS = jax.random.split(jax.random.key(0), 3)
A, B = jax.random.normal(KEYS[0], (ROWS, DIM)), jax.random.normal(KEYS[1], (COLUMNS, DIM))
COTANGENT = jax.random.uniform(KEYS[2], (ROWS,), minval=0.5, maxval=1.5)
EXCLUDE = (jnp.arange(ROWS) // 2, jnp.arange(COLUMNS))
INCLUDE = ((jnp.arange(ROWS) % 3).at[EMPTY].set(9), jnp.arange(COLUMNS) % 4)
WHERE = jnp.arange(COLUMNS) % 5 != 1
SCALE, BIAS = jnp.float32(0.5), jnp.float32(-2.0)

CASES = {
    "plain": (None, {"exclude": None, "include": None, "where": None}),
    "masked": (None, {"exclude": EXCLUDE, "include": INCLUDE, "where": WHERE}),
    "sigmoid": (BIAS, {"positive": EXCLUDE, "where": WHERE}),
}


class WithBlocks(NamedTuple):
    """An engine whose blocks are given instead of looked up."""

    module: Any
    blocks: tuple[tuple[str, int], ...]

    def forward(self, *sides):
        return self.module.forward(*sides, blocks=dict(self.blocks))

    def backward(self, *sides):
        return self.module.backward(*sides, blocks=dict(self.blocks))


def differentiate(log_sum_exp, sigmoid_loss, case, scale=SCALE):
    """Returns a function of (a, b) to (values, gradients by a, b, the scale and any bias)."""
    bias, options = CASES[case]

    def run(a, b):
        def total(a, b, scale, bias):
            if bias is None:
                values = log_sum_exp(a, b, scale, **options)
            else:
                values = sigmoid_loss(a, b, scale, bias, **options)
            return jnp.sum(COTANGENT * jnp.where(jnp.isfinite(values), values, 0.0)), values

        scalars = (scale,) if bias is None else (scale, bias)
        padded = (lambda a, b, s: total(a, b, s, None)) if bias is None else total
        gradients, values = jax.grad(padded, range(2 + len(scalars)), has_aux=True)(a, b, *scalars)
        return values, gradients

    return run


def kernel(module, blocks, case, scale=SCALE):
    engine = WithBlocks(module, tuple(blocks.items()))
    return differentiate(
        lambda *a, **k: streamed.log_sum_exp(engine, *a, **k),
        lambda *a, **k: streamed.sigmoid_loss(engine, *a, **k),
        case,
        scale,
    )


def assert_values(actual, expected):
    """Asserts that values, sums over DIM and then over columns, are right, and -inf where empty."""
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    assert_within(actual, expected, error_bound(DIM + COLUMNS))


def check(module, *, case="masked", dtype=jnp.float32, blocks=None, **options):
    """Compares values and gradients with those of the dense form, by JAX's own derivative."""
    platform = "gpu" if module.__name__.endswith("gpu") else "tpu"
    blocks = blocks or BLOCKS[platform][0]
    a, b = A.astype(dtype), B.astype(dtype)
    expected = differentiate(reference.log_sum_exp, reference.sigmoid_loss, case)
    values, gradients = jax.jit(expected)(a.astype(jnp.float32), b.astype(jnp.float32))
    actual = interpreted(kernel(module, blocks, case), a, b, platform=platform, **options)
    assert_values(actual[0], values)
    # bfloat16: the weights are rounded before their product, and the gradient itself.
    rounded = [dtype, dtype] if dtype == jnp.bfloat16 else []
    assert_within(actual[1], gradients, error_bound(DIM + ROWS + COLUMNS, rounded=rounded))
    if case == "masked":
        assert np.all(actual[1][0][EMPTY] == 0.0)
    return actual


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("plain", jnp.float32),
        ("masked", jnp.float32),
        ("sigmoid", jnp.float32),
        ("masked", jnp.bfloat16),
        ("sigmoid", jnp.bfloat16),
    ],
)
def test_equals_dense(case, dtype):
    for platform in INTERPRETERS:
        check(MODULES[platform], case=case, dtype=dtype)


def test_other_blocks_and_again():
    for platform in INTERPRETERS:
        first, again = (check(MODULES[platform], blocks=BLOCKS[platform][1]) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_two_cores_do_not_race():
    check(pallas_tpu, cores=2)


def test_weights_in_several_chunks(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "ROWS_AT_A_TIME", 128)
    monkeypatch.setattr(pallas_gpu, "COLUMNS_AT_A_TIME", 128)
    monkeypatch.setattr(pallas_gpu, "BLOCKS_OF_THREADS", 1)
    for platform in INTERPRETERS:
        if platform == "gpu":
            check(pallas_gpu)
    row, column = jax.ShapeDtypeStruct(A.shape, A.dtype), jax.ShapeDtypeStruct(B.shape, B.dtype)
    cross_lower(kernel(pallas_gpu, BLOCKS["gpu"][0], "masked"), (row, column), "cuda")


def test_large_logits():
    a, b = A[:128], B[:128]
    expected = reference.log_sum_exp(a, b, jnp.float32(1e4), None, None, None)
    for platform in INTERPRETERS:
        engine = WithBlocks(MODULES[platform], tuple(BLOCKS[platform][0].items()))

        def run(a, b, engine=engine):
            def total(a, b):
                values = streamed.log_sum_exp(engine, a, b, jnp.float32(1e4), None, None, None)
                return jnp.sum(values), values

            return jax.grad(total, (0, 1), has_aux=True)(a, b)

        gradients, values = interpreted(run, a, b, platform=platform, detect_races=False)
        assert_within(values, expected, error_bound(DIM + 128))
        assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize("name", ["simclr_512/backward", "siglip_4k/backward", "clip_16k/backward"])
@pytest.mark.parametrize(("platform", "implementation"), [("tpu", "tpu"), ("cuda", "gpu")])
def test_lowers(name, platform, implementation):
    case = bench.cases(f"pallas_{implementation}")[name]
    cross_lower(case.function, case.arguments, platform)


def check_forward(module, case="masked"):
    """Compares the values alone."""
    platform = "gpu" if module.__name__.endswith("gpu") else "tpu"
    bias, options = CASES[case]
    assert bias is None
    engine = WithBlocks(module, tuple(BLOCKS[platform][0].items()))
    expected = reference.log_sum_exp(A, B, SCALE, **options)
    with pytest.MonkeyPatch.context() as patch:
        if platform == "gpu":  # all columns for one block of threads, so that sums are carried on
            patch.setattr(module, "BLOCKS_OF_THREADS", 1)
        actual = interpreted(
            lambda a, b: streamed.log_sum_exp(engine, a, b, SCALE, **options),
            A,
            B,
            platform=platform,
        )
    assert_values(actual, expected)


def check_forward_unmasked(module):
    """Compares the values where only padding must not count."""
    check_forward(module, "plain")


def check_backward(module):
    """Compares the gradients alone, of rows whose values are known."""
    platform = "gpu" if module.__name__.endswith("gpu") else "tpu"
    _, options = CASES["masked"]
    values, gradients = jax.jit(
        differentiate(reference.log_sum_exp, reference.sigmoid_loss, "masked")
    )(A, B)
    marks = ({"exclude": EXCLUDE[i], "include": INCLUDE[i]} for i in range(2))
    rows, columns = ({"vectors": x} | mark for x, mark in zip((A, B), marks, strict=True))
    value = jnp.where(jnp.isfinite(values), values, 0.0)
    rows |= {"value": value, "cotangent": COTANGENT.at[EMPTY].set(0.0)}
    actual = interpreted(
        lambda rows, columns: module.backward(
            rows, columns, SCALE, None, blocks=BLOCKS[platform][0]
        ),
        rows,
        columns | {"where": options["where"]},
        platform=platform,
    )
    assert_within(actual[:3], gradients, error_bound(DIM + ROWS + COLUMNS))


TPU_MUTANTS = {
    "dropped mask": (
        check_forward,
        "entries.masked(entries.counted(first, second), scalars[0] * part, -jnp.inf)",
        "scalars[0] * part",
    ),
    "counted padding": (
        check_forward_unmasked,
        'blocks["streamed"], LANES, mark=True',
        'blocks["streamed"], LANES, mark=False',
    ),
    "sums not started": (
        check_forward,
        "for ref in carry:\n            ref[...] = jnp.zeros_like(ref)",
        "for ref in carry:\n            pass",
    ),
    "sums not rescaled": (check_forward, "* jnp.exp(top[...] - new_top)", ""),
    "missing block": (check_forward, "others // streamed),", "others // streamed - 1),"),
    "gradient not started": (
        check_backward,
        "for ref in (gradient, *shares):",
        "for ref in shares:",
    ),
    "dropped cotangent": (check_backward, 'weight = weight * row["cotangent"]', "pass"),
}
GPU_MUTANTS = {
    "dropped mask": (
        check_forward,
        'entries.masked(mask, constants["scale"] * part, -jnp.inf)',
        'constants["scale"] * part',
    ),
    "sums not rescaled": (check_forward, "total = total * jnp.exp(top - new_top)", "pass"),
    "sums not started": (
        check_forward,
        "return _filled(LOWEST), _filled(0.0)",
        "return _filled(LOWEST), _filled(1.0)",
    ),
    "missing block": (
        check_forward,
        "// column_block - first_tile)",
        "// column_block - first_tile - 1)",
    ),
    "dropped cotangent": (check_backward, 'weights = weights * held["cotangent"]', "pass"),
}


@pytest.mark.parametrize("name", TPU_MUTANTS)
def test_mutants_are_noticed(name):
    notice, old, new = TPU_MUTANTS[name]
    assert_killed(notice, pallas_tpu, old, new)


def test_gpu_mutants_are_noticed():
    for notice, old, new in GPU_MUTANTS.values():
        # Where JAX cannot interpret GPU kernels, the mutants still have to be what they say.
        mutated(pallas_gpu, old, new)
        if "gpu" in INTERPRETERS:
            assert_killed(notice, pallas_gpu, old, new)


@pytest.mark.parametrize("module", MODULES.values())
def test_what_the_kernels_refuse(module):
    blocks = {name: 100 for name in BLOCKS["tpu" if module is pallas_tpu else "gpu"][0]}
    sides = ({"vectors": A}, {"vectors": B}, SCALE, None)
    with pytest.raises(ValueError, match="100"):
        module.forward(*sides, blocks=blocks)
    with jax.enable_x64(True):
        wide = {"vectors": jnp.zeros((4, 8)), "exclude": jnp.zeros(4, int)}
        with pytest.raises(ValueError, match='in 32 bits, but vectors is float64.*"xla"'):
            module.forward(wide, wide, SCALE, None)
