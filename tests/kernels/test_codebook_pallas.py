"""Codebook kernels without the hardware: interpreted, cross-lowered, and mutants of them noticed.

Mosaic GPU kernels are interpreted where JAX can (see ``INTERPRETERS``), and lowered everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import (
    INTERPRETERS,
    assert_within,
    cross_lower,
    error_bound,
    interpreted,
)
from mutation import assert_killed

from repalign.kernels import codebook as kernel
from repalign.kernels.chips import CHIPS
from repalign.kernels.codebook import (
    bench,
    operands,
    pallas_gpu,
    pallas_gpu_statistics,
    pallas_tpu,
    pallas_tpu_soft,
    pallas_tpu_statistics,
    statistics,
    xla,
)

SEARCH = {"tpu": pallas_tpu, "gpu": pallas_gpu}
STATISTICS = {"tpu": pallas_tpu_statistics, "gpu": pallas_gpu_statistics}
# Several blocks of each, the last ones not full; the second, one block of codes.
BLOCKS = {
    "tpu": ({"vector_block": 128, "code_block": 16}, {"vector_block": 256, "code_block": 48}),
    "gpu": ({"code_block": 64, "stages": 2}, {"code_block": 128, "stages": 3}),
}


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CODES = {"tpu": 44, "gpu": 100}


def _case(dim, codes, vectors=150):
    """Vectors, and codes of which some copy code 3: in its block and later, 8 apart and not."""
    codebook = _normal(codes, dim, seed=1)
    copies = [code for code in (7, 11, 19, 43, 91) if code < codes]
    codebook = codebook.at[jnp.asarray(copies)].set(codebook[3])
    return _normal(vectors, dim).at[jnp.asarray([5, 140])].set(codebook[3]), codebook


def _exact_scores(z, codebook, precision):
    scored = operands.scored(z, codebook, "euclidean", operands.center_sums(codebook))
    vectors, codes, bias, _ = (np.asarray(x) for x in scored)
    if precision == "bfloat16":
        vectors, codes = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (vectors, codes))
    return np.float64(bias) - vectors.astype(np.float64) @ codes.astype(np.float64).T


def _check_search(module, platform, *, dim=8, blocks=0, precision="float32", k=None, races=True):
    z, codebook = _case(dim, CODES[platform])

    def search(z, codebook):
        scored = operands.scored(z, codebook, "euclidean", operands.center_sums(codebook))
        options = {"precision": precision} | BLOCKS[platform][blocks]
        return module.top_k(scored, k=k, **options) if k else module.nearest(scored, **options)

    scores, indices = interpreted(search, z, codebook, platform=platform, detect_races=races)
    exact = _exact_scores(z, codebook, precision)
    order = np.argsort(exact, axis=1, kind="stable")[:, : k or 1]
    expected = np.take_along_axis(exact, order, axis=1)
    # Copies of a code have one score, so the stable order is also that of the indices.
    np.testing.assert_array_equal(indices, order if k else order[:, 0])
    # Six products of pieces and three of the bias; the pieces leave out 2^-24 of a product.
    bound = error_bound(6 * dim + 3) + 2.0**-24
    assert_within(scores, expected if k else expected[:, 0], bound)


def test_nearest_finds_the_float64_argmin_of_the_score_with_ties_to_the_lowest_index():
    for platform in INTERPRETERS:
        module = SEARCH[platform]
        _check_search(module, platform)
        _check_search(module, platform, blocks=1, precision="bfloat16", races=False)
        # More than one step of depth; on a GPU, vectors that do not stay in shared memory.
        _check_search(module, platform, dim=70, blocks=1, races=False)


def test_top_k_is_sorted_by_score_then_index():
    for platform in INTERPRETERS:
        _check_search(SEARCH[platform], platform, k=6)


SEARCH_MUTANTS = {
    "tpu": {
        "skipped initialisation": (
            "best_ref[...] = jnp.full(best_ref.shape, jnp.inf, jnp.float32)",
            "pass",
        ),
        "last of equal scores": ("better = scores < best", "better = scores <= best"),
        "index within the block": ("step * groups + i", "i"),
        "wrong block of codes": ("lambda i, j: (j, 0)", "lambda i, j: (0, 0)"),
    },
    "gpu": {
        "missing codes": ("range(0, scores.shape[1], COLUMNS)", "range(0, COLUMNS, COLUMNS)"),
        "last of equal scores": ("better = column < best", "better = column <= best"),
        "index within the block": ("step * len(columns) + i", "i"),
        "wrong rows": ("rows = pl.ds(warpgroup * ROWS, ROWS)", "rows = pl.ds(0, ROWS)"),
    },
}


def test_mutants_of_the_search_are_noticed():
    for platform in INTERPRETERS:
        for old, new in SEARCH_MUTANTS[platform].values():
            assert_killed(
                lambda module, platform=platform: _check_search(module, platform, races=False),
                SEARCH[platform],
                old,
                new,
            )


def test_a_mutant_of_top_k_is_noticed():
    mutants = {
        "tpu": ("held <= minimum", "held < minimum"),
        "gpu": ("ahead = score < other", "ahead = score <= other"),
    }
    for platform in INTERPRETERS:
        assert_killed(
            lambda module, platform=platform: _check_search(module, platform, k=3, races=False),
            SEARCH[platform],
            *mutants[platform],
        )


def _check_pieces(module):
    x = _normal(40, 5) * 10.0 ** jnp.arange(-2, 3)
    y, bias = _normal(30, 5, seed=1), _normal(30, seed=2)
    scored = module.Scored(x, y, bias, jnp.ones(40, bool))
    scored = module.padded(scored, vectors=16, codes=32)
    left, right = module.packed(scored, precision="float32", multiple=16)
    assert left.shape[1] == module.packed_depth(5, precision="float32", multiple=16) == 48
    product = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    np.testing.assert_array_less(product[:40, :30].max(axis=1), product[:40, 30])
    exact = np.float64(bias) - np.float64(x) @ np.float64(y).T
    size = np.abs(np.float64(bias)) + np.abs(np.float64(x)) @ np.abs(np.float64(y)).T
    assert np.all(np.abs(product[:40, :30] - exact) <= 2.0**-22 * size)


def test_six_products_of_pieces_are_the_float32_product():
    _check_pieces(operands)
    for old, new in {
        "(0, 0, 1, 1, 0, 2)": "(0, 0, 1, 1, 0, 0)",
        "_pad_rows(operands.bias, codes, EXCLUDED)": "_pad_rows(operands.bias, codes)",
    }.items():
        assert_killed(_check_pieces, operands, old, new)


def test_cores_share_the_vectors_and_change_no_bit():
    z, codebook = _case(8, 20)

    def search(z, codebook):
        scored = operands.scored(z, codebook, "euclidean", operands.center_sums(codebook))
        return pallas_tpu.nearest(scored, precision="float32", **BLOCKS["tpu"][0])

    one, two = (interpreted(search, z, codebook, cores=cores) for cores in (1, 2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def _loss(assign):
    def function(z, codebook, log_weights):
        log_normalizer, mean = assign(z, codebook, log_weights)
        return jnp.mean(jnp.square(log_normalizer)) + jnp.sum(jnp.sin(mean))

    return jax.value_and_grad(function, argnums=(0, 1, 2))


def _soft_case():
    # The first block of codes, and more, has weight zero.
    log_weights = _normal(70, seed=2).at[:40].set(-jnp.inf)
    return _normal(150, 3), _normal(70, 3, seed=1), log_weights


def _check_soft(module, races=False):
    case = _soft_case()
    loss = _loss(lambda *a: module.soft_assignment(*a, 128, 32))
    actual = interpreted(loss, *case, detect_races=races)
    expected = _loss(xla.soft_assignment)(*case)
    # Two chained products each way, of 3 dimensions and 70 codes or 150 vectors.
    assert_within(actual, expected, error_bound(3 + 70 + 3 + 150))


def test_soft_assignment_and_its_gradients_on_tpu():
    _check_soft(pallas_tpu_soft, races=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mean_ref[...] * scale", "mean_ref[...]"),
        ("self.codes, -jnp.inf", "self.codes, 0.0"),
        ("common_ref[...] + along", "common_ref[...]"),
    ],
)
def test_mutants_of_soft_assignment_are_noticed(old, new):
    assert_killed(_check_soft, pallas_tpu_soft, old, new)


def test_the_gpu_normalizer():
    if "gpu" in INTERPRETERS:
        z, codebook, log_weights = _soft_case()
        assign = jax.tree_util.Partial(
            kernel.soft_assignment, log_weights=log_weights, implementation="pallas_gpu"
        )
        actual = interpreted(assign, z, codebook, platform="gpu")
        expected = kernel.soft_assignment(z, codebook, log_weights=log_weights)
        assert_within(actual, expected, error_bound(2 * (6 * 3 + 3 + 70)))
    case = bench.cases("pallas_gpu")["llamagen_16k/soft_backward"]
    cross_lower(case.function, case.arguments, "cuda")


def _check_sums(module, platform, races=False):
    z = _normal(400, 5)
    # Code 20 ... 59 are empty, 7 fills blocks of its own, and some vectors have no code.
    segments = np.random.default_rng(1).choice([*range(20), *range(60, 101)], 400)
    segments[100:290] = 7
    segments = jnp.asarray(segments, jnp.int32)
    options = {"code_block": 16, "vector_block": 128} if platform == "tpu" else {}
    actual = interpreted(
        lambda z, segments: module.sums(statistics.sort_by_code(z, segments), 100, **options),
        z,
        segments,
        platform=platform,
        detect_races=races,
    )
    expected = np.zeros((101, 5))
    np.add.at(expected, np.asarray(segments), np.asarray(z, np.float64))
    assert_within(actual, expected[:100], error_bound(190))


def test_sums_of_the_vectors_of_every_code():
    for platform in INTERPRETERS:
        _check_sums(STATISTICS[platform], platform, races=True)


SUMS_MUTANTS = {
    "tpu": [
        ("sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)", "pass"),
        ("active[step] == 1", "active[step] >= 0"),
        ('side="right"', 'side="left"'),
    ],
    "gpu": [
        ("(first + i) * VECTORS", "i * VECTORS"),
        ("segments - block * CODES", "segments"),
        ("range(_PIECES):\n                plgpu.wgmma", "range(1):\n                plgpu.wgmma"),
    ],
}


def test_mutants_of_the_sums_are_noticed():
    for platform in INTERPRETERS:
        for old, new in SUMS_MUTANTS[platform]:
            assert_killed(
                lambda module, platform=platform: _check_sums(module, platform),
                STATISTICS[platform],
                old,
                new,
            )


def test_non_finite_input_has_the_documented_answer():
    z, codebook = _case(8, 30, vectors=40)
    z = z.at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf).at[3].set(0.0)
    codebook = codebook.at[0, 0].set(jnp.nan).at[4, 1].set(-jnp.inf)

    def everything(implementation):
        def function(z, codebook):
            indices = kernel.nearest_codes(
                z, codebook, distance="cosine", implementation=implementation
            )
            return (
                indices,
                kernel.top_k_codes(z, codebook, k=3, implementation=implementation),
                kernel.nearest_codes(
                    z, jnp.full_like(codebook, jnp.nan), implementation=implementation
                ),
                kernel.code_statistics(z, indices, 30, implementation=implementation),
            )

        return function

    *expected, totals = everything("xla")(z, codebook)
    for platform in INTERPRETERS:
        *actual, sums = interpreted(
            everything(f"pallas_{platform}"), z, codebook, platform=platform, detect_races=False
        )
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(sums.counts, totals.counts)
        finite = np.isfinite(totals.sums).all(axis=1)
        np.testing.assert_array_equal(np.isfinite(sums.sums).all(axis=1), finite)
        assert_within(sums.sums[finite], totals.sums[finite], error_bound(40))


LOWERED = [
    f"{shape}/{what}"
    for shape, whats in {
        "llamagen_16k": ("nearest_bfloat16", "top_8", "soft_backward", "statistics"),
        "ibq_262k": ("nearest",),
    }.items()
    for what in whats
]


@pytest.mark.parametrize(("platform", "name"), [("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")])
def test_every_kernel_lowers_at_real_shapes(platform, name):
    cases = bench.cases(name)
    for case in LOWERED:
        cross_lower(cases[case].function, cases[case].arguments, platform)


def test_none_chooses_and_says_why():
    assert kernel.choose() == ("xla", "there is no kernel for a cpu.")
    with jax.sharding.use_abstract_mesh(CHIPS["v6e"].described()):
        assert kernel.choose().implementation == "pallas_tpu"
        assert "float32" in kernel.choose(jnp.float64).reason
    with jax.sharding.use_abstract_mesh(CHIPS["h100"].described()):
        assert kernel.choose().implementation == "pallas_gpu"
        assert kernel.choose(k=33).implementation == "xla"
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"
    )
    for sizes, word in (((1,), "Hopper"), ((4,), "sharded")):
        mesh = jax.sharding.AbstractMesh(sizes, ("x",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            choice = kernel.choose()
            assert choice.implementation == "xla" and word in choice.reason


def test_a_named_kernel_never_falls_back():
    z, codebook = _normal(4, 3), _normal(5, 3)
    with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
        kernel.nearest_codes(z, codebook, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="exceeds 32"):
        kernel.top_k_codes(z, _normal(40, 3), k=33, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="multiples of 128"):
        pallas_tpu_soft.soft_assignment(z, codebook, jnp.zeros(5), 100, 8)
    scored = operands.scored(z, codebook, "cosine", operands.center_sums(codebook))
    with pytest.raises(ValueError, match="multiples of 128"):
        pallas_tpu.nearest(scored, precision="float32", vector_block=64)
    with pytest.raises(ValueError, match="64, 128, 192 or 256"):
        pallas_gpu.nearest(scored, precision="float32", code_block=100)
