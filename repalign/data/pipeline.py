"""The input pipeline: random-access batches, prefetched by grain threads, copied ahead to devices.

Element ``i`` of a data set of batches IS batch ``i``: its examples are a pure function of
(seed, step), so a run that resumes at any step sees exactly the batches it would have seen, on any
number of processes and with any number of threads.

    batches = TrainingBatches(fashion_mnist("train"), batch_size=192, seed=0)
    with DeviceLoader(Loader(batches)) as loader:
        for batch in loader: ...
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import Int

from repalign.data.sources import Record, ReplicaSources, Source
from repalign.registry import UserError

State = dict[str, Any]
"""What a checkpoint keeps of an iterator: a small dict that JSON can hold."""


def epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """Returns the order in which epoch ``epoch`` visits ``size`` examples (a permutation)."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@runtime_checkable
class Batches(Protocol):
    """A random-access collection of batches with what identifies its order."""

    @property
    def order(self) -> State: ...

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """Shuffled batches of constant size, epoch after epoch; a remainder of an epoch is dropped.

    Batch ``step`` is examples ``(step % steps_per_epoch) * batch_size ...`` of the permutation of
    epoch ``step // steps_per_epoch``. A process that needs only some ``rows`` makes only those of
    that same global batch, which therefore does not depend on the number of processes.

    Attributes:
        source: where the examples come from.
        batch_size: examples per global batch (per replica).
        seed: the order; give this or ``replicas``.
        replicas: the orders of several replicas. Every column then has shape
            ``[len(replicas), batch, ...]``, and row ``r`` is what ``seed=replicas[r]`` gives.
            Of a `repalign.data.sources.ReplicaSources` each replica reads its own columns.
        total_steps: the number of batches; ``None`` does not end.
        rows: the rows of a global batch that are made, in this order; ``None`` is all of them (see
            `repalign.parallel.distributed.local_rows`).

    Raises:
        UserError: the batch is larger than the source, or not exactly one of ``seed`` and
            ``replicas`` is given.
        ValueError: a row that the batch does not have.
    """

    source: Source
    batch_size: int
    seed: int | None = None
    replicas: tuple[int, ...] | None = None
    total_steps: int | None = None
    rows: Int[np.ndarray, " rows"] | None = None

    def __post_init__(self) -> None:
        if (self.seed is None) == (self.replicas is None) or self.replicas == ():
            raise UserError("give either a seed or a non-empty tuple of replicas (their seeds).")
        if not 1 <= self.batch_size <= len(self.source):
            raise UserError(
                f"batch_size={self.batch_size} must be between 1 and the {len(self.source)} "
                "examples of the source."
            )
        _check_rows(self.rows, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch_size

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,) if self.replicas is None else self.replicas

    @functools.cached_property
    def _epoch_order(self) -> Callable[[int, int, int], Int[np.ndarray, " size"]]:
        # Two epochs of every replica: batches are made ahead, across the end of an epoch.
        return functools.lru_cache(maxsize=2 * len(self.seeds))(epoch_order)

    @property
    def order(self) -> State:
        return {
            "seeds": list(self.seeds),
            "batch_size": self.batch_size,
            "examples": len(self.source),
        }

    def indices(self, step: int, seed: int) -> Int[np.ndarray, " batch"]:
        """Returns the indices in the source of the ``rows`` of batch ``step``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        whole = self._epoch_order(seed, epoch, len(self.source))[start : start + self.batch_size]
        return whole if self.rows is None else whole[self.rows]

    def __len__(self) -> int:
        return sys.maxsize if self.total_steps is None else self.total_steps

    def __getitem__(self, step: int) -> Record:
        if self.replicas is None:
            return self.source.gather(self.indices(step, self.seed))
        indices = np.stack([self.indices(step, seed) for seed in self.replicas])
        if isinstance(self.source, ReplicaSources):
            return self.source.gather_each(indices)
        rows = self.source.gather(indices.ravel())
        return {name: row.reshape(*indices.shape, *row.shape[1:]) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Every example once, in order, with a boolean column ``mask`` that is False in the padding.

    All batches have the same shape: the last one, and the parts of it, are filled with copies of
    the last example, which the mask excludes.

    Attributes:
        source: where the examples come from.
        batch_size: examples per global batch.
        rows: the rows of a global batch that are made; ``None`` is all of them.

    Raises:
        UserError: the source is empty or has a column ``mask``.
        ValueError: a row that the batch does not have.
    """

    source: Source
    batch_size: int
    rows: Int[np.ndarray, " rows"] | None = None

    def __post_init__(self) -> None:
        if "mask" in self.source.columns or not len(self.source):
            raise UserError("evaluation needs a non-empty source without a column named 'mask'.")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1.")
        _check_rows(self.rows, self.batch_size)

    @property
    def order(self) -> State:
        return {"seeds": [], "batch_size": self.batch_size, "examples": len(self.source)}

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, step: int) -> Record:
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        positions = step * self.batch_size + rows
        batch = self.source.gather(np.minimum(positions, len(self.source) - 1))
        return {**batch, "mask": positions < len(self.source)}


