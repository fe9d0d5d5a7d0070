import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import clustering, contrastive, hard_negatives, joint_embedding
from repalign.numerics import l2_normalize
from repalign.registry import UserError
from repalign.train import stateful_terms
from repalign.train.objective import Objective
from repalign.train.terms import from_config, loss

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def features():
    names = [f"view_{view}/{kind}" for view in (0, 1, 2) for kind in ("embedding", "target")]
    draws = jax.random.normal(jax.random.key(0), (len(names), 4, 3))
    tokens = jax.random.normal(jax.random.key(1), (2, 4, 5, 3))
    masked = jnp.arange(20).reshape(4, 5) % 3 == 0
    return {
        **dict(zip(names, draws, strict=True)),
        "student/tokens": tokens[0],
        "teacher/tokens": tokens[1],
        "masked": masked,
    }


def steps(term, features, number=2):
    """Returns the term's parameters, and its state before each step and after the last."""
    params, state = term.init(KEY, features)
    states, outputs = [state], []
    for _ in range(number):
        outputs.append(term.apply(params, states[-1], features, KEY))
        states.append(outputs[-1].state)
    return params, states, outputs


def test_tico_carries_its_covariance(features):
    term = stateful_terms.tico(a="view_0/embedding", b="view_1/target", rho=4.0)
    _, states, outputs = steps(term, features)
    a, b = features["view_0/embedding"], features["view_1/target"]
    covariance = jnp.zeros((3, 3))
    for output, state in zip(outputs, states[1:], strict=True):
        expected, covariance = joint_embedding.tico(a, b, covariance, rho=4.0)
        np.testing.assert_allclose(output.loss, expected, rtol=1e-6)
        np.testing.assert_allclose(state["covariance"], covariance, rtol=1e-6)
    assert outputs[0].loss != outputs[1].loss


def test_dino_and_ibot_carry_their_centres(features):
    views = [f"view_{view}/embedding" for view in (0, 1, 2)]
    teachers = [f"view_{view}/target" for view in (0, 1)]
    _, states, outputs = steps(stateful_terms.dino(teacher=teachers, student=views), features)
    expected, center = clustering.dino(
        [features[name] for name in teachers], [features[name] for name in views], jnp.zeros(3)
    )
    np.testing.assert_allclose(outputs[0].loss, expected, rtol=1e-6)
    np.testing.assert_allclose(states[1]["center"], center, rtol=1e-6)
    term = stateful_terms.ibot(teacher="teacher/tokens", student="student/tokens", masked="masked")
    _, states, outputs = steps(term, features)
    expected, center = clustering.ibot(
        features["teacher/tokens"],
        features["student/tokens"],
        features["masked"],
        center=center * 0,
    )
    np.testing.assert_allclose(outputs[0].loss, expected, rtol=1e-6)
    np.testing.assert_allclose(states[1]["center"], center, rtol=1e-6)
    assert not np.allclose(states[2]["center"], center)


def test_mochi_reads_the_queue_of_the_step_before_and_drops_the_oldest(features):
    term = stateful_terms.mochi(
        queries=["view_0/embedding", "view_1/embedding"],
        keys=["view_1/target", "view_0/target"],
        temperature=0.2,
        queue_size=16,
        hardest=4,
        mixed=0,
        query_mixed=0,
    )
    _, states, outputs = steps(term, features, 3)
    np.testing.assert_allclose(jnp.linalg.norm(states[0]["queue"], axis=1), 1.0, rtol=1e-5)
    keys = l2_normalize(jnp.concatenate([features["view_1/target"], features["view_0/target"]]))
    np.testing.assert_allclose(states[1]["queue"][:8], keys, rtol=1e-6)
    np.testing.assert_array_equal(states[1]["queue"][8:], states[0]["queue"][8:])
    np.testing.assert_allclose(states[2]["queue"], jnp.tile(keys, (2, 1)), rtol=1e-6)
    assert [int(state["oldest"]) for state in states] == [0, 8, 0, 8]
    # Without mixtures it is MoCo: the positive against the queue, not against the other keys.
    queries = l2_normalize(features["view_0/embedding"])
    positive = jnp.sum(queries * keys[:4], axis=1, keepdims=True)
    logits = jnp.concatenate([positive, queries @ states[0]["queue"].T], axis=1) / 0.2
    there = -jax.nn.log_softmax(logits)[:, 0]
    back = hard_negatives.mochi(
        features["view_1/embedding"],
        features["view_0/target"],
        states[0]["queue"],
        key=KEY,
        temperature=0.2,
        hardest=4,
        mixed=0,
        query_mixed=0,
    )
    np.testing.assert_allclose(outputs[0].loss, (there + back.loss) / 2, rtol=1e-5)
    shares = [np.mean(np.argmax(logits, axis=1) == 0), np.mean(back.accuracy)]
    assert outputs[0].metrics["accuracy"] == pytest.approx(np.mean(shares))
    assert outputs[0].metrics["queue_accuracy"] == outputs[0].metrics["accuracy"]


