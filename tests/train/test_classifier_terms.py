import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repalign.registry import UserError
from repalign.train.classifier_terms import matryoshka

GENERATOR = np.random.default_rng(0)
FEATURES = {
    "encoder/embedding": jnp.asarray(GENERATOR.normal(size=(6, 8)), jnp.float32),
    "label": jnp.asarray([0, 1, 2, 0, 1, 2]),
}
READ = {"embedding": "encoder/embedding", "labels": "label", "classes": 3}
KEY = jax.random.key(0)


def random_like(params):
    return jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.fold_in(KEY, leaf.size), leaf.shape), params
    )


@pytest.mark.parametrize("tied", [False, True])
def test_each_prefix_has_a_classifier_of_its_own_or_a_part_of_the_largest(tied):
    term = matryoshka(prefixes=(2, 8), tied=tied, relative_importance=(0.5, 2.0), **READ)
    params, state = term.init(KEY, FEATURES)
    assert state == {} and not any(np.any(leaf) for leaf in jax.tree.leaves(params))
    assert set(params) == ({"classifier_8"} if tied else {"classifier_2", "classifier_8"})
    params = random_like(params)
    output = jax.jit(term.apply)(params, state, FEATURES, KEY)

    codes, labels = FEATURES["encoder/embedding"], FEATURES["label"]
    expected, accuracies = 0.0, {}
    for prefix, weight in ((2, 0.5), (8, 2.0)):
        linear = params["classifier_8" if tied else f"classifier_{prefix}"]["linear"]
        logits = codes[:, :prefix] @ linear["kernel"][:prefix] + linear["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        expected = expected + weight * losses
        accuracies[f"accuracy_{prefix}"] = np.mean(logits.argmax(1) == labels)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
    assert {name: pytest.approx(float(v)) for name, v in output.metrics.items()} == accuracies


def test_a_prefix_learns_nothing_from_the_dimensions_behind_it():
    term = matryoshka(prefixes=(2,), **READ)
    params = random_like(term.init(KEY, FEATURES)[0])

    def loss(codes):
        features = {**FEATURES, "encoder/embedding": codes}
        return jnp.sum(term.apply(params, {}, features, KEY).loss)

    gradient = jax.grad(loss)(FEATURES["encoder/embedding"])
    assert np.any(gradient[:, :2]) and not np.any(gradient[:, 2:])


@pytest.mark.parametrize("prefixes", [(), (0, 4), (4, 9)])
def test_prefixes_lie_in_the_embedding(prefixes):
    with pytest.raises(UserError, match=r"prefixes must lie in 1 ... 8, the width"):
        matryoshka(prefixes=prefixes, **READ).init(KEY, FEATURES)
