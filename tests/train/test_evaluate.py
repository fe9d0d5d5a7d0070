import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

from repalign.data.pixels import from_signed_range, to_signed_range
from repalign.generation import flow, samplers
from repalign.metrics import frechet, probes, similarity
from repalign.numerics import l2_normalize
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import encoders
from repalign.train.evaluate import EvaluationContext, build_evaluators
from repalign.train.experiment import assemble
from repalign.train.loop import batch_spec, initializer, zeros

FILE = tiny_experiment.__file__
REFERENCE = {"name": "tiny_experiment:images", "examples": 48}
KEY = jax.random.key(5)


def context_and_state(variant, cache):
    """An experiment with random parameters, different from those of its moving average."""
    experiment = assemble(configs.load_config(f"{FILE}:{variant}"))
    source = experiment.source(cache)
    spec = batch_spec(experiment, source.columns)
    state = jax.jit(initializer(experiment, 4))(jax.random.key(0), zeros(spec))

    def noisy(leaf):
        return leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    state.params["model"] = jax.tree.map(noisy, state.params["model"])
    return EvaluationContext(experiment, source, cache), state


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def flow_model(cache):
    return context_and_state("aligned_flow", cache)


def test_generation_compares_samples_of_the_averaged_model_with_held_out_images(flow_model, cache):
    context, state = flow_model
    network = f"{FILE}:fast"
    section = {
        "name": "train.evaluate.generation",
        "reference": REFERENCE,
        "network": network,
        "samples": 32,
        "steps": 2,
        "shown": 6,
        "batch": 16,
    }
    evaluate = build_evaluators({"generation": section}, context)["generation"]
    metrics, arrays = evaluate(state, KEY)
    again, _ = evaluate(state, KEY)
    assert metrics == again

    real = tiny_experiment.images(examples=48).gather(np.arange(32))
    model, parameters = context.experiment.model, {"params": state.average}

    @jax.jit
    def sample(label, noise):
        def velocity(x, time):
            return model.apply(parameters, x, time, label)[0]

        return samplers.ode(velocity, noise, steps=2)

    drawn = []
    for start in (0, 16):
        label = jnp.asarray(real["label"][start : start + 16])
        noise = jax.random.normal(jax.random.fold_in(KEY, start), (16, 8, 8, 1))
        sampled = sample(label, noise)
        drawn.append(np.asarray(from_signed_range(sampled)))
    drawn = np.concatenate(drawn)
    encoder = encoders.trained_encoder(network, cache)
    embedded = [encoders.encode(encoder, images) for images in (drawn, real["image"])]
    statistics = [frechet.gaussian_statistics(one) for one in embedded]
    expected = frechet.frechet_distance(*statistics)
    np.testing.assert_allclose(metrics["frechet_distance"], expected, rtol=1e-3)
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1
    order = np.argsort(real["label"][:6], kind="stable")
    difference = np.abs(arrays["samples"].astype(int) - drawn[:6][order])
    assert arrays["samples"].dtype == np.uint8 and difference.max() <= 1


