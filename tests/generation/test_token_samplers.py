"""Token samplers draw from the model's distribution, truncate it as told, keep what is given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.generation import token_samplers
from repalign.losses.token_prediction import mask_tokens, masked_share

CODES, LENGTH, BATCH = 3, 2, 20_000
GENERATOR = np.random.default_rng(0)
FIRST = np.log([0.2, 0.5, 0.3]).astype(np.float32)
SECOND = np.log(GENERATOR.dirichlet(np.ones(CODES), CODES)).astype(np.float32)


def markov(caches, previous, position):
    logits = jnp.where(position == 0, jnp.asarray(FIRST), jnp.asarray(SECOND)[previous])
    return jnp.broadcast_to(logits, (len(previous), CODES)), caches


def frequencies(tokens):
    counts = np.bincount(np.asarray(tokens[:, 0] * CODES + tokens[:, 1]), minlength=CODES**2)
    return counts / len(tokens)


def assert_frequencies(tokens, expected):
    # Six standard deviations of a frequency.
    tolerance = 6 * np.sqrt(expected * (1 - expected) / len(tokens)) + 1e-12
    assert (np.abs(frequencies(tokens) - expected) <= tolerance).all()


def draw(**options):
    return token_samplers.autoregressive(
        jax.random.key(0), markov, (), batch=BATCH, length=LENGTH, **options
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sequences_come_with_the_probability_of_the_model(temperature):
    first = jax.nn.softmax(FIRST / temperature)
    second = jax.nn.softmax(SECOND / temperature, axis=1)
    assert_frequencies(draw(temperature=temperature), np.ravel(first[:, None] * second))


def test_temperature_zero_takes_the_likeliest_token():
    tokens = np.asarray(draw(temperature=0.0))
    assert (tokens == [1, SECOND[1].argmax()]).all()


def test_top_k_of_one_takes_the_likeliest_token():
    assert (np.asarray(draw(top_k=1)) == [1, SECOND[1].argmax()]).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_p", [0.1, 0.55, 0.9, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(seed, top_p):
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(5)).astype(np.float32)
    kept = np.isfinite(token_samplers.truncated_logits(jnp.log(probabilities), top_p=top_p))
    sets = [
        set(chosen)
        for size in range(1, 6)
        for chosen in itertools.combinations(range(5), size)
        if probabilities[list(chosen)].sum() >= top_p - 1e-6
    ]
    smallest = min(len(chosen) for chosen in sets)
    best = max(
        (chosen for chosen in sets if len(chosen) == smallest),
        key=lambda chosen: probabilities[list(chosen)].sum(),
    )
    assert set(np.flatnonzero(kept)) == best


def test_guidance_of_one_is_none_and_of_zero_is_the_null():
    one, null = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 0.0])
    np.testing.assert_array_equal(token_samplers.guided_logits(one, null, 1.0), one)
    np.testing.assert_array_equal(token_samplers.guided_logits(one, null, 0.0), null)
    np.testing.assert_array_equal(token_samplers.guided_logits(one, null, 2.0), 2 * one - null)


def independent(tokens):
    logits = jnp.asarray(np.stack([FIRST, SECOND[0]]))
    return jnp.broadcast_to(logits, (*tokens.shape, CODES))


def test_masked_generation_of_independent_tokens_is_exact():
    hidden = jnp.full((BATCH, LENGTH), CODES)
    tokens = token_samplers.masked(
        jax.random.key(1), independent, hidden, mask_token=CODES, steps=1
    )
    assert_frequencies(tokens, np.ravel(np.exp(FIRST)[:, None] * np.exp(SECOND[0])[None, :]))


@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_masked_generation_hides_what_the_schedule_says(steps):
    length, seen = 16, []

    def logits(tokens):
        jax.debug.callback(lambda count: seen.append(np.asarray(count)), (tokens == 4).sum(axis=1))
        return jnp.zeros((*tokens.shape, 4))

    given = jnp.full((2, length), 4).at[0, :3].set(jnp.asarray([1, 2, 3]))
    tokens = np.asarray(
        token_samplers.masked(jax.random.key(0), logits, given, mask_token=4, steps=steps)
    )
    jax.effects_barrier()
    assert ((tokens >= 0) & (tokens < 4)).all()
    np.testing.assert_array_equal(tokens[0, :3], [1, 2, 3])
    expected = [np.array([13, 16])]
    for number in range(1, steps):
        # In float32, for a product that is a whole number.
        share = masked_share(jnp.asarray(number / steps), schedule="cosine")
        remain = np.floor(np.array([13, 16]) * share)
        expected.append(np.maximum(1, np.minimum(expected[-1] - 1, remain)))
    np.testing.assert_array_equal(seen, np.minimum(expected, np.array([13, 16])))


def test_the_surest_tokens_are_kept_first():
    sure = jnp.zeros((1, 8, 2)).at[:, 3].set(jnp.asarray([50.0, 0.0]))
    kept = []

    def logits(tokens):
        jax.debug.callback(lambda t: kept.append(np.asarray(t)), tokens)
        return sure

    token_samplers.masked(
        jax.random.key(0),
        logits,
        jnp.full((1, 8), 2),
        mask_token=2,
        steps=8,
        choice_temperature=0.0,
    )
    jax.effects_barrier()
    assert kept[1][0, 3] == 0


def test_training_masks_at_least_one_token_and_follows_the_schedule():
    tokens = jnp.zeros((4000, 16), jnp.int32)
    hidden = np.asarray(mask_tokens(jax.random.key(0), tokens).sum(axis=1))
    assert hidden.min() == 1
    ratio = (np.arange(100_000) + 0.5) / 100_000
    expected = np.maximum(np.floor(16 * np.cos(np.pi / 2 * ratio)), 1).mean()
    assert abs(hidden.mean() - expected) < 6 * hidden.std() / np.sqrt(4000)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square"])
def test_schedules_fall_from_one_to_zero(schedule):
    share = np.asarray(masked_share(jnp.linspace(0, 1, 11), schedule=schedule))
    assert share[0] == 1 and abs(share[-1]) < 1e-6 and (np.diff(share) < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_no_step_is_an_error():
    with pytest.raises(ValueError, match="at least one step"):
        token_samplers.masked(
            jax.random.key(0), independent, jnp.full((1, 2), 3), mask_token=3, steps=0
        )
