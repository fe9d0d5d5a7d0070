"""Classifier-free guidance, switched on inside an interval of times."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from repalign.typing import Array, Bool, Float, Integer


@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance:
    """The velocity ``v(x, t, null) + scale (v(x, t, y) - v(x, t, null))`` inside the interval.

    Outside of it, and for scale 1, it is ``v(x, t, y)`` and the null branch is not evaluated
    (under ``vmap`` it is). Inside, both branches are one call on a batch of twice the size.

    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6, with ``scale = 1 + w``; interval:
    Kynkaanniemi et al. 2024, arXiv:2404.07724; as in sihyun-yu/REPA@67f7145:samplers.py:47-108.
    The samplers decide once per step, by the time at which it starts, also for Heun's second
    evaluation, as there.

    Attributes:
        model: ``(x, t, y) -> velocity``.
        labels: one class per example.
        null_label: the label of the unconditional branch (``classes`` of :class:`SiT`).
        scale: at least 1.
        interval: lowest and highest guided time, both included, in the model's time convention.
    """

    model: Callable[[Array, Array, Array], Array]
    labels: Integer[Array, " batch"]
    null_label: int
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(
                f"the guidance scale is at least 1 (1: no guidance), not {self.scale}."
            )

    def is_active(self, time: np.ndarray | float) -> np.ndarray:
        """Says for times known before tracing whether they are guided, compared in float64."""
        low, high = self.interval
        return (self.scale > 1) & (low <= np.asarray(time)) & (np.asarray(time) <= high)

    def conditional(
        self, x: Float[Array, "batch *rest"], time: Float[Array, " batch"]
    ) -> Float[Array, "batch *rest"]:
        """Returns ``v(x, t, y)``."""
        return self.model(x, time, self.labels)

    def guided(
        self, x: Float[Array, "batch *rest"], time: Float[Array, " batch"]
    ) -> Float[Array, "batch *rest"]:
        """Returns the guided velocity, whatever the time."""
        null = jnp.full_like(self.labels, self.null_label)
        both = self.model(
            jnp.concatenate([x, x]),
            jnp.concatenate([time, time]),
            jnp.concatenate([self.labels, null]),
        )
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + self.scale * (conditional - unconditional)

    def __call__(
        self,
        x: Float[Array, "batch *rest"],
        time: Float[Array, " batch"],
        active: Bool[Array, ""] | bool = True,
    ) -> Float[Array, "batch *rest"]:
        """Returns the guided velocity if ``active`` and the conditional one otherwise."""
        if isinstance(active, bool):
            return self.guided(x, time) if active else self.conditional(x, time)
        return lax.cond(active, self.guided, self.conditional, x, time)
