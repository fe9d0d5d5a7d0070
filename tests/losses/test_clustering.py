import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import clustering

RNG = np.random.default_rng(2)


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def entropy(targets, scores, temperature):
    return -(targets * np.log(softmax(scores / temperature))).sum(-1)


def balance(scores, epsilon, iterations):
    """Sinkhorn by exponentials in float64."""
    plan = np.exp(scores.astype(np.float64) / epsilon)
    for _ in range(iterations):
        plan /= plan.sum(0)
        plan /= plan.sum(1, keepdims=True)
    return plan


def test_sinkhorn_against_reference_numbers(golden_losses):
    result = run(
        clustering.sinkhorn,
        jnp.asarray(golden_losses["sinkhorn/in/scores"]),
        epsilon=0.05,
        iterations=3,
    )
    np.testing.assert_allclose(result, golden_losses["sinkhorn/value"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(np.sum(result, 1), 1.0, rtol=1e-6)


def test_sinkhorn_stays_finite_where_exponentials_overflow():
    scores = RNG.normal(size=(6, 3)).astype(np.float32)
    result = np.asarray(run(clustering.sinkhorn, jnp.asarray(scores), epsilon=1e-3, iterations=3))
    assert np.max(scores) / 1e-3 > np.log(np.finfo(np.float32).max)
    np.testing.assert_allclose(result.sum(1), 1.0, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda s: clustering.sinkhorn(s, epsilon=1e-3)[0, 0]))(
        jnp.asarray(scores)
    )
    assert np.all(np.isfinite(gradient))


def test_sinkhorn_converges_to_the_prescribed_marginal():
    scores = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    marginal = np.array([1.0, 2.0, 5.0], np.float32)
    plan = run(
        clustering.sinkhorn, scores, epsilon=1.0, iterations=50, marginal=jnp.asarray(marginal)
    )
    np.testing.assert_allclose(plan.sum(0), marginal, rtol=1e-4)
    with pytest.raises(ValueError, match="iterations >= 1"):
        clustering.sinkhorn(scores, iterations=0)


def test_masked_rows_do_not_take_part_in_sinkhorn():
    scores = RNG.normal(size=(5, 3)).astype(np.float32)
    where = np.array([True, False, True, True, False])
    result = run(clustering.sinkhorn, jnp.asarray(scores), epsilon=0.5, where=jnp.asarray(where))
    np.testing.assert_allclose(result[where], balance(scores[where], 0.5, 3), rtol=2e-5)
    assert np.all(
        np.isfinite(run(clustering.sinkhorn, jnp.asarray(scores), where=jnp.zeros(5, bool)))
    )


def test_swapped_assignment_against_reference_numbers(golden_losses):
    names = ("h0", "h1", "l0", "l1")
    inputs = [jnp.asarray(golden_losses[f"swav/in/{name}"]) for name in names]

    def loss(h0, h1, l0, l1):
        return run(
            clustering.swapped_assignment,
            [h0, h1],
            [l0, l1],
            temperature=0.1,
            sinkhorn_iterations=3,
            sinkhorn_epsilon=0.05,
        )

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*inputs)
    np.testing.assert_allclose(value, golden_losses["swav/value"][0], rtol=2e-5)
    for name, gradient in zip(names, gradients, strict=True):
        expected = golden_losses[f"swav/grad/{name}"]
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )


def test_swapped_assignment_balances_with_a_queue():
    high = [RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(2)]
    queue = [RNG.normal(size=(5, 3)).astype(np.float32) for _ in range(2)]
    expected = 0.0
    for index in (0, 1):
        codes = balance(np.concatenate([high[index], queue[index]]), 0.5, 2)[:4]
        expected += entropy(codes, high[1 - index], 0.3).mean() / 2
    result = run(
        clustering.swapped_assignment,
        [jnp.asarray(x) for x in high],
        [],
        temperature=0.3,
        sinkhorn_iterations=2,
        sinkhorn_epsilon=0.5,
        queue=[jnp.asarray(x) for x in queue],
    )
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    with pytest.raises(ValueError, match="1 queues for 2"):
        run(
            clustering.swapped_assignment,
            [jnp.asarray(x) for x in high],
            [],
            queue=[jnp.asarray(queue[0])],
        )
    with pytest.raises(ValueError, match="at least one high-resolution view and one other"):
        run(clustering.swapped_assignment, [jnp.asarray(high[0])], [])


