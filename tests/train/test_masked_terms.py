import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import clustering
from repalign.numerics import cosine_similarity, l2_normalize
from repalign.train import masked_terms

KEY = jax.random.key(3)
BATCH, TOKENS, HIDDEN, DIM, CLUSTERS = 6, 5, 2, 4, 8


@pytest.fixture(scope="module")
def features():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "teacher": jax.random.normal(keys[0], (BATCH, TOKENS, DIM)),
        "student": jax.random.normal(keys[1], (BATCH, HIDDEN, 3)),
        "decoded": jax.random.normal(keys[2], (BATCH, TOKENS, 3)),
        "positions": jnp.asarray([[4, 0], [1, 2], [3, 4], [0, 1], [2, 0], [4, 3]]),
        "masked": jax.random.bernoulli(keys[3], 0.5, (BATCH, TOKENS)).at[0].set(False),
    }


def test_mimic_compares_each_token_with_the_teacher_at_its_position(features):
    term = masked_terms.mimic(student="student", teacher="teacher", positions="positions")
    params, state = term.init(KEY, features)
    found = term.apply(params, state, features, KEY)
    head = params["head"]
    assert head["kernel"].shape == (3, DIM) and found.state == {}
    mapped = features["student"] @ head["kernel"] + head["bias"]
    expected = [
        np.mean([1 - cosine_similarity(mapped[b, i], features["teacher"][b, p]) for i, p in pairs])
        for b, pairs in enumerate(map(enumerate, np.asarray(features["positions"])))
    ]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_mimic_at_masked_tokens_leaves_the_others_out(features):
    term = masked_terms.mimic(student="decoded", teacher="teacher", where="masked")
    params, state = term.init(KEY, features)

    def loss(features):
        return term.apply(params, state, features, KEY).loss

    assert loss(features)[0] == 0.0 and np.all(loss(features)[1:] > 0.0)
    gradients = jax.grad(lambda features: loss(features).sum(), allow_int=True)(features)
    assert not np.any(gradients["teacher"])
    moved = np.any(gradients["decoded"] != 0.0, axis=-1)
    np.testing.assert_array_equal(moved, features["masked"])


def capi(**options):
    return masked_terms.capi(
        teacher="teacher", student="student", positions="positions", clusters=CLUSTERS, **options
    )


def scores_of(params, features):
    clusters, head = params["clusters"], params["head"]
    teacher = l2_normalize(features["teacher"]) @ clusters["kernel"].T + clusters["bias"]
    student = l2_normalize(features["student"]) @ l2_normalize(head["kernel"]).T * head["scale"]
    return teacher, student


@pytest.mark.parametrize("positionwise", [True, False])
def test_capi_is_the_sum_of_its_losses(features, positionwise):
    term = capi(positionwise=positionwise, target_temp=0.1, pred_temp=0.2, student_temp=0.3)
    params, state = term.init(KEY, features)
    params["clusters"]["bias"] = jnp.linspace(-1.0, 1.0, CLUSTERS)
    params["head"]["scale"] = jnp.linspace(0.5, 2.0, CLUSTERS)
    teacher, student = scores_of(params, features)
    cluster_loss, assignments = clustering.capi_clustering(
        teacher, target_temp=0.1, pred_temp=0.2, positionwise=positionwise
    )
    rows = np.arange(BATCH)[:, None]
    targets = assignments[rows, features["positions"]]
    expected = cluster_loss + clustering.capi_prediction(student, targets, temperature=0.3)
    found = term.apply(params, state, features, KEY)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    shares = np.bincount(np.argmax(assignments, -1).ravel(), minlength=CLUSTERS) / (BATCH * TOKENS)
    entropy = -sum(share * np.log(share) for share in shares if share)
    np.testing.assert_allclose(found.metrics["usage_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["clustering"], np.mean(cluster_loss), rtol=1e-5)


def test_capi_trains_clusters_by_the_teacher_and_the_head_by_the_student(features):
    term = capi()
    params, state = term.init(KEY, features)

    def part(name, params, features):
        return term.apply(params, state, features, KEY).metrics[name]

    def gradients(name):
        differentiate = jax.grad(part, argnums=(1, 2), allow_int=True)
        of_params, of_features = differentiate(name, params, features)
        moved = {key: np.any(value["kernel"]) for key, value in of_params.items()}
        return moved | {key: np.any(of_features[key]) for key in ("teacher", "student")}

    none = dict.fromkeys(("clusters", "head", "teacher", "student"), False)
    assert gradients("clustering") == {**none, "clusters": True}
    assert gradients("prediction") == {**none, "head": True, "student": True}


def test_without_balancing_all_tokens_may_share_a_cluster(features):
    params, state = capi().init(KEY, features)
    params["clusters"]["bias"] = jnp.zeros(CLUSTERS).at[2].set(20.0)
    balanced = capi().apply(params, state, features, KEY)
    free = capi(balanced=False).apply(params, state, features, KEY)
    assert free.metrics["usage_entropy"] == 0.0 and balanced.metrics["usage_entropy"] > 1.0
    teacher, student = scores_of(params, features)
    targets = jax.nn.softmax(teacher / 0.06)[np.arange(BATCH)[:, None], features["positions"]]
    expected = clustering.capi_prediction(student, targets)
    np.testing.assert_allclose(free.metrics["prediction"], expected.mean(), rtol=1e-5)
