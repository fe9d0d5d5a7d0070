"""Losses over several layers, kernels over patches, and what old and new embeddings share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from repalign.losses import alignment, backward_compatibility, contrastive, distillation

RNG = np.random.default_rng(19)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_matryoshka_2d_sums_layers_prefixes_and_divergences():
    a, b = draw(3, 5, 6), draw(3, 5, 6)
    loss = functools.partial(contrastive.nt_xent, temperature=0.5)
    options = {"prefixes": (2, 6), "depths": (2, 5), "kl_weight": 0.7, "kl_temperature": 0.4}
    value = jax.jit(lambda a, b: alignment.matryoshka_2d(loss, a, b, **options))(a, b)

    def nested(layer):
        return sum(loss(a[layer, :, :m], b[layer, :, :m]) for m in (2, 6))

    expected = np.asarray(nested(2) + (nested(0) / 2 + nested(1) / 5) / 2)
    for x in (a, b):
        probabilities = scipy.special.softmax(np.asarray(x) / 0.4, axis=-1)
        for layer in (0, 1):
            divergence = scipy.special.rel_entr(probabilities[2], probabilities[layer]).sum(1)
            expected = expected + 0.7 * 0.4 * divergence.mean() / 2
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_matryoshka_2d_wants_a_depth_for_each_shallow_layer():
    with pytest.raises(ValueError, match="3 layers for 1 depths"):
        alignment.matryoshka_2d(contrastive.dcl, draw(3, 5, 6), prefixes=(2,), depths=(4,))
    with pytest.raises(ValueError, match="1 layers for 0 depths"):
        alignment.matryoshka_2d(contrastive.dcl, draw(1, 5, 6), prefixes=(2,))


def test_patch_kernel_alignment_compares_centred_kernels():
    student, teacher = draw(4, 7, 3), draw(4, 7, 5)
    where = RNG.uniform(size=(4, 7)) > 0.3
    where[3] = [True] + [False] * 6
    value, gradients = jax.jit(
        jax.value_and_grad(
            lambda s, t: alignment.patch_kernel_alignment(s, t, where=jnp.asarray(where)).sum(),
            (0, 1),
        )
    )(student, teacher)
    expected = 0.0
    for s, t, mask in zip(np.asarray(student), np.asarray(teacher), where, strict=True):
        count = mask.sum()
        if count < 2:
            continue
        center = np.eye(count) - 1 / count
        kernels = [center @ x[mask].astype(np.float64) @ x[mask].T @ center for x in (s, t)]
        norms = np.linalg.norm(kernels[0]) * np.linalg.norm(kernels[1])
        expected += 1 - np.sum(kernels[0] * kernels[1]) / norms
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_array_equal(gradients[1], 0.0)
    np.testing.assert_array_equal(gradients[0][3], 0.0)
    rotation = jnp.linalg.qr(draw(3, 3))[0]
    same = alignment.patch_kernel_alignment(student, 3.0 * student @ rotation)
    np.testing.assert_allclose(same, 0.0, atol=1e-5)


def test_perceptual_sums_the_layers():
    shapes = ((3, 4, 4, 2), (3, 2, 2, 5))
    students, teachers = [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]
    value = jax.jit(distillation.perceptual)(students, teachers)
    expected = sum(
        ((s - t) ** 2).reshape(3, -1).mean(1) for s, t in zip(students, teachers, strict=True)
    )
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    with pytest.raises(ValueError):
        distillation.perceptual(students, teachers[:1])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_simplex_classifier_is_regular(classes):
    weights = backward_compatibility.simplex_classifier(classes)
    assert weights.shape == (classes, classes - 1) and weights.dtype == np.float32
    expected = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(weights @ weights.T, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(0), 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="at least two classes"):
        backward_compatibility.simplex_classifier(1)


def test_basis_transformation_keeps_the_new_embedding_whole():
    new, old = draw(6, 4), draw(6, 3)
    bases = [jnp.linalg.qr(draw(size, size))[0] for size in (4, 3, 4)]
    compatible, extra = jax.jit(
        functools.partial(backward_compatibility.basis_transformation, extra=2)
    )(new, old, *bases)
    new, old, bases = np.asarray(new), np.asarray(old), [np.asarray(basis) for basis in bases]
    from_old = old @ bases[1][:2].T
    from_old /= np.linalg.norm(from_old, axis=1, keepdims=True)
    both = np.concatenate([from_old, new @ bases[0].T], 1)
    np.testing.assert_allclose(compatible, both[:, :4] @ bases[2].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extra, both[:, 4:], rtol=1e-4, atol=1e-5)
    # Undoing the rotations gives the new embedding back.
    kept = np.concatenate([(np.asarray(compatible) @ bases[2])[:, 2:], extra], 1)
    np.testing.assert_allclose(kept @ bases[0], new, rtol=1e-4, atol=1e-5)
    arrays = map(jnp.asarray, (new, old, *bases))
    with pytest.raises(ValueError, match="extra=4 must be between 1"):
        backward_compatibility.basis_transformation(*arrays, extra=4)
