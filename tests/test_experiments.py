"""Every experiment that ships: its variants assemble, and one train step of each can be taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.data.captioned_shapes import CAPTION_LENGTH, VOCABULARY
from repalign.data.fashion_mnist import fashion_mnist
from repalign.data.sources import ArraySource
from repalign.tables.papers import papers
from repalign.train import config as configs
from repalign.train import loop
from repalign.train.experiment import assemble

VARIANTS = [
    (key, variant)
    for key in configs.experiment_files()
    for variant in configs.load_experiment(key).VARIANTS
]
SMALL = [f"{key}:{variant}" for key, variant in VARIANTS if not variant.startswith("imagenet")]
FULL_SCALE = [f"{key}:{variant}" for key, variant in VARIANTS if variant.startswith("imagenet")]
BATCH = 4
# The step of the others differs from one of these in a number or in the block that is read.
RUN = [
    "classifier:fashion_mnist",
    "simclr:fashion_mnist",
    "simclr:fashion_mnist_resnet",
    "repa:repa",
    "mae:fashion_mnist",
    "vq_vae:vq_ema",
    "relative_representations:digits_relative",
    "backward_compatibility:half_classes_orthogonal",
    "modality_gap:clip_all",
    "capi:capi",
]


@pytest.fixture(scope="module")
def images():
    source = fashion_mnist("train")
    # Captions for those experiments that read them.
    captions = np.random.default_rng(0).integers(1, len(VOCABULARY), (8, CAPTION_LENGTH), np.int32)
    return source.select(slice(0, 8)).with_columns(tokens=captions)


def small_experiment(name):
    return assemble(
        configs.override(configs.load_config(name), [f"--config.data.batch_size={BATCH}"])
    )


def column_shape(section):
    """The shape of one image's entry in a data column: tokens of an encoder, or one vector."""
    channels = 112
    if section["encoder"] != "efficientnet_lite0":
        channels = configs.load_config(section["config"]).model.widths[-1]
    if section["name"] == "train.encoders.tokens":
        return (16, channels)
    if section["name"] == "train.latent_spaces.class_means":
        return (section["classes"], channels)
    return (section["anchors"] if "anchors" in section else channels,)


def with_random_tokens(experiment, images) -> ArraySource:
    """The images with random columns in the shape of what encoders give, which nobody trains."""
    columns = {}
    for name, section in experiment.config.data.columns.items():
        generator = np.random.default_rng(0)
        shape = (len(images), *column_shape(section))
        columns[name] = generator.standard_normal(shape).astype(np.float32)
    return images.with_columns(**columns)


@pytest.mark.parametrize("key", configs.experiment_files())
def test_a_file_describes_itself(key):
    module = configs.load_experiment(key)
    assert module.__doc__ and module.get_config().is_locked
    if hasattr(module, "TABLE"):
        assert set(module.TABLE.rows.values()) <= set(module.VARIANTS)
        assert module.TABLE.paper in {record.paper.id for record in papers(status="works")}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_variant_has_a_train_step(name, images):
    experiment = small_experiment(name)
    spec = loop.batch_spec(experiment, with_random_tokens(experiment, images).columns)
    total_steps = experiment.config.steps(len(images))
    state = loop.abstract_state(experiment, total_steps, spec)
    new, metrics = jax.eval_shape(experiment.step(total_steps), state, spec)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(new) == shapes(state)
    terms = set(experiment.config.objective)
    assert {"loss", "grad_norm", "update_norm"} | terms <= set(metrics)


@pytest.mark.parametrize("name", RUN)
def test_a_train_step_of_a_small_variant_runs(name, images):
    experiment = small_experiment(name)
    source = with_random_tokens(experiment, images)
    batch = jax.tree.map(jnp.asarray, source.gather(np.arange(BATCH)))
    spec = loop.batch_spec(experiment, source.columns)
    initial, step = loop.initializer(experiment, 100), experiment.step(100)

    def init_and_step(key, batch):
        return step(initial(key, loop.zeros(spec)), batch)

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    new, metrics = jax.jit(init_and_step, compiler_options=quick)(jax.random.key(0), batch)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] > 0 and int(new.step) == 1


@pytest.mark.parametrize("name", FULL_SCALE)
def test_a_full_scale_variant_has_a_train_step(name):
    experiment = assemble(configs.load_config(name))
    spec = loop.batch_spec(experiment, experiment.example_spec())
    state = loop.abstract_state(experiment, 1000, spec)
    new, metrics = jax.eval_shape(experiment.step(1000), state, spec)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert set(experiment.config.objective) <= set(metrics)
