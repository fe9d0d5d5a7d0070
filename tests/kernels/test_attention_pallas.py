"""The TPU and GPU kernels of attention: interpreted, cross-lowered, and mutated."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_proof import (
    BLIND_QUERIES,
    UNSEEN_KEY,
    arrays,
    bound,
    expected,
    holes,
    segments,
    value_and_gradients,
)
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_proof import INTERPRETERS, assert_within, cross_lower, interpreted
from mutation import assert_killed

from repalign.kernels import mosaic_gpu
from repalign.kernels.attention import (
    bench,
    pallas_gpu,
    pallas_gpu_kernels,
    pallas_tpu,
    pallas_tpu_kernels,
)
from repalign.kernels.attention.reference import Masks

SMALL = {"query_block": 8, "key_block": 16, "backward_query_block": 8, "backward_key_block": 16}


@contextlib.contextmanager
def tpu_kernels(kernels=pallas_tpu_kernels, lanes=8):
    """Rows of fewer lanes than Mosaic's 128, so that small arrays have many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "kernels", kernels)
        patch.setattr(pallas_tpu, "LANES", lanes)
        yield


@contextlib.contextmanager
def gpu_kernels(kernels=pallas_gpu_kernels, dtype=jnp.bfloat16):
    """Has left operands of products go through shared memory.

    The interpreter takes them from there only; on the device they stay in registers.
    """
    staging = {}

    def kernel(body, *, scratch_types, **options):
        def staged_body(*refs, staging_tiles, **scratch):
            staging["tiles"] = staging_tiles
            body(*refs, **scratch)

        tiles = {"staging_tiles": plgpu.SMEM((pallas_gpu_kernels.COMPUTE, 128, 128), dtype)}
        return mosaic_gpu.kernel(staged_body, scratch_types=scratch_types | tiles, **options)

    def from_shared_memory(total_ref, a, b):
        rows, columns = (pl.ds(0, size) for size in a.shape)
        tile = staging["tiles"].at[lax.axis_index("warpgroup"), rows, columns]
        tile[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(total_ref, tile, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_gpu, "kernels", kernels)
        patch.setattr(pallas_gpu, "mosaic_gpu", types.SimpleNamespace(kernel=kernel))
        patch.setattr(kernels, "from_registers", from_shared_memory)
        yield


def check_tpu(operands, masks, *, causal, races=True, cores=1, **blocks):
    """Returns what the interpreted kernels say, after comparing it with the reference."""
    attention = functools.partial(pallas_tpu.attention, **blocks)
    run = functools.partial(value_and_gradients, attention, masks=masks, causal=causal)
    actual = interpreted(run, *operands, detect_races=races, cores=cores)
    assert_within(actual, expected(operands, masks, causal=causal), bound(operands))
    return actual


def check_gpu(operands, masks, *, causal, races=False, **blocks):
    attention = functools.partial(pallas_gpu.attention, **blocks)
    run = functools.partial(value_and_gradients, attention, masks=masks, causal=causal)
    actual = interpreted(run, *operands, platform="gpu", detect_races=races)
    assert_within(actual, expected(operands, masks, causal=causal), bound(operands))
    return actual


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, jnp.float32),
        (72, jnp.float32),
        (80, jnp.bfloat16),
        (96, jnp.float32),
        (128, jnp.float32),
    ],
)
def test_head_dims_in_one_block(dim, dtype):
    check_tpu(arrays(9, 13, 1, dim, dtype, batch=1), Masks(), causal=False, races=False)


@pytest.mark.parametrize(("tokens", "causal"), [(197, False), (257, True)])
def test_ragged_lengths_in_whole_tiles(tokens, causal):
    blocks = dict.fromkeys(SMALL, 128)
    operands = arrays(tokens, tokens, 1, 72, batch=1)
    check_tpu(operands, Masks(), causal=causal, races=False, **blocks)


@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (16, 24)])
def test_blocks_of_any_size_give_the_same(queries, keys):
    blocks = {name: queries if "query" in name else keys for name in SMALL}
    with tpu_kernels():
        operands = arrays(19, 37, 1, 8, batch=1)
        check_tpu(operands, segments(19, 37), causal=True, races=False, **blocks)


def test_queries_that_see_nothing_are_zeros_with_zero_gradients():
    with tpu_kernels():
        operands, masks = arrays(19, 37, 2, 8), holes(19, 37, heads=2)
        actual = check_tpu(operands, masks, causal=False, races=False, **SMALL)
    for name in ("out", "dq"):
        assert not actual[name][:, list(BLIND_QUERIES)].any()
    for name in ("dk", "dv"):
        assert not actual[name][:, UNSEEN_KEY].any()


def test_same_bits_on_one_core_and_on_two_without_races():
    operands = arrays(9, 17, 1, 8, jnp.bfloat16, batch=1)
    with tpu_kernels():
        one, two = (
            check_tpu(
                operands, segments(9, 17), causal=False, cores=cores, races=cores > 1, **SMALL
            )
            for cores in (1, 2)
        )
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])


