"""The random-projection quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.quantizers.random_projection import (
    init_random_projection,
    random_projection_indices,
)


def test_indices_are_the_nearest_normalized_codes():
    state = init_random_projection(jax.random.key(0), dim=12, code_dim=4, num_codes=20, heads=2)
    x = 3.0 + 5.0 * jax.random.normal(jax.random.key(1), (3, 7, 12))
    indices = jax.jit(random_projection_indices)(x, state)
    normal = np.asarray(x, np.float64)
    normal = (normal - normal.mean(-1, keepdims=True)) / normal.std(-1, keepdims=True)
    for head in range(2):
        projected = normal @ np.asarray(state.projections[head])
        projected /= np.linalg.norm(projected, axis=-1, keepdims=True)
        expected = np.argmax(projected @ np.asarray(state.codebooks[head]).T, axis=-1)
        np.testing.assert_array_equal(indices[..., head], expected)
    # Normalization makes the targets blind to offset and scale of the input.
    np.testing.assert_array_equal(indices, jax.jit(random_projection_indices)(9.0 * x + 4.0, state))
    with pytest.raises(ValueError, match="11 dimensions"):
        random_projection_indices(x[..., :11], state)


def test_initial_scales():
    state = init_random_projection(jax.random.key(0), dim=200, code_dim=100, num_codes=30)
    deviation = np.sqrt(2 / 300)
    # The standard error of a standard deviation from n draws is deviation / sqrt(2 n).
    assert abs(np.std(state.projections) - deviation) < 4 * deviation / np.sqrt(2 * 20_000)
    np.testing.assert_allclose(np.linalg.norm(state.codebooks, axis=-1), 1.0, rtol=1e-6)
    assert jnp.array_equal(
        state.codebooks,
        init_random_projection(jax.random.key(0), dim=200, code_dim=100, num_codes=30).codebooks,
    )
