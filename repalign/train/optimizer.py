"""The optimizer of a run, from a config section."""

import dataclasses

import jax
import optax

from repalign.registry import UserError, lookup
from repalign.typing import PyTree

_OPTIMIZERS = {"adamw": optax.adamw, "adam": optax.adam, "sgd": optax.sgd, "lars": optax.lars}
_SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Fields of the ``optimizer`` section.

    Attributes:
        name: adamw, adam, sgd or lars.
        learning_rate: the peak.
        schedule: after the warm-up: constant, or cosine or linear to zero at the last step.
        warmup_steps: linear warm-up from zero.
        clip_norm: largest global gradient norm; None does not clip.
        weight_decay: decoupled for adamw, added to the gradient by lars; must be 0 for the others.
        no_decay: names of parameters, the last part of their path (``bias``, ``scale``), which are
            neither decayed nor, by lars, scaled by their trust ratio; adamw and lars only.
        b1, b2, eps: of adam and adamw.
        momentum: of sgd and lars.
        average_decay: decay of the moving average of the model's parameters; None keeps none.
        accumulate_steps: microbatches whose gradients are averaged before each update (see
            `repalign.train.step.make_train_step`); the batch size must be a multiple.
    """

    learning_rate: float
    name: str = "adamw"
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    average_decay: float | None = None
    accumulate_steps: int = 1

    def __post_init__(self) -> None:
        lookup(_OPTIMIZERS, self.name, kind="optimizer")
        lookup(dict.fromkeys(_SCHEDULES), self.schedule, kind="learning-rate schedule")
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate must be positive, not {self.learning_rate}.")
        if self.weight_decay and self.name in ("adam", "sgd"):
            raise UserError(f"optimizer.weight_decay: {self.name} has none; use adamw or lars.")
        if self.average_decay is not None and not 0 <= self.average_decay < 1:
            raise UserError(f"optimizer.average_decay must be in [0, 1), not {self.average_decay}.")
        if self.accumulate_steps < 1:
            raise UserError(
                f"optimizer.accumulate_steps must be positive, not {self.accumulate_steps}."
            )

    def learning_rate_schedule(self, total_steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        peak, decay_steps = self.learning_rate, max(total_steps - self.warmup_steps, 1)
        main = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, decay_steps),
            "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        }[self.schedule]
        if not self.warmup_steps:
            return main
        warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
        return optax.join_schedules([warmup, main], [self.warmup_steps])

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation, clipping first."""
        arguments = {"learning_rate": self.learning_rate_schedule(total_steps)}
        if self.name in ("adam", "adamw"):
            arguments |= {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        else:
            arguments |= {"momentum": self.momentum}
        if self.name in ("adamw", "lars"):
            arguments |= {"weight_decay": self.weight_decay}
            masks = {"adamw": ("mask",), "lars": ("weight_decay_mask", "trust_ratio_mask")}
            arguments |= dict.fromkeys(masks[self.name], self._decayed)
        optimizer = _OPTIMIZERS[self.name](**arguments)
        if self.clip_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)

    def _decayed(self, params: PyTree) -> PyTree:
        """Returns True for every parameter whose name is not in ``no_decay``."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key not in self.no_decay, params
        )
