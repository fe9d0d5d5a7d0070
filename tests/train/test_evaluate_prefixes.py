import jax
import numpy as np
import pytest
import tiny_experiment
from sklearn.neighbors import KNeighborsClassifier

from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import encoders
from repalign.train.evaluate import EvaluationContext, build_evaluators
from repalign.train.experiment import assemble
from repalign.train.loop import batch_spec, initializer, zeros

SECTION = {
    "name": "train.evaluate_prefixes.nearest_neighbor_by_prefix",
    "reference": {"name": "tiny_experiment:images", "examples": 48},
    "classes": 4,
    "prefixes": (1, 3, 8),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny classifier with random parameters, and its embeddings of both sources' images."""
    cache = tmp_path_factory.mktemp("cache")
    experiment = assemble(configs.load_config(f"{tiny_experiment.__file__}:fast"))
    source = experiment.source(cache)
    spec = batch_spec(experiment, source.columns)
    state = jax.jit(initializer(experiment, 4))(jax.random.key(0), zeros(spec))
    encoder = encoders.model_encoder(experiment.forward, state.params["model"], state.forward)
    held_out = tiny_experiment.images(examples=48).gather(np.arange(48))
    parts = [source.gather(np.arange(len(source))), held_out]
    embeddings = [(encoders.encode(encoder, part["image"]), part["label"]) for part in parts]
    return EvaluationContext(experiment, source, cache), state, embeddings


def nearest_accuracy(train, train_labels, test, test_labels):
    search = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    return np.mean(search.fit(train, train_labels).predict(test) == test_labels)


@pytest.mark.parametrize("basis", ["coordinates", "singular_vectors"])
def test_accuracies_of_prefixes_are_scikit_learns(trained, basis):
    context, state, ((train, train_labels), (test, test_labels)) = trained
    # The held-out images are among the training images: every neighbour would be the image itself.
    train, train_labels = train[:16], train_labels[:16]
    context = context._replace(source=tiny_experiment.images(examples=64).select(slice(0, 16)))
    evaluate = build_evaluators({"prefixes": {**SECTION, "basis": basis}}, context)["prefixes"]
    metrics, arrays = evaluate(state, jax.random.key(0))
    axes = np.eye(8) if basis == "coordinates" else np.linalg.svd(train, full_matrices=False)[2].T
    expected = {
        f"accuracy_{m}": nearest_accuracy(
            (train @ axes)[:, :m], train_labels, (test @ axes)[:, :m], test_labels
        )
        for m in (3, 8)
    }
    assert arrays == {} and set(metrics) == {"accuracy_1", "accuracy_3", "accuracy_8"}
    assert min(expected.values()) > 0.3
    for name, value in expected.items():  # Of one dimension, cosines are all 1 or -1: all ties.
        assert metrics[name] == pytest.approx(value, abs=0.021)


def test_an_unknown_basis_is_a_mistake(trained):
    context, _, _ = trained
    with pytest.raises(UserError, match="Did you mean 'coordinates'"):
        build_evaluators({"prefixes": {**SECTION, "basis": "coordinate"}}, context)


def test_a_prefix_wider_than_the_embedding_is_a_mistake(trained):
    context, state, _ = trained
    section = {**SECTION, "prefixes": (4, 9)}
    evaluate = build_evaluators({"prefixes": section}, context)["prefixes"]
    with pytest.raises(UserError, match=r"prefixes must lie in 1 ... 8"):
        evaluate(state, jax.random.key(0))
