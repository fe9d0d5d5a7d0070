import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import alignment
from repalign.pretrained import from_official_repa

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(3, 4, 5)).astype(np.float32)
TEACHER = RNG.normal(size=(3, 4, 5)).astype(np.float32)
WHERE = np.array([[True, True, False, False], [True] * 4, [False] * 4])


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_repa_is_the_mean_negative_cosine_of_each_image():
    expected = -np.sum(unit(STUDENT) * unit(TEACHER), axis=-1).mean(1)
    result = run(alignment.repa, jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    # Perfect alignment is the lower end of the range, whatever the scale.
    np.testing.assert_allclose(
        run(alignment.repa, jnp.asarray(3 * TEACHER), jnp.asarray(TEACHER)), -1.0, rtol=1e-6
    )


def test_repa_reproduces_the_official_loop_over_tokens(golden_repa):
    """The loop of loss.py:81-88, one token at a time, on the recorded projector outputs."""
    projection, teacher = golden_repa["z0"], golden_repa["teacher0"]
    total = 0.0
    for z_tilde, z in zip(projection, teacher, strict=True):
        cosines = [
            -np.dot(s, t) / (np.linalg.norm(s) * np.linalg.norm(t))
            for s, t in zip(z_tilde.astype(np.float64), z.astype(np.float64), strict=True)
        ]
        total += np.mean(cosines)
    result = jnp.mean(run(alignment.repa, jnp.asarray(projection), jnp.asarray(teacher)))
    np.testing.assert_allclose(result, total / len(teacher), rtol=2e-5)


def test_repa_reproduces_the_projection_loss_of_the_official_model(golden_repa):
    """At the noised input of the recorded draw, for which the reference loss was taken."""
    prefix = "param/"
    params = {
        name.removeprefix(prefix): array
        for name, array in golden_repa.items()
        if name.startswith(prefix)
    }
    module, variables = from_official_repa(params, json.loads(str(golden_repa["config"])))
    time = golden_repa["loss_time_draw"]
    noised = (1 - time) * golden_repa["x"] + time * golden_repa["loss_noise"]

    @jax.jit
    def projection_loss(x, t, y):
        _, taps = module.apply(variables, x, t, y, data_format="NCHW")
        return jnp.mean(alignment.repa(taps["projection_0"], jnp.asarray(golden_repa["teacher0"])))

    result = projection_loss(noised, time.reshape(-1), golden_repa["y"].astype(np.int32))
    np.testing.assert_allclose(result, golden_repa["projection_loss"], rtol=2e-5)


def test_repa_averages_teachers_of_different_widths():
    other_student = RNG.normal(size=(3, 2, 7)).astype(np.float32)
    other_teacher = RNG.normal(size=(3, 2, 7)).astype(np.float32)
    both = run(
        alignment.repa,
        [jnp.asarray(STUDENT), jnp.asarray(other_student)],
        [jnp.asarray(TEACHER), jnp.asarray(other_teacher)],
    )
    first = run(alignment.repa, jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    second = run(alignment.repa, jnp.asarray(other_student), jnp.asarray(other_teacher))
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-6)


def test_repa_masks_tokens_and_examples():
    cosine = -np.sum(unit(STUDENT) * unit(TEACHER), axis=-1)
    expected = [cosine[0, :2].mean(), cosine[1].mean(), 0.0]
    student = STUDENT.copy()
    student[0, 2:] = np.nan
    arguments = jnp.asarray(student), jnp.asarray(TEACHER)
    result = run(alignment.repa, *arguments, where=jnp.asarray(WHERE))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    examples = run(
        alignment.repa,
        jnp.asarray(STUDENT),
        jnp.asarray(TEACHER),
        where=jnp.array([True, False, True]),
    )
    np.testing.assert_allclose(examples, np.array([1, 0, 1]) * cosine.mean(1), rtol=2e-5)


def test_repa_sends_no_gradient_to_the_teacher():
    gradient = jax.grad(lambda s, t: jnp.sum(run(alignment.repa, s, t)), argnums=(0, 1))(
        jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    )
    assert np.abs(gradient[0]).max() > 0.01
    assert not np.any(gradient[1])


def test_repa_names_what_does_not_fit():
    student = jnp.asarray(STUDENT)
    with pytest.raises(ValueError, match="1 student arrays for 2 teachers"):
        run(alignment.repa, student, [student, student])
    with pytest.raises(ValueError, match=r"pair 0: .*\(3, 4, 5\).*\(3, 4, 4\)"):
        run(alignment.repa, [student], [student[:, :, :4]])


def test_spatial_normalize_standardises_over_tokens_with_the_unbiased_deviation():
    for alpha in (1.0, 0.6):
        mean = TEACHER.mean(1, keepdims=True)
        expected = (TEACHER - alpha * mean) / (TEACHER.std(1, ddof=1, keepdims=True) + 1e-6)
        result = run(alignment.spatial_normalize, jnp.asarray(TEACHER), alpha=alpha)
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-6)
    single = run(alignment.spatial_normalize, jnp.asarray(TEACHER[:, :1]))
    assert not np.any(single)