def test_no_gradient_reaches_the_keys_of_momentum_contrast(features):
    term = stateful_terms.mochi(
        queries="q", keys="k", temperature=0.2, queue_size=8, hardest=4, mixed=4, query_mixed=2
    )
    named = {"q": features["view_0/embedding"], "k": features["view_1/target"]}
    _, state = term.init(KEY, named)
    gradients = jax.grad(lambda named: term.apply({}, state, named, KEY).loss.sum())(named)
    assert np.any(gradients["q"]) and not np.any(gradients["k"])


def test_a_queue_that_the_batch_does_not_divide_is_refused(features):
    term = stateful_terms.mochi(
        queries=["view_0/embedding"], keys=["view_1/target"], temperature=0.2, queue_size=10
    )
    with pytest.raises(UserError, match=r"mochi\.queue_size 10 is not a multiple of the 4 keys"):
        term.init(KEY, features)
    with pytest.raises(UserError, match="1 queries for 2 keys"):
        stateful_terms.mochi(queries="a", keys=["b", "c"], temperature=0.2)


def test_swapped_assignment_uses_its_queue_once_it_is_full(features):
    high = ["view_0/embedding", "view_1/embedding"]
    term = stateful_terms.swapped_assignment(
        high=high, low=["view_2/embedding"], prototypes=6, queue_size=8
    )
    params, states, outputs = steps(term, features)

    def scores(embeddings):
        return l2_normalize(embeddings) @ l2_normalize(params["prototypes"]).T

    views = [scores(features[name]) for name in high]
    low = [scores(features["view_2/embedding"])]
    without = clustering.swapped_assignment(views, low)
    np.testing.assert_allclose([output.loss for output in outputs[:2]], without, rtol=1e-5)
    assert [int(state["oldest"]) for state in states[:3]] == [0, 4, 0]
    # Other embeddings meet the full queue, which holds those of the two steps before.
    others = {name: jnp.roll(feature, 1, axis=-1) ** 3 for name, feature in features.items()}
    queue = [jnp.tile(view, (2, 1)) for view in views]
    views, low = [scores(others[name]) for name in high], [scores(others["view_2/embedding"])]
    full = clustering.swapped_assignment(views, low, queue=queue)
    assert abs(full - clustering.swapped_assignment(views, low)) > 1e-3
    np.testing.assert_allclose(term.apply(params, states[2], others, KEY).loss, full, rtol=1e-5)
    plain = stateful_terms.swapped_assignment(high=high, low=["view_2/embedding"], prototypes=6)
    params, _, outputs = steps(plain, features, 1)
    gradient = jax.grad(lambda params: plain.apply(params, {}, features, KEY).loss)(params)
    assert np.any(gradient["prototypes"])
    np.testing.assert_allclose(outputs[0].loss, without, rtol=1e-5)