def _check_rows(rows: Int[np.ndarray, " rows"] | None, batch_size: int) -> None:
    if rows is not None and (not len(rows) or rows.min() < 0 or rows.max() >= batch_size):
        raise ValueError(f"rows {rows} are not rows of a batch of {batch_size}.")


class Loader:
    """Iterates over batches, which grain's threads make ahead of time.

    Args:
        batches: ``TrainingBatches`` or ``EvaluationBatches``.
        threads: how many batches are made at once; 0 makes them in the calling thread.
        ahead: how many batches wait ready.
    """

    def __init__(self, batches: Batches, *, threads: int = 2, ahead: int = 4):
        self._batches = batches
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=ahead if threads else 0
        )
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Record:
        return next(self._iterator)

    def get_state(self) -> State:
        """Returns the number of batches taken, and what identifies their order."""
        return {"step": self._iterator.get_state()["next_index"], **self._batches.order}

    def set_state(self, state: State) -> None:
        """Goes to the state of another loader; the next batch is the one it would have given.

        Raises:
            UserError: the state belongs to another order (seed, batch size or number of examples).
        """
        order = {name: value for name, value in state.items() if name != "step"}
        if order != self._batches.order:
            raise UserError(
                f"the input pipeline cannot continue from {state}: this run reads in the order "
                f"{self._batches.order}. Resume with the same seed, batch size and data, or start "
                "in an empty workdir."
            )
        self._iterator.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Ends the threads; a batch in the making is finished and dropped."""
        self._iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DeviceLoader:
    """Iterates over a loader's batches as arrays on device, copied ahead of their use.

    ``get_state`` counts the batches handed out, not the ones copied ahead.

    Args:
        loader: the host batches of this process.
        sharding: where global arrays lie; ``None`` is the default device. With more processes than
            one, each gives the rows of the global batch that its own devices need.
        batch_axis: which axis of every column counts the examples (1 if replicas come first).
        ahead: how many batches are on device before they are asked for (2 is double buffering).
    """

    def __init__(
        self,
        loader: Loader,
        *,
        sharding: jax.sharding.Sharding | None = None,
        batch_axis: int = 0,
        ahead: int = 2,
    ):
        self._loader = loader
        self._sharding = sharding
        self._batch_axis = batch_axis
        self._ahead = ahead
        self._waiting: collections.deque[tuple[State, dict[str, jax.Array]]] = collections.deque()

    def _put(self, batch: Record) -> dict[str, jax.Array]:
        if self._sharding is None:
            return jax.device_put(batch)
        if jax.process_count() == 1:
            return jax.device_put(batch, self._sharding)
        batch_size = self._loader.get_state()["batch_size"]
        return {
            name: jax.make_array_from_process_local_data(
                self._sharding, column, self._global_shape(column.shape, batch_size)
            )
            for name, column in batch.items()
        }

    def _global_shape(self, local: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
        return (*local[: self._batch_axis], batch_size, *local[self._batch_axis + 1 :])

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead:
            state = self._loader.get_state()
            try:
                batch = next(self._loader)
            except StopIteration:
                return
            self._waiting.append((state, self._put(batch)))

    def __iter__(self) -> "DeviceLoader":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self._fill()
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()[1]

    def get_state(self) -> State:
        """Returns the state in which the next batch is the first one not yet handed out."""
        return self._waiting[0][0] if self._waiting else self._loader.get_state()

    def set_state(self, state: State) -> None:
        """Goes to a state; batches copied ahead are dropped. Raises as ``Loader.set_state``."""
        self._loader.set_state(state)
        self._waiting.clear()

    def close(self) -> None:
        """Ends the loader's threads and drops the batches copied ahead."""
        self._loader.close()
        self._waiting.clear()

    def __enter__(self) -> "DeviceLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