def test_attention_alignment_is_the_cross_entropy_of_attention_maps():
    student = RNG.normal(size=(2, 3, 4, 4)).astype(np.float32)
    teacher = RNG.normal(size=(2, 3, 4, 4)).astype(np.float32)
    expected = -(softmax(teacher) * np.log(softmax(student))).sum(-1).mean((1, 2))
    one = run(alignment.attention_alignment, jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(one, expected, rtol=2e-5)
    entropy = -(softmax(teacher) * np.log(softmax(teacher))).sum(-1).mean((1, 2))
    two = run(
        alignment.attention_alignment,
        [jnp.asarray(student), jnp.asarray(teacher)],
        [jnp.asarray(teacher)] * 2,
    )
    np.testing.assert_allclose(two, (expected + entropy) / 2, rtol=2e-5)


def test_self_similarity_compares_gram_matrices_of_different_widths():
    teacher = RNG.normal(size=(3, 4, 9)).astype(np.float32)

    def gram(x):
        return np.einsum("btd,bsd->bts", unit(x), unit(x))

    squared = (gram(STUDENT) - gram(teacher)) ** 2
    result = run(alignment.self_similarity_alignment, jnp.asarray(STUDENT), jnp.asarray(teacher))
    np.testing.assert_allclose(result, squared.mean((1, 2)), rtol=2e-5)
    masked = run(
        alignment.self_similarity_alignment,
        jnp.asarray(STUDENT),
        jnp.asarray(teacher),
        where=jnp.asarray(WHERE),
    )
    expected = [squared[0, :2, :2].mean(), squared[1].mean(), 0.0]
    np.testing.assert_allclose(masked, expected, rtol=2e-5)
    rotation = np.linalg.qr(RNG.normal(size=(5, 5)))[0].astype(np.float32)
    invariant = run(
        alignment.self_similarity_alignment, jnp.asarray(STUDENT @ rotation), jnp.asarray(STUDENT)
    )
    np.testing.assert_allclose(invariant, 0.0, atol=1e-10)


def test_foundation_model_alignment_leaves_room_inside_the_margins():
    def gram(x):
        return np.einsum("btd,bsd->bts", unit(x), unit(x))

    cosine = np.maximum(0.9 - (unit(STUDENT) * unit(TEACHER)).sum(-1), 0).mean(1)
    distance = np.maximum(np.abs(gram(STUDENT) - gram(TEACHER)) - 0.2, 0).mean((1, 2))
    result = run(
        alignment.foundation_model_alignment,
        jnp.asarray(STUDENT),
        jnp.asarray(TEACHER),
        cosine_margin=0.1,
        distance_margin=0.2,
        cosine_weight=0.5,
        distance_weight=2.0,
    )
    np.testing.assert_allclose(result, 0.5 * cosine + 2.0 * distance, rtol=2e-5)
    near = run(
        alignment.foundation_model_alignment, jnp.asarray(TEACHER + 0.01), jnp.asarray(TEACHER)
    )
    assert not np.any(near)


def test_modality_gap_is_the_distance_of_the_centroids():
    a, b = STUDENT[:, 0], TEACHER[:, 0]
    where = np.array([True, False, True])
    expected = np.sum((unit(a)[where].mean(0) - unit(b)[where].mean(0)) ** 2)
    result = run(alignment.modality_gap, jnp.asarray(a), jnp.asarray(b), where=jnp.asarray(where))
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_matryoshka_sums_the_loss_of_nested_prefixes():
    a, b = STUDENT[:, 0], TEACHER[:, 0]

    def squared(x, y):
        return jnp.sum((x - y) ** 2, axis=1)

    result = alignment.matryoshka(
        squared, jnp.asarray(a), jnp.asarray(b), prefixes=(2, 5), relative_importance=(1.0, 0.25)
    )
    expected = ((a - b)[:, :2] ** 2).sum(1) + 0.25 * ((a - b) ** 2).sum(1)
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    with pytest.raises(ValueError, match="between 1 and the width 5"):
        alignment.matryoshka(squared, jnp.asarray(a), jnp.asarray(b), prefixes=(2, 6))
    with pytest.raises(ValueError, match="1 relative importances for 2 prefixes"):
        alignment.matryoshka(
            squared, jnp.asarray(a), jnp.asarray(b), prefixes=(2, 5), relative_importance=(1.0,)
        )


def test_matryoshka_cross_entropy_against_the_official_code(golden_losses):
    logits = jnp.asarray(golden_losses["matryoshka_ce/in/logits"])
    labels = jnp.asarray(golden_losses["matryoshka_ce/in/labels"].astype(np.int32))
    value, gradient = jax.value_and_grad(
        lambda x: jnp.mean(
            run(alignment.matryoshka_cross_entropy, x, labels, relative_importance=None)
        )
    )(logits)
    np.testing.assert_allclose(value, golden_losses["matryoshka_ce/value"], rtol=2e-5)
    expected = golden_losses["matryoshka_ce/grad/logits"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_matryoshka_cross_entropy_weights_the_prefixes():
    logits = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    labels = np.array([0, 3, 1], np.int32)
    each = -np.log(softmax(logits))[:, np.arange(3), labels]
    result = run(
        alignment.matryoshka_cross_entropy,
        jnp.asarray(logits),
        jnp.asarray(labels),
        relative_importance=[2.0, 0.5],
    )
    np.testing.assert_allclose(result, 2.0 * each[0] + 0.5 * each[1], rtol=2e-5)
    with pytest.raises(ValueError, match="3 relative importances for 2 prefixes"):
        run(
            alignment.matryoshka_cross_entropy,
            jnp.asarray(logits),
            jnp.asarray(labels),
            relative_importance=[1.0] * 3,
        )
