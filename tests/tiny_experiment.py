"""An experiment small enough for tests, and the functions that its configs name.

Pytest puts this folder on the path, so that configs reach it as ``tiny_experiment:NAME``.
"""

import functools
import time

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from repalign.data.sources import ArraySource
from repalign.registry import lookup
from repalign.tables.claims import Less
from repalign.tables.table import Column, Table
from repalign.train.loop import EvaluationResult
from repalign.train.step import evaluation_params

POISON = 5
"""The example of `poisoned_images` that makes `poisoned_loss` not a number."""


def images(*, examples: int = 64) -> ArraySource:
    """8x8 images of four classes that differ in brightness, with noise."""
    generator = np.random.default_rng(0)
    label = np.arange(examples, dtype=np.int32) % 4
    noise = generator.integers(0, 64, (examples, 8, 8, 1))
    image = (noise + 60 * label[:, None, None, None]).astype(np.uint8)
    return ArraySource({"image": image, "label": label})


def poisoned_images(*, examples: int = 64) -> ArraySource:
    """The same with a column ``poison/value``: 1, but not a number in one example."""
    poison = np.ones(examples, np.float32)
    poison[POISON] = np.nan
    return images(examples=examples).with_columns(**{"poison/value": poison})


class SlowSource(ArraySource):
    """A source that takes its time, so that a test can meet a run in the middle."""

    def gather(self, indices):
        time.sleep(0.3)
        return super().gather(indices)


def slow_images(*, examples: int = 64) -> SlowSource:
    """The images, slowly."""
    return SlowSource(images(examples=examples).arrays)


def random_tokens(source, cache, *, tokens: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    """A data column in the shape of a teacher's tokens."""
    del cache
    generator = np.random.default_rng(seed)
    return generator.standard_normal((len(source), tokens, width)).astype(np.float32)


def poisoned_loss(logits, labels, poison):
    """Cross-entropy times the poison."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) * poison


def source_loss(context):
    """An evaluator: the cross-entropy of the classifier on its training images, ``source_loss``."""
    forward = context.experiment.forward
    batch = jax.device_put(context.source.gather(np.arange(len(context.source))))

    @jax.jit
    def measure(params, forward_state, key):
        features, _ = forward.apply(
            params, batch, key, average=None, frozen=None, state=forward_state
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            features["classifier/logits"], features["label"]
        )
        return losses.mean()

    def evaluate(state, key):
        shown = np.full((1, 8, 8, 1), 128, np.uint8)
        value = float(measure(evaluation_params(state), state.forward, key))
        return EvaluationResult({"source_loss": value}, {"samples": shown})

    return evaluate


def classifier(*, learning_rate: float = 0.01, average_decay: float | None = None) -> ConfigDict:
    """A convolutional classifier, six steps."""
    return ConfigDict(
        {
            "data": {"source": {"name": "tiny_experiment:images"}, "batch_size": 16},
            "model": {"name": "models.convnet.ConvNet", "widths": (8,), "groups": 0},
            "forward": {"name": "train.forward.supervised", "classes": 4, "shift": 1},
            "objective": {
                "cross_entropy": {
                    "term": "optax:softmax_cross_entropy_with_integer_labels",
                    "logits": "classifier/logits",
                    "labels": "label",
                }
            },
            "optimizer": {"learning_rate": learning_rate, "average_decay": average_decay},
            "evaluation": {
                "every": 2,
                "metrics": {"source": {"name": "tiny_experiment:source_loss"}},
            },
            "total_steps": 6,
            "log_every": 1,
        }
    )


def poisoned() -> ConfigDict:
    """The classifier with a loss that stops being finite when it meets one example."""
    config = classifier()
    config.data.source.name = "tiny_experiment:poisoned_images"
    config.objective.cross_entropy.term = "tiny_experiment:poisoned_loss"
    config.objective.cross_entropy.poison = "poison/value"
    config.evaluation = ConfigDict()
    config.checkpoint_every = 1
    return config


def steady() -> ConfigDict:
    """The classifier with split parameters, forty slow steps and a checkpoint every five."""
    config = classifier(average_decay=0.5)
    config.data.source.name = "tiny_experiment:slow_images"
    config.mesh = {"fsdp": 2, "rules": {"smallest": 1}}
    config.evaluation.every = 0
    config.checkpoint_every = 5
    config.total_steps = 40
    return config


def aligned_flow() -> ConfigDict:
    """A flow transformer aligned with random tokens, with a moving average of its parameters."""
    return ConfigDict(
        {
            "data": {
                "source": {"name": "tiny_experiment:images"},
                "batch_size": 8,
                "columns": {"teacher/patches": {"name": "tiny_experiment:random_tokens"}},
            },
            "model": {
                "name": "models.sit.SiT",
                "image_size": 8,
                "channels": 1,
                "patch_size": 4,
                "width": 16,
                "depth": 1,
                "heads": 2,
                "classes": 4,
                "taps": (1,),
            },
            "forward": {"name": "train.forward.flow"},
            "objective": {
                "flow_matching": {"term": "train.terms.flow_matching"},
                "repa": {
                    "term": "train.terms.repa",
                    "student": "sit/block_1",
                    "teacher": "teacher/patches",
                    "projector_width": 8,
                    "weight": 0.5,
                },
            },
            "optimizer": {"learning_rate": 0.01, "average_decay": 0.9, "clip_norm": 1.0},
            "total_steps": 4,
        }
    )


def taught() -> ConfigDict:
    """The flow transformer aligned with the tokens of the classifier, which is trained first."""
    config = aligned_flow()
    config.model.patch_size = 2
    config.data.columns = {
        "teacher/patches": {
            "name": "train.encoders.tokens",
            "encoder": "trained",
            "config": f"{__file__}:fast",
        }
    }
    return config


VARIANTS = {
    "slow": functools.partial(classifier, learning_rate=1e-4),
    "fast": functools.partial(classifier, learning_rate=0.03),
    "averaged": functools.partial(classifier, average_decay=0.5),
    "poisoned": poisoned,
    "steady": steady,
    "aligned_flow": aligned_flow,
    "taught": taught,
}


def get_config(variant: str = "fast") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of tiny_experiment")().lock()


TABLE = Table(
    paper=0,
    rows={"Slow": "slow", "Fast, really": "fast"},
    columns=(Column("source_loss", better="lower"),),
    claims=(Less("source_loss", "Fast, really", "Slow"),),
    seeds=2,
)
