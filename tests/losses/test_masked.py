import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import masked

RNG = np.random.default_rng(5)
PREDICTIONS = RNG.normal(size=(2, 4, 6)).astype(np.float32)
PATCHES = RNG.normal(size=(2, 4, 6)).astype(np.float32)
MASK = np.array([[True, False, True, False], [False] * 4])


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def test_random_masking_shuffles_and_restores():
    masking = masked.random_masking(jax.random.key(0), 3, 10, mask_ratio=0.75)
    assert masking.visible.shape == (3, 2)
    np.testing.assert_array_equal(masking.masked.sum(1), 8)
    for visible, hidden, restore in zip(*map(np.asarray, masking), strict=True):
        assert not hidden[visible].any()
        np.testing.assert_array_equal(np.sort(restore), np.arange(10))
        # Visible tokens first, then the others in shuffled order: restoring gives 0, 1, ..., 9.
        order = np.argsort(restore)
        np.testing.assert_array_equal(order[:2], visible)
        np.testing.assert_array_equal(order[restore], np.arange(10))
    other = masked.random_masking(jax.random.key(1), 3, 10, mask_ratio=0.75)
    assert np.any(np.asarray(other.visible) != np.asarray(masking.visible))


def test_every_token_is_equally_often_visible():
    masking = masked.random_masking(jax.random.key(2), 4000, 8, mask_ratio=0.5)
    np.testing.assert_allclose(np.mean(masking.masked, axis=0), 0.5, atol=0.04)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.9])
def test_random_masking_refuses_to_hide_everything(ratio):
    with pytest.raises(ValueError, match="must be in"):
        masked.random_masking(jax.random.key(0), 1, 8, mask_ratio=ratio)


@pytest.mark.parametrize(
    ("grid", "ratio", "sides"),
    # 36 - 23 = 13 tokens of an aspect ratio in [1/2, 2]: ceil(sqrt(13 a)) rows, not above 6.
    [((6, 6), 0.65, {(3, 5), (3, 6), (4, 4), (5, 3)}), ((2, 8), 0.4, {(2, 5)})],
)
def test_one_block_stays_visible_on_the_torus(grid, ratio, sides):
    height, width = grid
    tokens = height * width
    visible = tokens - int(tokens * ratio)
    masking = run(
        masked.inverse_block_masking, jax.random.key(0), batch=300, grid=grid, mask_ratio=ratio
    )
    assert masking.visible.shape == (300, visible)
    assert np.all(np.sum(~masking.masked, axis=1) == visible)
    restored = np.take_along_axis(np.argsort(masking.restore, axis=1), masking.restore, axis=1)
    assert np.all(restored == np.arange(tokens))
    found = set()
    for order in np.asarray(masking.visible):
        row, column = np.divmod(order, width)
        # From the first token on, rows of one length go to the right and down.
        down, right = (row - row[0]) % height, (column - column[0]) % width
        length = int(right.max()) + 1
        np.testing.assert_array_equal(down * length + right, np.arange(visible))
        found.add((-(-visible // length), length))
    assert found == sides
    first = np.bincount(masking.visible[:, 0], minlength=tokens)
    assert first.min() > 0 and first.max() < 5 * first.mean()


def test_hidden_tokens_of_a_block_masking_come_in_random_order():
    masking = run(
        masked.inverse_block_masking, jax.random.key(1), batch=2000, grid=(4, 4), mask_ratio=0.75
    )
    order = np.argsort(masking.restore, axis=1)
    hidden = order[:, 4:]
    rank = np.argsort(np.argsort(hidden, axis=1), axis=1)
    assert np.abs(rank.mean(0) - 5.5).max() < 0.5
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        masked.inverse_block_masking(jax.random.key(0), 1, (4, 4), mask_ratio=1.0)


@pytest.mark.parametrize("ddof", [0, 1])
def test_mae_with_either_variance(ddof):
    mean = PATCHES.mean(-1, keepdims=True)
    target = (PATCHES - mean) / np.sqrt(PATCHES.var(-1, ddof=ddof, keepdims=True) + 1e-6)
    expected = ((PREDICTIONS - target) ** 2).mean(-1)
    arguments = jnp.asarray(PREDICTIONS), jnp.asarray(PATCHES), jnp.asarray(MASK)
    result = run(masked.mae, *arguments, ddof=ddof)
    np.testing.assert_allclose(result, [expected[0, [0, 2]].mean(), 0.0], rtol=2e-5)


def test_mae_takes_the_unbiased_variance_and_normalised_patches_by_default():
    arguments = jnp.asarray(PREDICTIONS), jnp.asarray(PATCHES), jnp.asarray(MASK)
    default = run(masked.mae, *arguments)
    np.testing.assert_allclose(default, run(masked.mae, *arguments, ddof=1), rtol=1e-6)
    assert abs(default[0] - run(masked.mae, *arguments, ddof=0)[0]) > 1e-3
    raw = run(masked.mae, *arguments, normalize_patches=False)
    expected = ((PREDICTIONS - PATCHES) ** 2).mean(-1)[0, [0, 2]].mean()
    np.testing.assert_allclose(raw[0], expected, rtol=2e-5)


def test_simmim_is_the_absolute_error_of_masked_pixels():
    official = (np.abs(PREDICTIONS - PATCHES) * MASK[..., None]).sum() / (MASK.sum() * 6)
    arguments = jnp.asarray(PREDICTIONS), jnp.asarray(PATCHES), jnp.asarray(MASK)
    result = run(masked.simmim, *arguments)
    np.testing.assert_allclose(result, [official, 0.0], rtol=2e-5)
    to_patches = jax.grad(lambda p: jnp.sum(masked.simmim(arguments[0], p, arguments[2])))
    assert not np.any(to_patches(arguments[1]))


@pytest.mark.parametrize("standardize", [True, False])
def test_patch_discrimination_by_hand(standardize):
    z = PREDICTIONS
    if standardize:
        z = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-4)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    scores = np.einsum("bpd,bqd->bpq", unit(z), unit(PATCHES)) / 0.3
    each = np.log(np.exp(scores).sum(-1)) - np.einsum("bpp->bp", scores)
    result = run(
        masked.patch_discrimination,
        jnp.asarray(PREDICTIONS),
        jnp.asarray(PATCHES),
        temperature=0.3,
        standardize=standardize,
    )
    np.testing.assert_allclose(result, 0.6 * each.mean(1), rtol=2e-5)
