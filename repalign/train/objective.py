"""Objectives: weighted sums of terms that read named features.

A term is a pair of pure functions, as an optax transformation is. Its parameters (a projector, a
codebook, prototypes, a learned temperature) and its state (a queue, a center, running statistics)
live here and not in the model::

    objective = flow_matching() + 0.5 * repa(student="sit/block_8", teacher="teacher/patches")
    params, state = objective.init(key, features)
    loss, output = objective.apply(params, state, features, key, step=0)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repalign.numerics import as_float
from repalign.registry import UserError, nearest
from repalign.typing import Array, Features, Float, Key, Metrics, PyTree, Scalar, Schedule

Weight = int | float | Schedule


class TermOutput(NamedTuple):
    """What a term computes.

    Attributes:
        loss: one value an example, or a scalar where the loss is a statistic of the batch.
        state: the term's new state.
        metrics: named scalars to log beside the loss.
    """

    loss: Float[Array, "*batch"]
    state: PyTree
    metrics: Metrics


class ObjectiveOutput(NamedTuple):
    """The new state of every term, and what to log: each term's unweighted mean and its metrics."""

    state: PyTree
    metrics: Metrics


def _no_variables(key: Key[Array, ""], features: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
    """The ``init`` of a term that has neither parameters nor state."""
    del key, features
    return {}, {}


@dataclasses.dataclass(frozen=True)
class Term:
    """One named summand of an objective.

    Attributes:
        name: the name under which the term's parameters, state and metrics appear.
        apply: ``(params, state, features, key) -> TermOutput``.
        init: ``(key, features) -> (params, state)``; it may look at the shapes of the features
            only.
        weight: a number, or a schedule of the step (an alignment that stops, a warm-up).
    """

    name: str
    apply: Callable[[PyTree, PyTree, Features, Key], TermOutput]
    init: Callable[[Key, Features], tuple[PyTree, PyTree]] = _no_variables
    weight: Weight = 1.0

    def __mul__(self, factor: Weight) -> "Term":
        return dataclasses.replace(self, weight=_product(self.weight, factor))

    __rmul__ = __mul__

    def __add__(self, other: "Term | Objective") -> "Objective":
        return Objective((self,)) + other


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms with distinct names."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("an objective needs at least one term.")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"two terms are named {repeated[0]!r}; give one of them another name "
                "(dataclasses.replace(term, name=...))."
            )

    def __add__(self, other: "Term | Objective") -> "Objective":
        return Objective(self.terms + (other.terms if isinstance(other, Objective) else (other,)))

    def __mul__(self, factor: Weight) -> "Objective":
        return Objective(tuple(term * factor for term in self.terms))

    __rmul__ = __mul__

    def init(self, key: Key[Array, ""], features: Features) -> tuple[PyTree, PyTree]:
        """Returns the parameters and the state of all terms, by the terms' names."""
        params, state = {}, {}
        for index, term in enumerate(self.terms):
            features_seen = _NamedFeatures(features, term.name)
            params[term.name], state[term.name] = term.init(
                jax.random.fold_in(key, index), features_seen
            )
        return params, state

    def apply(
        self, params: PyTree, state: PyTree, features: Features, key: Key[Array, ""], *, step: Any
    ) -> tuple[Scalar, ObjectiveOutput]:
        """Returns ``sum_i weight_i(step) mean(loss_i)`` in float32, and the output of the terms."""
        total = jnp.zeros((), jnp.float32)
        new_state, metrics = {}, {}
        for index, term in enumerate(self.terms):
            output = term.apply(
                params[term.name],
                state[term.name],
                _NamedFeatures(features, term.name),
                jax.random.fold_in(key, index),
            )
            mean = jnp.mean(as_float(output.loss))
            weight = term.weight(step) if callable(term.weight) else term.weight
            total += weight * mean
            new_state[term.name] = output.state
            metrics[term.name] = mean
            metrics |= {f"{term.name}/{name}": value for name, value in output.metrics.items()}
        return total, ObjectiveOutput(new_state, metrics)


class _NamedFeatures(Mapping):
    """Features whose missing names are an error that says which term asked and what there is."""

    def __init__(self, features: Features, term: str) -> None:
        self._features, self._term = features, term

    def __getitem__(self, name: str) -> Array:
        if name not in self._features:
            raise UserError(
                f"objective.{self._term}: the forward pass gives no feature {name!r}. "
                f"{nearest(name, self._features)}"
            )
        return self._features[name]

    def __iter__(self):
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)


def _product(weight: Weight, factor: Weight) -> Weight:
    if callable(weight) or callable(factor):
        return lambda step: (
            (weight(step) if callable(weight) else weight)
            * (factor(step) if callable(factor) else factor)
        )
    return weight * factor
