import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import distillation
from repalign.registry import UserError

RNG = np.random.default_rng(6)
STUDENT = (2 * RNG.normal(size=(3, 4, 5))).astype(np.float32)
TEACHER = (2 * RNG.normal(size=(3, 4, 5))).astype(np.float32)


def run(loss, *arrays, **options):
    """Compiles the call as one: much faster than operation by operation."""
    return jax.jit(functools.partial(loss, **options))(*arrays)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def smooth_l1(difference, beta=1.0):
    magnitude = np.abs(difference)
    return np.where(magnitude < beta, difference**2 / (2 * beta), magnitude - beta / 2)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    "options, target, distance",
    [
        ({"beta": 2.0}, layer_norm, lambda d: smooth_l1(d, 2.0).mean(-1)),
        (
            {"beta": 0.05, "target": "none"},
            lambda y: y,
            lambda d: smooth_l1(d, 0.05).mean(-1),
        ),
        ({"distance": "l2", "target": "l2"}, unit, lambda d: (d**2).mean(-1)),
        ({"distance": "l1", "target": "none"}, lambda y: y, lambda d: np.abs(d).mean(-1)),
    ],
    ids=["fd", "sra", "mr_mae", "l1"],
)
def test_feature_distances(options, target, distance):
    each = distance(STUDENT - target(TEACHER))
    arguments = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    result = run(distillation.feature_distillation, *arguments, **options)
    np.testing.assert_allclose(result, each.mean(1), rtol=2e-5)
    where = np.array([[True, True, False, False], [False] * 4, [True] * 4])
    masked = run(distillation.feature_distillation, *arguments, where=jnp.asarray(where), **options)
    np.testing.assert_allclose(masked, [each[0, :2].mean(), 0.0, each[2].mean()], rtol=2e-5)


def test_cosine_distance_of_vectors_and_unknown_names():
    student, teacher = jnp.asarray(STUDENT[:, 0]), jnp.asarray(TEACHER[:, 0])
    result = run(
        distillation.feature_distillation, student, teacher, distance="cosine", target="none"
    )
    expected = 1 - np.sum(unit(STUDENT[:, 0]) * unit(TEACHER[:, 0]), -1)
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    with pytest.raises(UserError, match="unknown distance 'smoothl1'. Did you mean 'smooth_l1'"):
        distillation.feature_distillation(student, teacher, distance="smoothl1")
    with pytest.raises(UserError, match="unknown target 'layernorm'. Did you mean 'layer_norm'"):
        distillation.feature_distillation(student, teacher, target="layernorm")


def test_teachers_receive_no_gradient():
    for loss in (
        distillation.feature_distillation,
        distillation.attention_transfer,
        distillation.gram_style,
    ):
        gradients = jax.jit(jax.grad(lambda s, t, loss=loss: jnp.sum(loss(s, t)), argnums=(0, 1)))(
            jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        )
        assert np.any(gradients[0]) and not np.any(gradients[1])


def test_knowledge_distillation_by_hand():
    student, teacher = STUDENT[:, 0], TEACHER[:, 0]
    p, q = softmax(teacher / 3), softmax(student / 3)
    expected = 9 * np.sum(p * np.log(p / q), -1)
    result = run(
        distillation.knowledge_distillation,
        jnp.asarray(student),
        jnp.asarray(teacher),
        temperature=3.0,
    )
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_relational_distance_by_hand_across_widths():
    student, teacher = STUDENT.reshape(6, 10), TEACHER.reshape(6, 10)[:, :7]

    def normalised(x):
        distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
        return distances / distances[distances > 0].mean()

    each = smooth_l1(normalised(student) - normalised(teacher)).mean(1)
    result = run(distillation.relational_distance, jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(result, each, rtol=1e-4)


def test_relational_angle_by_hand_across_widths():
    student, teacher = STUDENT.reshape(6, 10), TEACHER.reshape(6, 10)[:, :7]

    def cosines(x):
        edges = x[None] - x[:, None]
        norms = np.linalg.norm(edges, axis=-1, keepdims=True)
        edges = np.divide(edges, norms, out=np.zeros_like(edges), where=norms > 0)
        return np.einsum("ijd,ikd->ijk", edges, edges)

    each = smooth_l1(cosines(student) - cosines(teacher)).mean((1, 2))
    result = run(distillation.relational_angle, jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(result, each, rtol=1e-4)


def test_attention_transfer_and_gram_style_by_hand():
    def maps(x):
        return unit((x**2).mean(-1))

    expected = ((maps(STUDENT) - maps(TEACHER)) ** 2).mean(-1)
    arguments = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    np.testing.assert_allclose(
        run(distillation.attention_transfer, *arguments), expected, rtol=2e-5
    )

    def gram(x):
        return np.einsum("btd,bte->bde", x, x) / 20

    expected = ((gram(STUDENT) - gram(TEACHER)) ** 2).sum((1, 2))
    np.testing.assert_allclose(run(distillation.gram_style, *arguments), expected, rtol=2e-5)


def test_token_relations_by_hand():
    s_q, s_k = RNG.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    t_q, t_k = RNG.normal(size=(2, 2, 3, 4, 6)).astype(np.float32)

    def relations(q, k):
        return softmax(np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1]))

    p, q = relations(t_q, t_k), relations(s_q, s_k)
    expected = (p * np.log(p / q)).sum(-1).mean((1, 2))
    result = run(distillation.token_relation_distillation, *map(jnp.asarray, (s_q, s_k, t_q, t_k)))
    np.testing.assert_allclose(result, expected, rtol=2e-5)
