import jax
import numpy as np
import pytest
import tiny_experiment

from repalign.data.pixels import to_unit_range
from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train import encoders
from repalign.train.experiment import assemble

CONFIG = f"{tiny_experiment.__file__}:fast"


@pytest.fixture(scope="module")
def source():
    return tiny_experiment.images(examples=24)


def test_encode_is_the_models_embedding_in_batches(source, monkeypatch):
    monkeypatch.setattr(encoders, "_BATCH", 10)  # 24 images: the last batch is padded
    images = source.arrays["image"]
    encoder = encoders.random_encoder(CONFIG, images, seed=3)
    model = assemble(configs.load_config(CONFIG)).model
    params, _ = encoder.params
    expected, taps = model.apply(
        {"params": params["encoder"]}, to_unit_range(jax.numpy.asarray(images))
    )
    np.testing.assert_allclose(encoders.encode(encoder, images), expected, rtol=1e-5, atol=1e-6)
    found = encoders.encode(encoder, images, tap="map")
    assert found.shape == (24, 16, 8)  # 4x4 positions, row by row
    np.testing.assert_allclose(found[:, 5], taps["map"][:, 1, 1], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="unknown tap of the encoder 'mpa'. Did you mean 'map'"):
        encoders.encode(encoder, images, tap="mpa")


def test_random_encoders_differ_by_seed_only(source):
    images = source.arrays["image"]
    one, same, other = (encoders.random_encoder(CONFIG, images, seed=s).params for s in (1, 1, 2))
    leaves = [jax.tree.leaves(tree) for tree in (one, same, other)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


def test_a_trained_encoder_is_trained_once(tmp_path, monkeypatch):
    first = encoders.trained_encoder(CONFIG, tmp_path)
    (kept,) = (tmp_path / "encoders").iterdir()
    assert kept.name.startswith("tiny_experiment.py-fast-")

    def fail(*arguments):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("repalign.train.writer.MetricsWriter.write", fail)
    again = encoders.trained_encoder(CONFIG, tmp_path)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_seed_trains_another_encoder(tmp_path):
    own, zero, one = (
        encoders.trained_encoder(CONFIG, tmp_path, seed=seed).params for seed in (None, 0, 1)
    )
    leaves = [jax.tree.leaves(tree) for tree in (own, zero, one)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


def test_embeddings_are_computed_once_for_a_seed(source, tmp_path, monkeypatch):
    images = source.arrays["image"]
    arguments = {"encoder": "random", "config": CONFIG}
    found = encoders.embeddings(images, tmp_path, seed=4, **arguments)
    expected = encoders.encode(encoders.random_encoder(CONFIG, images, seed=4), images)
    np.testing.assert_array_equal(found, expected)

    def fail(*arguments, **named):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoders, "encode", fail)
    np.testing.assert_array_equal(encoders.embeddings(images, tmp_path, seed=4, **arguments), found)
    with pytest.raises(AssertionError, match="encoded again"):
        encoders.embeddings(images, tmp_path, seed=5, **arguments)


def test_tokens_are_standardised_cached_and_controlled(source, tmp_path, monkeypatch):
    arguments = {"encoder": "random", "config": CONFIG, "seed": 3}
    tokens = encoders.tokens(source, tmp_path, **arguments)
    assert tokens.shape == (24, 16, 8) and tokens.dtype == np.float32
    alive = tokens.std(axis=(0, 1)) > 0
    assert alive.sum() >= 2
    np.testing.assert_allclose(tokens.mean(axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(tokens.std(axis=(0, 1))[alive], 1, rtol=1e-4)

    def fail(*arguments, **named):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoders, "encode", fail)
    np.testing.assert_array_equal(encoders.tokens(source, tmp_path, **arguments), tokens)
    shuffled = encoders.tokens(source, tmp_path, **arguments, control="shuffled")
    partner = encoders.derangement(24, 3)
    np.testing.assert_array_equal(shuffled, tokens[partner])
    constant = encoders.tokens(source, tmp_path, **arguments, control="constant")
    assert constant.shape == tokens.shape
    np.testing.assert_allclose(constant[7], tokens.mean(axis=0), atol=1e-6)
    with pytest.raises(AssertionError, match="encoded again"):  # other images, other tokens
        encoders.tokens(source.select(slice(0, 12)), tmp_path, **arguments)
    with pytest.raises(UserError, match="teacher control 'shufled'. Did you mean 'shuffled'"):
        encoders.tokens(source, tmp_path, **arguments, control="shufled")
    with pytest.raises(UserError, match="unknown teacher encoder 'rndom'. Did you mean 'random'"):
        encoders.tokens(source, tmp_path, encoder="rndom", config=CONFIG)


def test_a_constant_channel_standardises_to_zero():
    tokens = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    tokens[..., 1] = 1e4
    found = encoders.standardized(tokens)
    np.testing.assert_array_equal(found[..., 1], 0)
    np.testing.assert_allclose(found[..., 0].std(), 1, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 100])
def test_a_derangement_moves_every_element(size):
    partner = encoders.derangement(size, seed=0)
    assert sorted(partner) == list(range(size))
    assert not np.any(partner == np.arange(size))
    np.testing.assert_array_equal(partner, encoders.derangement(size, seed=0))


def test_a_forward_pass_without_an_encoder_gives_none():
    flow = assemble(configs.load_config(f"{tiny_experiment.__file__}:aligned_flow")).forward
    with pytest.raises(UserError, match="config.forward. trains no encoder"):
        encoders.model_encoder(flow, {}, {})
