import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from ml_collections import ConfigDict

from repalign.data.sources import ReplicaSources
from repalign.latent_maps.procrustes import orthogonal_procrustes
from repalign.latent_maps.relative import relative_representation
from repalign.metrics import retrieval
from repalign.numerics import l2_normalize
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import encoders, latent_spaces
from repalign.train.evaluate import EvaluationContext
from repalign.train.experiment import assemble
from repalign.train.loop import batch_spec, initializer, zeros
from repalign.train.run import run

FILE = f"{tiny_experiment.__file__}"
FIRST = {"encoder": "random", "config": f"{FILE}:fast"}
SECOND = {**FIRST, "seed_offset": 50}
REFERENCE = {"name": "tiny_experiment:images", "examples": 40}
COLUMN = "latent/representation"


def stitched(*, space="relative", anchors=12, seed=0, replicas=1, **arguments):
    """A classifier of random latent vectors, and its stitching to another random encoder."""
    column = {"name": "train.latent_spaces.representation", **FIRST, "space": space}
    return assemble(
        ConfigDict(
            {
                "data": {
                    "source": {"name": "tiny_experiment:images"},
                    "batch_size": 16,
                    "columns": {COLUMN: {**column, "anchors": anchors}},
                },
                "model": {"name": "models.decoders.LatentClassifier", "classes": 4, "hidden": 8},
                "forward": {
                    "name": "train.forward_latent.latent_classifier",
                    "representation": COLUMN,
                },
                "objective": {
                    "cross_entropy": {
                        "term": "optax:softmax_cross_entropy_with_integer_labels",
                        "logits": "classifier/logits",
                        "labels": "label",
                    }
                },
                "optimizer": {"learning_rate": 0.01},
                "evaluation": {
                    "final_metrics": {
                        "stitching": {
                            "name": "train.latent_spaces.stitching",
                            "column": COLUMN,
                            "other": SECOND,
                            "reference": REFERENCE,
                            "classes": 4,
                            "topk": 3,
                            **arguments,
                        }
                    }
                },
                "seed": seed,
                "replicas": replicas,
                "total_steps": 2,
            }
        )
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def initial_state(experiment, source):
    spec = batch_spec(experiment, source.columns)
    return jax.jit(initializer(experiment, 2))(jax.random.key(0), zeros(spec))


def embeddings(images, cache, section, seed):
    section = dict(section)
    seed += section.pop("seed_offset", 0)
    return jnp.asarray(encoders.embeddings(images, cache, seed=seed, **section))


def test_each_replica_has_the_column_of_its_own_seed(cache):
    source = stitched(seed=3, replicas=2).source(cache)
    assert isinstance(source, ReplicaSources)
    images = source.shared.arrays["image"]
    for replica, seed in zip(source.replicas, (3, 4), strict=True):
        values = embeddings(images, cache, FIRST, seed)
        anchors = values[latent_spaces.anchor_indices(64, 12, seed)]
        expected = relative_representation(values, anchors)
        np.testing.assert_allclose(replica.arrays[COLUMN], expected, rtol=1e-5, atol=1e-6)
        alone = stitched(seed=seed).source(cache)
        np.testing.assert_array_equal(alone.arrays[COLUMN], replica.arrays[COLUMN])
    assert not np.allclose(*(replica.arrays[COLUMN] for replica in source.replicas))


def test_stitching_gives_the_other_encoders_codes_to_the_classifier(cache):
    experiment = stitched(seed=5)
    source = experiment.source(cache)
    context = EvaluationContext(experiment, source, cache)
    state = initial_state(experiment, source)
    section = dict(experiment.config.evaluation.final_metrics["stitching"])
    section.pop("name")
    held_out = tiny_experiment.images(examples=40)
    test, train = held_out.arrays["image"], source.arrays["image"]
    chosen = latent_spaces.anchor_indices(64, 12, 5)
    codes, absolute = {}, {}
    for name, encoder in {"own": FIRST, "other": SECOND}.items():
        absolute[name] = [embeddings(part, cache, encoder, 5) for part in (train, test)]
        codes[name] = relative_representation(absolute[name][1], absolute[name][0][chosen])

    def accuracy(values):
        logits = experiment.model.apply({"params": state.params["model"]}, values)
        return np.mean(np.argmax(logits, axis=1) == held_out.arrays["label"])

    metrics, _ = latent_spaces.stitching(context, **section)(state, jax.random.key(5))
    assert metrics["unstitched_accuracy"] == pytest.approx(accuracy(codes["own"]))
    assert metrics["stitched_accuracy"] == pytest.approx(accuracy(codes["other"]))
    pair = l2_normalize(codes["own"]), l2_normalize(codes["other"])
    expected = retrieval.neighbor_jaccard(*pair, k=3).mean()
    assert metrics["neighbor_jaccard"] == pytest.approx(float(expected), abs=1e-3)

    shuffled, _ = latent_spaces.stitching(context, **section, shuffled=True)(
        state, jax.random.key(5)
    )
    assert shuffled["unstitched_accuracy"] == metrics["unstitched_accuracy"]
    assert shuffled["neighbor_jaccard"] < metrics["neighbor_jaccard"]


def test_an_absolute_space_is_reached_by_the_map_that_the_config_names(cache):
    experiment = stitched(seed=5, space="absolute", anchors=0)
    source = experiment.source(cache)
    context = EvaluationContext(experiment, source, cache)
    state = initial_state(experiment, source)
    arguments = {"column": COLUMN, "other": SECOND, "reference": REFERENCE, "classes": 4, "topk": 3}
    found = {}
    for alignment in ("none", "procrustes", "affine"):
        evaluate = latent_spaces.stitching(context, **arguments, alignment=alignment, pairs=30)
        found[alignment] = evaluate(state, jax.random.key(5))[0]
    test = tiny_experiment.images(examples=40).arrays["image"]
    chosen = latent_spaces.anchor_indices(64, 30, 5)
    own, other = (
        [embeddings(part, cache, encoder, 5) for part in (source.arrays["image"], test)]
        for encoder in (FIRST, SECOND)
    )
    mapped = orthogonal_procrustes(other[0][chosen], own[0][chosen], scale=True)(other[1])
    for name, codes in {"procrustes": mapped, "none": other[1]}.items():
        ranks = retrieval.match_ranks(l2_normalize(own[1]), l2_normalize(codes))
        expected = retrieval.mean_reciprocal_rank(ranks)
        assert found[name]["mean_reciprocal_rank"] == pytest.approx(float(expected), rel=1e-3)
    assert found["affine"]["mean_reciprocal_rank"] > found["none"]["mean_reciprocal_rank"]
    wide = {"encoder": "random", "config": "relative_representations:digits_encoder_a"}
    wide = {**arguments, "other": wide}
    with pytest.raises(UserError, match="8 and 64 dimensions"):
        latent_spaces.stitching(context, **wide)(state, jax.random.key(5))


def test_class_means_are_the_prototypes_of_unit_embeddings(cache):
    source = tiny_experiment.images()
    values = np.asarray(l2_normalize(embeddings(source.arrays["image"], cache, FIRST, 2)))
    found = latent_spaces.class_means(source, cache, 2, **FIRST, classes=5)
    assert found.shape == (64, 5, 8) and found.dtype == np.float32
    for label in range(4):
        expected = values[source.arrays["label"] == label].mean(axis=0)
        np.testing.assert_allclose(found[7, label], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 4], 0)