def test_hidden_representation_probes_a_block_of_the_noised_input(flow_model, cache):
    context, state = flow_model
    compared = {"other": {"encoder": "random", "config": f"{FILE}:fast", "seed": 1}}
    section = {
        "name": "train.evaluate.hidden_representation",
        "tap": "block_1",
        "reference": REFERENCE,
        "classes": 4,
        "compared": compared,
        "probe_examples": 40,
        "topk": 5,
    }
    metrics, arrays = build_evaluators({"hidden": section}, context)["hidden"](state, KEY)
    assert set(metrics) == {"linear_probe", "cknna_other"} and arrays == {}

    held_out = tiny_experiment.images(examples=48)
    train = context.source.gather(np.arange(40))
    test = held_out.gather(np.arange(48))
    keys = jax.random.split(KEY)
    hidden = []
    for data, key in ((train, keys[0]), (test, keys[1])):
        pixels = to_signed_range(jnp.asarray(data["image"]))
        size = len(pixels)
        noised = flow.interpolate(
            pixels,
            jax.random.normal(key, pixels.shape),
            jnp.full((size,), 0.5),
            interpolant=flow.interpolant("linear"),
        )
        model = context.experiment.model
        null = jnp.full((size,), 4)
        taps = jax.jit(model.apply)(
            {"params": state.average}, noised, jnp.full((size,), 0.5), null
        )[1]
        hidden.append(taps["block_1"].mean(axis=1))
    labels = [jnp.asarray(data["label"]) for data in (train, test)]
    probe = probes.linear_probe(hidden[0], labels[0], hidden[1], labels[1], classes=4)
    assert metrics["linear_probe"] == pytest.approx(float(probe), abs=1 / 48)
    teacher = encoders.tokens(held_out, cache, **compared["other"]).mean(axis=1)
    expected = similarity.cknna(l2_normalize(hidden[1]), l2_normalize(jnp.asarray(teacher)), topk=5)
    np.testing.assert_allclose(metrics["cknna_other"], expected, rtol=1e-3, atol=1e-4)


def test_encoder_probe_reads_the_embedding(cache):
    context, state = context_and_state("fast", cache)
    section = {"name": "train.evaluate.encoder_probe", "reference": REFERENCE, "classes": 4}
    metrics, _ = build_evaluators({"probe": section}, context)["probe"](state, KEY)
    encoder = encoders.model_encoder(
        context.experiment.forward, state.params["model"], state.forward
    )
    train = context.source.gather(np.arange(64))
    test = tiny_experiment.images(examples=48).gather(np.arange(48))
    data = (
        jnp.asarray(encoders.encode(encoder, train["image"])),
        jnp.asarray(train["label"]),
        jnp.asarray(encoders.encode(encoder, test["image"])),
        jnp.asarray(test["label"]),
    )
    assert metrics == {
        "linear_probe": float(probes.linear_probe(*data, classes=4)),
        "knn_probe": float(probes.knn_probe(*data, classes=4)),
    }
    assert metrics["knn_probe"] > 0.9  # brightness alone tells the classes apart


def test_encoder_probe_reads_a_tap_and_its_spectrum(cache):
    context, state = context_and_state("fast", cache)
    section = {"name": "train.evaluate.encoder_probe", "reference": REFERENCE, "classes": 4}
    section |= {"tap": "map", "spectrum": True, "prefix": "map_"}
    metrics, _ = build_evaluators({"probe": section}, context)["probe"](state, KEY)
    encoder = encoders.model_encoder(
        context.experiment.forward, state.params["model"], state.forward
    )
    test = tiny_experiment.images(examples=48).gather(np.arange(48))
    # The embedding of this network is the mean of its map.
    pooled = encoders.encode(encoder, test["image"]).astype(np.float64)
    values = np.linalg.svd(pooled, compute_uv=False)
    shares = values / values.sum()
    rank = np.exp(-np.sum(shares * np.log(shares)))
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit / 48)
    eigenvalues = eigenvalues[eigenvalues > 1e-7]
    squared = np.square(unit[:, None] - unit[None]).sum(-1)[~np.eye(48, dtype=bool)]
    expected = {
        "map_effective_rank": rank,
        "map_entropy": -np.sum(eigenvalues * np.log(eigenvalues)),
        "map_uniformity": np.log(np.mean(np.exp(-2.0 * squared))),
    }
    assert set(metrics) == {"map_linear_probe", "map_knn_probe", *expected}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    with pytest.raises(UserError, match="tap of the encoder"):
        build_evaluators({"probe": section | {"tap": "mapp"}}, context)["probe"](state, KEY)


def test_mistakes_in_a_section_name_the_place(flow_model):
    context, _ = flow_model
    section = {"name": "train.evaluate.encoder_probe", "reference": REFERENCE, "clases": 4}
    with pytest.raises(UserError, match=r"config\.evaluation\.metrics\.probe\.clases: .*'classes'"):
        build_evaluators({"probe": section}, context)
