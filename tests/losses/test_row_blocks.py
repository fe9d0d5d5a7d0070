"""Losses over all pairs give the same values and gradients when they go by blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign import numerics
from repalign.losses import (
    backward_compatibility,
    disentangle,
    distillation,
    multi_view,
    mutual_information,
    whitening,
)

KEYS = jax.random.split(jax.random.key(0), 4)
A, B, C = (jax.random.normal(key, (7, 5)) for key in KEYS[:3])
LABELS = jnp.asarray([0, 1, 0, 2, 1, 0, 3])

LOSSES = {
    "relational_distance": distillation.relational_distance,
    "relational_angle": distillation.relational_angle,
    "cacr": lambda a, b: multi_view.cacr(jnp.stack([a, b], axis=1)),
    "cacr, constant weights": lambda a, b: multi_view.cacr(
        jnp.stack([a, b], axis=1), stop_weights=True
    ),
    "local_global_nce": lambda a, b: (
        mutual_information.local_global_nce(a, jnp.stack([b, b * b, 2 * a], axis=1)).loss
    ),
    "decompose_kl": lambda a, b: sum(
        disentangle.decompose_kl(a, b, 0.1 * C, dataset_size=50, sampling="stratified")
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    loss = LOSSES[name]

    def evaluate(a, b):
        value = loss(a, b)
        return jnp.sum(value * jnp.arange(1.0, 8.0)), value

    derivative = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
    whole = derivative(A, B)
    traced = []
    split = numerics.map_row_blocks

    def counted(function, rows, *, columns):
        traced.append(-(-7 * columns // numerics.MATRIX_ENTRIES))
        return split(function, rows, columns=columns)

    monkeypatch.setattr(numerics, "MATRIX_ENTRIES", 3 * 7)
    for module in (distillation, multi_view, mutual_information, disentangle):
        monkeypatch.setattr(module, "map_row_blocks", counted)
    blocked = derivative(A, B)
    assert traced and max(traced) > 1, "it went by blocks"
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), whole, blocked
    )


def test_the_last_block_may_be_ragged_and_every_row_keeps_its_place():
    rows = {"x": jnp.arange(11.0), "y": jnp.arange(22.0).reshape(11, 2)}

    def function(rows):
        return rows["x"] * 2, rows["y"][:, ::-1]

    for entries in (1, 3, 4, 11, 100):
        first, second = numerics.map_row_blocks(function, rows, columns=1, entries=entries)
        np.testing.assert_array_equal(first, rows["x"] * 2)
        np.testing.assert_array_equal(second, rows["y"][:, ::-1])


def test_memory_grows_with_the_batch_and_not_with_its_square():
    def temporary(batch):
        views = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
        loss = jax.jit(jax.grad(lambda a, b: jnp.sum(distillation.relational_distance(a, b))))
        return loss.lower(views, views).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32_768) < 1.5 * temporary(16_384)


def test_whitening_by_the_smaller_gram_matrix_is_the_same():
    """Few examples of many dimensions, against the matrix of dimensions written out."""
    x = jax.random.normal(KEYS[3], (4, 9))
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / 3
    y, z = covariance / jnp.trace(covariance), jnp.eye(9)
    for _ in range(3):
        step = 1.5 * jnp.eye(9) - 0.5 * z @ y
        y, z = y @ step, step @ z
    expected = centred @ z / jnp.sqrt(jnp.trace(covariance))
    np.testing.assert_allclose(
        whitening.iterative_whiten(x, iterations=3), expected, rtol=1e-4, atol=1e-5
    )


def test_an_example_without_another_class_has_no_negatives():
    loss = backward_compatibility.higher_order_compatibility
    alone = loss(A, B, jnp.zeros(7, jnp.int32))
    np.testing.assert_allclose(alone, -10.0 * jnp.sum(A * B, axis=1), rtol=1e-5)
    zeroed = loss(A, B, LABELS, same_class="zeroed")
    similarities = 10.0 * B @ A.T
    filled = jnp.where(LABELS[:, None] != LABELS, similarities, 0.0)
    expected = jax.nn.logsumexp(filled, axis=1) - jnp.diagonal(similarities)
    np.testing.assert_allclose(zeroed, expected, rtol=1e-5, atol=1e-4)
