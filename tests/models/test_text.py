import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.text import TextEncoder

ENCODER = TextEncoder(vocabulary=7, length=5, width=8, depth=2, heads=2, taps=(1,))
TOKENS = jnp.array([[3, 1, 4, 1, 0], [2, 6, 5, 3, 0], [1, 3, 4, 1, 0], [0, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def encoded():
    run = jax.jit(ENCODER.init_with_output)
    (out, taps), variables = run(jax.random.key(0), TOKENS)
    return out, taps, variables


def test_the_encoding_is_the_mean_of_what_is_not_padding(encoded):
    out, taps, _ = encoded
    assert out.shape == (4, 8) and taps["block_1"].shape == taps["tokens"].shape == (4, 5, 8)
    np.testing.assert_allclose(out[:3], taps["tokens"][:3, :4].mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[3], 0.0)
    # Layer norm came last: every token has mean 0 and variance 1.
    np.testing.assert_allclose(taps["tokens"].var(axis=-1), 1.0, rtol=1e-3)


def test_words_and_their_order_count(encoded):
    out, _, variables = encoded
    # Rows 0 and 2 hold the same words in another order.
    assert np.abs(out[0] - out[2]).max() > 1e-4
    alone = jax.jit(ENCODER.apply)(variables, TOKENS[1:2])[0]
    np.testing.assert_allclose(alone[0], out[1], rtol=1e-4, atol=1e-5)
    assert variables["params"]["words"].shape == (7, 8)
    assert variables["params"]["positions"].shape == (5, 8)


def test_a_text_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="a text of 6 tokens is longer than length=5"):
        ENCODER.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))