def test_swapped_assignment_without_balancing_follows_the_softmax_of_the_scores(features):
    high = ["view_0/embedding", "view_1/embedding"]
    arguments = {"high": high, "prototypes": 6, "temperature": 0.2, "sinkhorn_epsilon": 0.1}
    term = stateful_terms.swapped_assignment(**arguments, balanced=False)
    params, _, outputs = steps(term, features, 1)
    scores = [l2_normalize(features[name]) @ l2_normalize(params["prototypes"]).T for name in high]
    expected = 0.0
    for one, other in (scores, scores[::-1]):
        predicted = jax.nn.log_softmax(other / 0.2)
        expected -= jnp.mean(jnp.sum(jax.nn.softmax(one / 0.1) * predicted, axis=1)) / 2
    np.testing.assert_allclose(outputs[0].loss, expected, rtol=1e-5)
    balanced = stateful_terms.swapped_assignment(**arguments)
    assert abs(balanced.apply(params, {}, features, KEY).loss - expected) > 1e-3
    shares = np.bincount(np.concatenate(scores).argmax(axis=1), minlength=6) / 8
    entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0])) / np.log(6)
    for one in (term, balanced):
        found = one.apply(params, {}, features, KEY).metrics["code_entropy"]
        np.testing.assert_allclose(found, entropy, rtol=1e-5)
    same = dict.fromkeys(high, jnp.ones((4, 3)))
    assert term.apply(params, {}, same, KEY).metrics["code_entropy"] == pytest.approx(0.0)
    with pytest.raises(UserError, match="the queue is for balancing"):
        stateful_terms.swapped_assignment(high=high, prototypes=6, queue_size=8, balanced=False)


def test_msn_learns_prototypes_and_reports_its_entropies(features):
    anchors = ["view_0/embedding", "view_1/embedding"]
    term = stateful_terms.msn(anchors=anchors, target="view_2/target", prototypes=5)
    params, _, outputs = steps(term, features, 1)
    expected, diagnostics = clustering.msn(
        jnp.stack([features[name] for name in anchors]),
        features["view_2/target"],
        params["prototypes"],
    )
    np.testing.assert_allclose(outputs[0].loss, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs[0].metrics["mean_entropy"], diagnostics.mean_entropy)


def test_clip_learns_its_scale_up_to_the_largest(features):
    named = {"a": features["view_0/embedding"], "b": features["view_1/embedding"]}
    term = stateful_terms.clip(a="a", b="b")
    params, _ = term.init(KEY, named)
    expected = contrastive.clip(named["a"], named["b"], logit_scale=jnp.log(1 / 0.07))
    np.testing.assert_allclose(term.apply(params, {}, named, KEY).loss, expected, rtol=1e-5)

    def gradient(value):
        params = {"logit_scale": jnp.asarray(value, jnp.float32)}
        return jax.grad(lambda p: term.apply(p, {}, named, KEY).loss.sum())(params)["logit_scale"]

    assert gradient(2.0) != 0.0
    assert gradient(5.0) == 0.0  # log(100) is 4.6


def test_siglip_learns_scale_and_bias(features):
    named = {"a": features["view_0/embedding"], "b": features["view_1/embedding"]}
    term = stateful_terms.siglip(a="a", b="b")
    params, _ = term.init(KEY, named)
    expected = contrastive.siglip(named["a"], named["b"], scale=10.0, bias=-10.0)
    np.testing.assert_allclose(term.apply(params, {}, named, KEY).loss, expected, rtol=1e-5)
    gradient = jax.grad(lambda params: term.apply(params, {}, named, KEY).loss.sum())(params)
    assert gradient["bias"] != 0.0 and gradient["log_scale"] != 0.0


def test_a_config_names_stateful_terms_by_their_path(features):
    (term,) = from_config(
        {
            "covariance": {
                "term": "train.stateful_terms.tico",
                "a": "view_0/embedding",
                "b": "view_1/target",
                "weight": 2.0,
            }
        }
    )
    params, state = Objective((term,)).init(KEY, features)
    assert state["covariance"]["covariance"].shape == (3, 3)
    total, output = Objective((term,)).apply(params, state, features, KEY, step=0)
    np.testing.assert_allclose(total, 2.0 * output.metrics["covariance"], rtol=1e-6)


def test_a_plain_term_refuses_a_loss_with_state_and_passes_the_key(features):
    term = loss(
        "losses.joint_embedding.tico", a="view_0/embedding", b="view_1/target", covariance="c"
    )
    with pytest.raises(UserError, match=r"objective\.tico: .* train\.stateful_terms"):
        term.apply({}, {}, {**features, "c": jnp.zeros((3, 3))}, KEY)
    term = loss("losses.regularizers.sigreg", x="view_0/embedding", num_slices=8)
    expected = joint_embedding.sigreg(features["view_0/embedding"], KEY, num_slices=8)
    np.testing.assert_allclose(term.apply({}, {}, features, KEY).loss, expected, rtol=1e-6)
    assert term.apply({}, {}, features, jax.random.key(9)).loss != expected