def test_a_model_is_compatible_with_itself(cache):
    """A new encoder equal to the old one: the three searches are one."""
    experiment = assemble(configs.load_config(f"{FILE}:fast"))
    source = experiment.source(cache)
    context = EvaluationContext(experiment, source, cache)
    images = tiny_experiment.images(examples=40)
    old = {**FIRST, "seed_offset": 9}
    state = initial_state(experiment, source)
    same = encoders.random_encoder(f"{FILE}:fast", images.arrays["image"], seed=9)
    state.params["model"] = same.params[0]
    evaluate = latent_spaces.compatibility(context, old=old, reference=REFERENCE)
    metrics, _ = evaluate(state, jax.random.key(0))
    assert metrics["old_self_test"] == pytest.approx(metrics["new_self_test"])
    assert metrics["compatibility_gain"] == pytest.approx(0.0)

    unit = np.asarray(l2_normalize(embeddings(images.arrays["image"], cache, FIRST, 9)))
    labels = images.arrays["label"]
    expected, hits = [], 0
    for index in range(40):
        others = np.delete(np.arange(40), index)
        order = others[np.argsort(-unit[others] @ unit[index], kind="stable")]
        right = labels[order] == labels[index]
        expected.append(np.mean((np.cumsum(right) / np.arange(1, 40))[right]))
        hits += right[0]
    assert metrics["old_self_test"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert metrics["old_self_test_top_1"] == pytest.approx(hits / 40)

    state.params["model"] = initial_state(experiment, source).params["model"]
    other, _ = evaluate(state, jax.random.key(0))
    assert other["old_self_test"] == metrics["old_self_test"]
    assert other["cross_test"] != pytest.approx(metrics["cross_test"])


def test_a_stitched_run_of_two_replicas_has_two_of_everything(cache, tmp_path):
    recorded = {}

    def record(step, seed, metrics, arrays):
        recorded[seed] = metrics

    run(stitched(replicas=2), tmp_path, cache=cache, on_evaluation=record)
    assert set(recorded) == {0, 1}
    assert recorded[0]["mean_reciprocal_rank"] != recorded[1]["mean_reciprocal_rank"]


def test_more_anchors_than_images_are_a_mistake():
    with pytest.raises(UserError, match="there are 5 examples, fewer than the 6 anchors"):
        latent_spaces.anchor_indices(5, 6, 0)
