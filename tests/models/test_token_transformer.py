"""Token priors: causality, the cache's numbers, masked tokens; parameters of VQGAN's GPT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.token_transformer import TokenTransformer

SHAPE = {"codes": 7, "length": 6, "width": 16, "depth": 2, "heads": 2}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 6)))
LABELS = jnp.asarray([0, 1, 3])


def build(**fields):
    model = TokenTransformer(**{**SHAPE, "classes": 3, **fields})
    params = model.init(jax.random.key(0), TOKENS, LABELS)["params"]
    # Large enough that every input moves every output it may move.
    noise = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * noise.standard_normal(leaf.shape), jnp.float32), params
    )


def moved(model, params, changed):
    apply = jax.jit(model.apply)
    before = apply({"params": params}, TOKENS, LABELS)[0]
    after = apply({"params": params}, changed, LABELS)[0]
    return np.asarray(jnp.any(before != after, axis=2))


def test_logits_depend_on_earlier_tokens_only():
    model, params = build()
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 7)
    assert (moved(model, params, changed) == [[False] * 3 + [True] * 3]).all()


def test_a_masked_model_sees_all_tokens():
    model, params = build(causal=False)
    changed = TOKENS.at[:, 2].set(model.mask_token)
    assert moved(model, params, changed).all()


def test_every_logit_depends_on_the_class():
    model, params = build()
    one = model.apply({"params": params}, TOKENS, LABELS)[0]
    other = model.apply({"params": params}, TOKENS, (LABELS + 1) % 4)[0]
    assert (one != other).any(axis=2).all()


@pytest.mark.parametrize("scan", [False, True])
def test_the_cache_gives_the_logits_of_the_whole_sequence(scan):
    model, params = build(scan=scan)
    expected, _ = model.apply({"params": params}, TOKENS, LABELS)
    step = jax.jit(model.next_logits)
    caches = model.empty_caches(3)
    for position in range(6):
        previous = TOKENS[:, position - 1] if position else jnp.zeros(3, jnp.int32)
        logits, caches = step(params, caches, previous, position, LABELS)
        np.testing.assert_allclose(logits, expected[:, position], rtol=2e-5, atol=2e-5)


def test_taps_are_where_the_logits_come_from():
    model, params = build(taps=(2,))
    logits, taps = model.apply({"params": params}, TOKENS, LABELS)
    x = taps["block_2"]
    assert x.shape == (3, 6, 16)
    centered = x - x.mean(axis=2, keepdims=True)
    normed = centered / jnp.sqrt(x.var(axis=2, keepdims=True) + 1e-6)
    normed = normed * params["final_norm"]["scale"] + params["final_norm"]["bias"]
    np.testing.assert_allclose(normed @ params["logits"]["kernel"], logits, rtol=1e-4, atol=1e-4)


def test_parameters_are_those_of_gpt():
    # taming-transformers' mingpt with 24 layers of width 1024, 256 tokens of 1,024 codes and one
    # token of 1,000 classes (and the null class) before them.
    model = TokenTransformer(1024, 256, width=1024, depth=24, heads=16, classes=1000, scan=True)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, labels)["params"]
    width = 1024
    block = 12 * width**2 + 13 * width
    expected = 24 * block + 2 * width + 2 * 1024 * width + 257 * width + 1001 * width
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_what_does_not_fit_is_refused():
    model, params = build()
    with pytest.raises(ValueError, match="6 tokens a sequence, not 5"):
        model.apply({"params": params}, TOKENS[:, :5], LABELS)
    with pytest.raises(ValueError, match="pass labels"):
        model.apply({"params": params}, TOKENS)
    masked, params = build(causal=False)
    with pytest.raises(ValueError, match="only a causal model"):
        masked.next_logits(params, (), TOKENS[:, 0], 0, LABELS)
