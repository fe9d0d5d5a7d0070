import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import backward_compatibility
from repalign.registry import UserError

RNG = np.random.default_rng(7)
NEW = RNG.normal(size=(5, 4)).astype(np.float32)
OLD = RNG.normal(size=(5, 4)).astype(np.float32)
LABELS = np.array([0, 1, 0, 2, 1], np.int32)


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def test_orthogonal_matrix_is_a_rotation():
    parameters = RNG.normal(size=(4, 4)).astype(np.float32)
    rotation = run(backward_compatibility.orthogonal_matrix, jnp.asarray(parameters))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, rtol=1e-5)
    # In two dimensions the parameter is the angle.
    angle = np.array([[0.0, -0.3], [0.0, 0.0]], np.float32)
    expected = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    result = run(backward_compatibility.orthogonal_matrix, jnp.asarray(angle))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_old_prefix_cosine_compares_the_first_dimensions():
    old = OLD[:, :3]
    cosine = np.sum(NEW[:, :3] * old, 1) / (
        np.linalg.norm(NEW[:, :3], axis=1) * np.linalg.norm(old, axis=1)
    )
    result = run(backward_compatibility.old_prefix_cosine, jnp.asarray(NEW), jnp.asarray(old))
    np.testing.assert_allclose(result, 1 - cosine, rtol=2e-5)
    with pytest.raises(ValueError, match="3 dimensions, fewer than the old 4"):
        backward_compatibility.old_prefix_cosine(jnp.asarray(old), jnp.asarray(OLD))


def test_higher_order_compatibility_with_both_treatments_of_the_same_class():
    similarities = 2.0 * OLD @ NEW.T
    different = LABELS[:, None] != LABELS[None]
    expected = {
        "excluded": np.log(np.sum(np.exp(similarities) * different, 1)),
        "zeroed": np.log(np.sum(np.where(different, np.exp(similarities), 1.0), 1)),
    }
    arguments = jnp.asarray(NEW), jnp.asarray(OLD), jnp.asarray(LABELS)
    for name, negatives in expected.items():
        result = run(
            backward_compatibility.higher_order_compatibility, *arguments, mu=2.0, same_class=name
        )
        np.testing.assert_allclose(result, negatives - np.diag(similarities), rtol=1e-4)
    with pytest.raises(UserError, match="Valid: excluded, zeroed"):
        backward_compatibility.higher_order_compatibility(*arguments, same_class="kept")


def test_one_class_alone_leaves_the_positive_term():
    arguments = jnp.asarray(NEW), jnp.asarray(OLD), jnp.zeros(5, jnp.int32)
    result = run(backward_compatibility.higher_order_compatibility, *arguments, mu=2.0)
    np.testing.assert_allclose(result, -2.0 * np.sum(OLD * NEW, 1), rtol=2e-5)


def test_the_old_model_receives_no_gradient():
    new, old, labels = jnp.asarray(NEW), jnp.asarray(OLD), jnp.asarray(LABELS)

    def total(new, old):
        compatibility = backward_compatibility.higher_order_compatibility(new, old, labels, mu=1.0)
        return jnp.sum(compatibility + backward_compatibility.old_prefix_cosine(new, old))

    to_new, to_old = jax.jit(jax.grad(total, argnums=(0, 1)))(new, old)
    assert np.all(np.any(to_new, axis=1)) and not np.any(to_old)


def test_old_prototype_cross_entropy_classifies_the_prefix_by_fixed_prototypes():
    prototypes = RNG.normal(size=(3, 2)).astype(np.float32)
    given = np.broadcast_to(prototypes, (5, 3, 2))
    loss = functools.partial(backward_compatibility.old_prototype_cross_entropy, scale=7.0)
    found = run(loss, NEW, given, LABELS)
    unit = NEW[:, :2] / np.linalg.norm(NEW[:, :2], axis=1, keepdims=True)
    logits = 7.0 * unit @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), LABELS]
    # Logits of up to 7 are subtracted from each other: a small loss has their float32 rounding.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    labels = jnp.asarray(LABELS)
    gradients = jax.jit(jax.grad(lambda *a: loss(*a, labels).sum(), argnums=(0, 1)))(NEW, given)
    assert np.any(gradients[0][:, :2] != 0)
    np.testing.assert_array_equal(gradients[0][:, 2:], 0)
    np.testing.assert_array_equal(gradients[1], 0)
    with pytest.raises(ValueError, match="fewer than the prototypes' 5"):
        run(loss, NEW, np.zeros((5, 3, 5), np.float32), LABELS)