def test_gpu_kernels_interpreted():
    """Runs where JAX has a Mosaic GPU interpreter (0.11 on)."""
    for platform in INTERPRETERS:
        if platform == "gpu":
            check_gpu_cases()


def check_gpu_cases():
    cases = [
        (arrays(72, 200, 1, 72, jnp.bfloat16, batch=1), Masks(), True, True),
        (arrays(197, 133, 1, 64, jnp.bfloat16, batch=1), segments(197, 133), True, False),
        (arrays(100, 133, 2, 96, jnp.float16, batch=1), holes(100, 133, heads=2), False, False),
    ]
    for operands, masks, causal, races in cases:
        with gpu_kernels(dtype=operands[0].dtype):
            actual = check_gpu(operands, masks, causal=causal, races=races)
    for name in ("out", "dq"):
        assert not actual[name][:, list(BLIND_QUERIES)].any()
    for name in ("dk", "dv"):
        assert not actual[name][:, UNSEEN_KEY].any()


@pytest.mark.parametrize("name", ["sit_b_2_256px", "packed_128"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers(platform, name):
    implementation = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]
    case = bench.cases(implementation)[f"{name}/backward"]
    cross_lower(case.function, case.arguments, platform)


def test_masks_lower():
    q = jax.ShapeDtypeStruct((2, 197, 4, 80), jnp.bfloat16)
    masks = Masks(jax.ShapeDtypeStruct((1, 4, 197, 197), jnp.bool_))
    for platform, module in (("tpu", pallas_tpu), ("cuda", pallas_gpu)):
        run = functools.partial(value_and_gradients, module.attention, causal=False)
        cross_lower(run, (q, q, q, q, masks), platform)


def check_forward(kernels, masks=None, *, causal=False):
    """The forward pass alone, which is quicker to interpret."""
    operands, masks = arrays(19, 21, 1, 8, batch=1), masks or Masks()
    options = {"masks": masks, "scale": 8**-0.5, "causal": causal, **SMALL}
    with tpu_kernels(kernels):
        run = functools.partial(pallas_tpu.attention, **options)
        out = interpreted(run, *operands[:3], detect_races=False)
    assert_within(out, expected(operands, masks, causal=causal)["out"], bound(operands))


check_causal = functools.partial(check_forward, causal=True)
check_segments = functools.partial(check_forward, masks=segments(19, 21))


def check_gradients(kernels):
    operands = arrays(19, 21, 1, 8, batch=1)
    with tpu_kernels(kernels):
        check_tpu(operands, segments(19, 21), causal=True, races=False, **SMALL)


@pytest.mark.parametrize("check", [check_forward, check_causal, check_segments, check_gradients])
def test_true_tpu_kernels_pass_what_mutants_fail(check):
    check(pallas_tpu_kernels)


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_segments, "shared.append(keys == refs.query_segments[0])", "pass"),
        (check_causal, "shared.append(key <= query)", "pass"),
        (check_forward, "shared.append(_inside(key_start, shape, 0, plan.keys))", "pass"),
        (check_forward, "_zero_beyond(v_ref[0], key_start, plan.keys)", "v_ref[0]"),
        (check_forward, "sums_ref[...] = jnp.zeros_like(sums_ref)", "pass"),
        (check_forward, "sums_ref[lanes] * rescale + product", "sums_ref[lanes] + product"),
        (check_forward, "total_ref[row] * rescale + jnp.sum", "total_ref[row] + jnp.sum"),
        (check_causal, "< (query_block + 1) * plan.query_block", "< plan.query_block"),
        (check_gradients, "dk_sum[...] = jnp.zeros_like(dk_sum)", "pass"),
        (
            check_gradients,
            "slopes = products - mean_ref[0, 0, head : head + 1]",
            "slopes = products",
        ),
        (check_gradients, "top_ref[...] + jnp.log2(total)", "top_ref[...]"),
    ],
)
def test_tpu_mutants_are_noticed(check, old, new):
    assert_killed(check, pallas_tpu_kernels, old, new)


def check_gpu_kernels(kernels, masks=None, *, causal=False):
    operands = arrays(72, 133, 1, 64, jnp.bfloat16, batch=1)
    with gpu_kernels(kernels):
        check_gpu(operands, masks or Masks(), causal=causal, key_block=64)


def test_gpu_mutants_are_noticed():
    """Runs where JAX has a Mosaic GPU interpreter (0.11 on)."""
    causal = functools.partial(check_gpu_kernels, causal=True)
    segmented = functools.partial(check_gpu_kernels, masks=segments(72, 133))
    mutants = [
        (segmented, "shared.append(rows == columns)", "pass"),
        (segmented, "sums * _rows(rescale, sums.shape) + product", "sums + product"),
        (segmented, "weights * (products - _columns(mean, block))", "weights * products"),
        (causal, "pl.cdiv((tile + 1) * plan.query_tile, jnp.int32(plan.key_block))", "1"),
    ]
    for platform in INTERPRETERS:
        if platform == "gpu":
            for check in (causal, segmented):
                check(pallas_gpu_kernels)
            for check, old, new in mutants:
                assert_killed(check, pallas_gpu_kernels, old, new)