def test_dino_against_reference_numbers(golden_losses):
    students = [jnp.asarray(golden_losses[f"dino_first_step/in/s{i}"]) for i in range(3)]
    teachers = [jnp.asarray(golden_losses[f"dino_first_step/in/t{i}"]) for i in range(2)]

    def loss(*students):
        return run(
            clustering.dino, teachers, students, jnp.zeros(12), teacher_temp=0.07, student_temp=0.1
        )

    (value, center), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        *students
    )
    np.testing.assert_allclose(value, golden_losses["dino_first_step/value"], rtol=2e-5)
    np.testing.assert_allclose(center, 0.1 * np.mean(teachers, axis=(0, 1)), rtol=1e-5, atol=1e-7)
    for index, gradient in enumerate(gradients):
        expected = golden_losses[f"dino_first_step/grad/s{index}"]
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )


def test_dino_centers_the_teacher_and_masks_examples():
    teacher = RNG.normal(size=(1, 5, 3)).astype(np.float32)
    student = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    center = RNG.normal(size=(1, 3)).astype(np.float32)
    where = np.array([True, True, False, True, False])
    targets = softmax((teacher[0] - center) / 0.2)
    expected = entropy(targets, student[1], 0.4)[where].mean()
    value, new_center = run(
        clustering.dino,
        jnp.asarray(teacher),
        jnp.asarray(student),
        jnp.asarray(center),
        teacher_temp=0.2,
        student_temp=0.4,
        center_momentum=0.7,
        where=jnp.asarray(where),
    )
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(
        new_center, 0.7 * center + 0.3 * teacher[0][where].mean(0), rtol=2e-5
    )
    with pytest.raises(ValueError, match="differs from a teacher view"):
        run(clustering.dino, jnp.asarray(teacher), jnp.asarray(student[:1]), jnp.zeros(3))


def test_ibot_counts_masked_patches_only():
    teacher, student = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    center = RNG.normal(size=5).astype(np.float32)
    masked = np.array([[True, False, True, False], [False] * 4, [True] * 4])
    each = entropy(softmax((teacher - center) / 0.3), student, 0.5)
    expected = [each[0, [0, 2]].mean(), 0.0, each[2].mean()]
    value, new_center = run(
        clustering.ibot,
        jnp.asarray(teacher),
        jnp.asarray(student),
        jnp.asarray(masked),
        jnp.asarray(center),
        teacher_temp=0.3,
        student_temp=0.5,
    )
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(new_center, 0.9 * center + 0.1 * teacher.mean((0, 1)), rtol=2e-5)


def test_msn_by_hand():
    anchors = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    targets, prototypes = RNG.normal(size=(4, 3)), RNG.normal(size=(6, 3))

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    p = softmax(unit(anchors) @ unit(prototypes).T / 0.2)
    q = softmax(unit(targets) @ unit(prototypes).T / 0.2) ** 4
    q /= q.sum(-1, keepdims=True)
    cross_entropy = -(q * np.log(p)).sum(-1).mean()
    mean = p.mean((0, 1))
    mean_entropy = -(mean * np.log(mean)).sum()
    arguments = (
        jnp.asarray(anchors),
        jnp.asarray(targets, jnp.float32),
        jnp.asarray(prototypes, jnp.float32),
    )
    loss, diagnostics = run(
        clustering.msn, *arguments, temperature=0.2, sharpening=0.25, regularization_weight=1.5
    )
    expected = cross_entropy + 1.5 * (np.log(6) - mean_entropy)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(diagnostics, (cross_entropy, mean_entropy), rtol=2e-5)
    to_targets = jax.grad(lambda t: run(clustering.msn, arguments[0], t, arguments[2])[0])(
        arguments[1]
    )
    assert not np.any(to_targets)


def test_capi_clusters_each_position_on_its_own():
    scores = RNG.normal(size=(4, 3, 2)).astype(np.float32)
    by_position = np.stack([balance(scores[:, t], 0.5, 2) for t in range(3)], axis=1)
    together = balance(scores.reshape(12, 2), 0.5, 2).reshape(4, 3, 2)
    for positionwise, expected in ((True, by_position), (False, together)):
        loss, assignments = run(
            clustering.capi_clustering,
            jnp.asarray(scores),
            target_temp=0.5,
            pred_temp=0.7,
            iterations=2,
            positionwise=positionwise,
        )
        np.testing.assert_allclose(assignments, expected, rtol=2e-5)
        np.testing.assert_allclose(loss, entropy(expected, scores, 0.7).mean(1), rtol=2e-5)
    where = np.array([[True, False, True]] * 3 + [[False] * 3])
    prediction = RNG.normal(size=(4, 3, 2)).astype(np.float32)
    each = entropy(together, prediction, 0.12)
    result = run(
        clustering.capi_prediction,
        jnp.asarray(prediction),
        jnp.asarray(together, jnp.float32),
        where=jnp.asarray(where),
    )
    np.testing.assert_allclose(result, [*each[:3, [0, 2]].mean(1), 0.0], rtol=2e-5)
