"""An experiment ready to run: config checked, parts built, nothing compiled or read yet."""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
import optax

from repalign.registry import UserError, build, check_section
from repalign.train import config as configs
from repalign.train import terms
from repalign.train.objective import Objective
from repalign.train.state import Forward
from repalign.train.step import Step, make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts that a config names.

    Attributes:
        raw: the config as it was given, for the record.
        config: the same as dataclasses.
        model, forward, objective: what the sections of these names describe.
    """

    raw: ml_collections.ConfigDict
    config: configs.ExperimentConfig
    model: Any
    forward: Forward
    objective: Objective

    def optimizer(self, total_steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a run with that many steps."""
        return self.config.optimizer.transformation(total_steps)

    def step(self, total_steps: int) -> Step:
        """Returns the train step, not compiled, for one replica."""
        return make_train_step(
            self.forward,
            self.objective,
            self.optimizer(total_steps),
            average_decay=self.config.optimizer.average_decay,
            accumulate_steps=self.config.optimizer.accumulate_steps,
        )

    def example_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of one example by column, as ``data.spec`` declares them.

        Raises:
            UserError: the config declares none, or no array can have the declared ones.
        """
        if self.config.data.spec is None:
            raise UserError(
                "config.data.spec is missing: give the shape and dtype of every column, such as "
                '{"image": ((256, 256, 3), "uint8")}.'
            )
        spec = {}
        for name, entry in self.config.data.spec.items():
            try:
                shape, dtype = entry
                spec[name] = jax.ShapeDtypeStruct(tuple(shape), dtype)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"config.data.spec.{name} must be a shape and a dtype, such as "
                    f'((256, 256, 3), "uint8"), not {entry!r}.'
                ) from error
        return spec

    def source(self, cache: pathlib.Path) -> Any:
        """Returns the data with its further columns, computed now or read from the cache."""
        source = build(self.config.data.source, place="config.data.source")
        columns = {
            name: build(section, source, cache, place=f"config.data.columns.{name}")
            for name, section in self.config.data.columns.items()
        }
        return source.with_columns(**columns) if columns else source


def assemble(raw: ml_collections.ConfigDict) -> Experiment:
    """Builds an experiment from its config.

    Raises:
        UserError: anything in the config that cannot run, before anything is compiled.
    """
    config = configs.parse(raw)
    model = build(config.model, place="config.model")
    forward = build(config.forward, model, place="config.forward")
    objective = Objective(tuple(terms.from_config(config.objective)))
    sections = {"config.data.source": (config.data.source, 0)}
    for name, section in config.data.columns.items():
        sections[f"config.data.columns.{name}"] = (section, 2)
    for kind in ("metrics", "final_metrics"):
        for name, section in getattr(config.evaluation, kind).items():
            sections[f"config.evaluation.{kind}.{name}"] = (section, 1)
    for place, (section, given) in sections.items():
        check_section(section, place=place, given=given)
    return Experiment(raw, config, model, forward, objective)
