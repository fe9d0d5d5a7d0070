import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import INTERPRETERS, assert_within, cross_lower, error_bound, interpreted
from mutation import assert_killed

from repalign.kernels import neighbors
from repalign.kernels.chips import CHIPS
from repalign.kernels.neighbors import pallas_gpu, pallas_tpu, reference, specs

MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}
PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}
# Blocks that leave a ragged edge on both sides of the data below.
BLOCKS = {"tpu": {"query_block": 32, "database_block": 128}, "gpu": {"tile": 64}}


def integer_points(dtype=jnp.float32):
    """140 points in opposite pairs: every score is exact, the mean is 0, and many are equal."""
    half = np.random.default_rng(0).integers(-2, 3, size=(70, 3))
    return jnp.asarray(np.concatenate([half, -half]), dtype)


def found(module, queries, database, *, platform, detect_races=False, cores=1, **options):
    search = functools.partial(module.top_k, **options)
    return interpreted(
        search, queries, database, platform=platform, detect_races=detect_races, cores=cores
    )


def check(module, platform, *, metric="euclidean", exclude_self=True, queries=40, k=5, **options):
    """Scores and indices are the reference's, bit by bit."""
    database = integer_points()
    queries = database[:queries]
    if metric == "inner_product":
        # All scores are negative: what is padding, and scores 0, would be nearest.
        queries, database = 3.0 - queries, database - 3.0
    search = {"k": k, "metric": metric, "exclude_self": exclude_self}
    expected = reference.top_k(queries, database, **search)
    assert len(np.unique(expected[0][0])) < k  # there are ties to break
    actual = found(
        module, queries, database, platform=platform, **(BLOCKS[platform] | search | options)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("metric", "exclude_self"), [("inner_product", False), ("euclidean", True)]
)
def test_ties_and_ragged_edges_come_out_as_in_the_reference(metric, exclude_self):
    for platform in INTERPRETERS:
        check(
            MODULES[platform],
            platform,
            metric=metric,
            exclude_self=exclude_self,
            detect_races=True,
        )


@pytest.mark.parametrize("blocks", [(None, None), (32, 256)])
def test_every_block_size_finds_the_same_on_a_tpu_of_two_cores(blocks):
    query_block, database_block = blocks
    check(
        pallas_tpu,
        "tpu",
        queries=70,
        query_block=query_block,
        database_block=database_block,
        cores=2,
        detect_races=True,
    )


def test_every_pipeline_finds_the_same_on_a_gpu():
    for platform in set(INTERPRETERS) & {"gpu"}:
        check(pallas_gpu, platform, tile=128, stages=2, detect_races=True)
        check(pallas_gpu, platform, tile=64, stages=3)


def test_long_lists(monkeypatch):
    check(pallas_tpu, "tpu", queries=3, k=130)  # two rows of lanes
    monkeypatch.setattr(pallas_gpu, "_LIST", 8)
    for platform in set(INTERPRETERS) & {"gpu"}:
        check(pallas_gpu, platform, k=19)  # three searches


@pytest.mark.parametrize("metric", neighbors.api.METRICS)
def test_scores_are_within_rounding_and_the_same_each_time(metric):
    keys = jax.random.split(jax.random.key(0))
    dim = 80
    queries = jax.random.normal(keys[0], (40, dim))
    database = 5.0 + jax.random.normal(keys[1], (150, dim))
    search = {"k": 5, "metric": metric, "exclude_self": False}
    expected, _ = reference.top_k(queries, database, **search)
    for platform in INTERPRETERS:
        first, again = (
            found(MODULES[platform], queries, database, platform=platform, **search)
            for _ in range(2)
        )
        # On both sides: the mean, the product and, if Euclidean, two norms.
        assert_within(first[0], np.asarray(expected), error_bound(2 * (len(database) + 3 * dim)))
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_bfloat16_is_multiplied_as_it_is():
    points = jax.random.normal(jax.random.key(0), (60, 16), jnp.bfloat16)
    search = {"k": 5, "metric": "inner_product", "exclude_self": True}
    wide = points.astype(jnp.float32)
    scores, indices = reference.top_k(wide, wide, **search)
    for platform in INTERPRETERS:
        actual = found(MODULES[platform], points, points, platform=platform, **search)
        # 2 ulp: products of bfloat16 are exact in float32, sums of 16 are not.
        assert_within(actual[0], np.asarray(scores), error_bound(16))
        np.testing.assert_array_equal(actual[1], indices)
    for lowering, platform in PLATFORMS.items():
        cross_lower(functools.partial(MODULES[platform].top_k, **search), [points] * 2, lowering)


