"""Checkpoints of a run: orbax's CheckpointManager, wrapped in this one file.

A checkpoint holds the state (without ``frozen``) and the position of the data iterator, which does
not depend on the number of processes. It is restored into an abstract state that carries target
shardings, so the mesh and the number of processes may differ from those that wrote it. Among
several processes all call every method here; each writes the parts that lie on its devices.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from repalign.registry import UserError
from repalign.train.state import TrainState
from repalign.typing import PyTree


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it does not ask JAX about preemption.

    It would from its own thread with steps gone by, and JAX's answer goes by the last number asked.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints below one directory; a context manager that waits for writes at its end.

    Args:
        directory: one that all processes see.
        keep: how many of the newest are kept.
        alone: this process reads and writes them by itself, whatever others there are; among
            several, process 0 is the only one that can write.

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 2, alone: bool = False) -> None:
        several = ocp.options.MultiprocessingOptions()
        self._own_copy = alone and jax.process_count() > 1
        if self._own_copy:
            own = jax.process_index()
            several = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone_{own}"
            )
        try:
            if self._own_copy:  # Orbax makes no directory on behalf of a part of the processes.
                directory.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=not self._own_copy, multiprocessing_options=several
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {directory}: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: dict[str, Any]) -> None:
        """Writes a checkpoint in the background; the state may be donated after the call."""
        saved = _saved(state)
        if self._own_copy:  # Orbax takes no array of one process's devices among several.
            saved = jax.tree.map(np.asarray, saved)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), iterator=ocp.args.JsonSave(iterator)
        )
        self._manager.save(step, args=arguments)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest state and iterator position; ``frozen`` is that of ``abstract``."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(_saved(abstract)), iterator=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self._manager.latest_step(), args=arguments)
        values = dict(restored["state"])
        values["key"] = jax.random.wrap_key_data(values["key"])
        return TrainState(**values, frozen=abstract.frozen), dict(restored["iterator"])

    def wait(self) -> None:
        """Returns when every write has ended."""
        self._manager.wait_until_finished()


def _saved(state: TrainState) -> PyTree:
    """What is written of a state: all but ``frozen``, the key as its raw data."""
    values = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name != "frozen"
    }
    if isinstance(state.key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.key)
        sharding = state.step.sharding
        values["key"] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    else:
        values["key"] = jax.random.key_data(state.key)
    return values