MUTANTS = {
    "tpu": [
        ("dropped mask", "absent = column >= count", "absent = column < 0"),
        ("dropped mask", "if exclude_self:", "if False:"),
        ("no initialisation", "pl.when(pl.program_id(1) == 0)", "pl.when(pl.program_id(1) < 0)"),
        ("tie rule", "stays = values >= best", "stays = values > best"),
        (
            "tie rule",
            "jnp.min(jnp.where(scores == best, column, columns)",
            "jnp.max(jnp.where(scores == best, column, -1)",
        ),
        ("missing block", "pl.cdiv(database_count, columns))\n", "database_count // columns)\n"),
        ("missing block", "@pl.loop(0, rows // _GROUP)", "@pl.loop(1, rows // _GROUP)"),
    ],
    "gpu": [
        ("padding is a point", "constant_values=-jnp.inf", "constant_values=0.0"),
        ("dropped mask", "if exclude_self:", "if False:"),
        (
            "tie rule",
            "jnp.min(jnp.where(scores == wide, column, tile)",
            "jnp.max(jnp.where(scores == wide, column, -1)",
        ),
        ("tie rule", "num_keys=2", "num_keys=1"),
        ("missing block", "tiles=len(bias) // tile", "tiles=len(bias) // tile - 1"),
        ("missing product", "if i + j < parts", "if i + j < parts - 3"),
    ],
}


@pytest.mark.parametrize(
    ("platform", "kind", "old", "new"),
    [(platform, *mutant) for platform in INTERPRETERS for mutant in MUTANTS[platform]],
)
def test_mutants_are_noticed(platform, kind, old, new):
    metric = "inner_product" if kind == "padding is a point" else "euclidean"
    assert_killed(
        functools.partial(check, platform=platform, metric=metric), MODULES[platform], old, new
    )


@pytest.mark.parametrize("name", ["small_euclidean", "nnclr_queue", "cifar_knn_200"])
@pytest.mark.parametrize("lowering", PLATFORMS)
def test_real_shapes_lower_without_the_hardware(name, lowering):
    shape = specs.SHAPES[name]
    search = functools.partial(
        neighbors.top_k,
        k=shape.k,
        metric=shape.metric,
        implementation=f"pallas_{PLATFORMS[lowering]}",
    )
    operands = [
        jax.ShapeDtypeStruct((count, shape.dim), shape.dtype)
        for count in (shape.queries, shape.database)
    ]
    cross_lower(search, operands, lowering)


def test_none_is_what_choose_says():
    assert neighbors.choose(k=5, dtype=jnp.dtype("float32")).implementation == "xla"
    operands = [jax.ShapeDtypeStruct((64, 16), jnp.float32)] * 2
    for lowering, chip in (("tpu", "v5e"), ("cuda", "h100")):
        with jax.sharding.use_abstract_mesh(CHIPS[chip].described()):
            kernel = neighbors.choose(k=5, dtype=jnp.dtype("float32"))
            assert kernel.implementation == f"pallas_{PLATFORMS[lowering]}"
            assert CHIPS[chip].device_kind in kernel.reason
            for k, dtype in ((257, "float32"), (5, "float64")):
                fallback = neighbors.choose(k=k, dtype=jnp.dtype(dtype))
                assert fallback.implementation == "xla"
                assert ("257" if k == 257 else "float64") in fallback.reason
        # Asserts that there is a kernel in it.
        cross_lower(functools.partial(neighbors.top_k, k=5), operands, lowering)
    device = CHIPS["h100"].described().abstract_device
    four = jax.sharding.AbstractMesh((4,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(four):
        several = neighbors.choose(k=5, dtype=jnp.dtype("float32"))
        assert several.implementation == "xla" and "several devices" in several.reason
    blackwell = CHIPS["h100"]._replace(device_kind="NVIDIA B200").described()
    with jax.sharding.use_abstract_mesh(blackwell):
        assert "needs a Hopper GPU" in neighbors.choose(k=5, dtype=jnp.dtype("float32")).reason


def test_a_named_kernel_does_not_fall_back():
    points = jnp.ones((300, 2))
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match=f"{name} finds at most 256 neighbours, not 257"):
            neighbors.top_k(points, points, k=257, implementation=name)
        with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
            neighbors.top_k(points, points, k=2, implementation=name)
    search = {"k": 2, "metric": "inner_product", "exclude_self": False}
    with pytest.raises(ValueError, match="query_block 48"):
        pallas_tpu.top_k(points, points, query_block=48, **search)
    with pytest.raises(ValueError, match="tile 96"):
        pallas_gpu.top_k(points, points, tile=96, **search)
