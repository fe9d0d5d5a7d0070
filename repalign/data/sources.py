"""Sources: random-access collections of examples, read one record or many at a time.

A source has ``columns`` (name -> shape and dtype of one example), ``len(source)``,
``source[i] -> record`` and ``source.gather(indices) -> columns`` with a leading axis; everything
after a source (repalign.data.pipeline) only ever calls ``gather``.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from repalign.registry import UserError, nearest

Record = dict[str, np.ndarray]
Indices = Int[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True)
class Column:
    """The shape and dtype that one example has in a column."""

    shape: tuple[int, ...]
    dtype: np.dtype


@runtime_checkable
class Source(Protocol):
    """What the pipeline asks of a collection of examples."""

    @property
    def columns(self) -> Mapping[str, Column]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def gather(self, indices: Indices) -> Record: ...


class ArraySource:
    """A source whose columns are arrays in memory (or memory-mapped), one row per example.

    Args:
        arrays: the columns; all have the same leading size.

    Raises:
        ValueError: no columns, or leading sizes differ.
    """

    def __init__(self, arrays: Mapping[str, Shaped[np.ndarray, "_ ..."]]):
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"a source needs columns of one length; it was given {sizes}.")
        self.arrays = dict(arrays)
        self._size = next(iter(sizes.values()))

    @property
    def columns(self) -> dict[str, Column]:
        return {name: Column(a.shape[1:], a.dtype) for name, a in self.arrays.items()}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        return {name: np.asarray(array[index]) for name, array in self.arrays.items()}

    def gather(self, indices: Indices) -> Record:
        """Returns copies of the rows ``indices`` (in that order, repeats allowed)."""
        return {name: np.take(array, indices, axis=0) for name, array in self.arrays.items()}

    def with_columns(self, **arrays: Shaped[np.ndarray, "_ ..."]) -> "ArraySource":
        """Returns a source that has ``arrays`` as well, e.g. teacher tokens computed once.

        A column of the same name is replaced; nothing is copied.
        """
        return ArraySource({**self.arrays, **arrays})

    def select(self, indices: Indices | slice) -> "ArraySource":
        """Returns the source of the rows ``indices``; a slice shares memory."""
        return ArraySource({name: array[indices] for name, array in self.arrays.items()})


class ReplicaSources:
    """The same examples for every replica of a run, with columns that differ between replicas.

    Such columns come from what each seed trained before: its own old model, its own teacher.

    Args:
        shared: the columns that all replicas have in common.
        own: for each replica, in order, the columns of its own; the same names and shapes in all.

    Raises:
        ValueError: no replicas, or their columns differ in names, shapes or dtypes.
    """

    def __init__(
        self, shared: ArraySource, own: Sequence[Mapping[str, Shaped[np.ndarray, "_ ..."]]]
    ):
        self.shared = shared
        self.replicas = tuple(shared.with_columns(**columns) for columns in own)
        described = [replica.columns for replica in self.replicas]
        if not described or any(one != described[0] for one in described):
            raise ValueError(f"replicas need equal columns; they were given {described}.")

    @property
    def columns(self) -> dict[str, Column]:
        return self.replicas[0].columns

    def __len__(self) -> int:
        return len(self.shared)

    def __getitem__(self, index: int) -> Record:
        return self.shared[index]

    def gather(self, indices: Indices) -> Record:
        """Returns the rows ``indices`` of the shared columns."""
        return self.shared.gather(indices)

    def gather_each(self, indices: Int[np.ndarray, "replicas batch"]) -> Record:
        """Returns every column [replicas, batch, ...]: of replica r its rows ``indices[r]``."""
        rows = [replica.gather(own) for replica, own in zip(self.replicas, indices, strict=True)]
        return {name: np.stack([row[name] for row in rows]) for name in self.columns}


class TfdsSource:
    """A prepared TensorFlow Datasets data set, read without TensorFlow (ArrayRecord files).

    Args:
        name: the data set, e.g. ``"cifar10"`` or ``"imagenet2012:5.1.0"``.
        split: e.g. ``"train"`` or ``"train[:90%]"``.
        keys: the features to keep; features that no array can hold (text, ragged) must be left out
            or handled by ``transform``.
        data_dir: where the data set was prepared; ``None`` is TFDS's own default.
        transform: host function from record to record, called for every example. It must give
            every example the same shapes (crop or resize ImageNet's images here).

    Raises:
        UserError: the data set is unknown or not prepared in ``data_dir``, or it has no such key.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        keys: tuple[str, ...] = ("image", "label"),
        data_dir: str | pathlib.Path | None = None,
        transform: Callable[[Record], Record] | None = None,
    ):
        self.name, self.split, self.keys = name, split, keys
        self._transform = transform
        self._records = _open_tfds(name, split, data_dir)
        features = self._records.dataset_info.features
        for key in keys:
            if key not in features:
                raise UserError(
                    f"data set {name!r} has no feature {key!r}. {nearest(key, features)}"
                )
        self._columns = {k: Column(v.shape, v.dtype) for k, v in self[0].items()}

    @property
    def columns(self) -> dict[str, Column]:
        return dict(self._columns)

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, raw: Mapping[str, Any]) -> Record:
        record = {key: np.asarray(raw[key]) for key in self.keys}
        if self._transform is not None:
            record = {k: np.asarray(v) for k, v in self._transform(record).items()}
        return {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in record.items()}

    def __getitem__(self, index: int) -> Record:
        return self._record(self._records[index])

    def gather(self, indices: Indices) -> Record:
        """Reads and stacks the records ``indices``.

        Raises:
            UserError: shapes differ between examples; the text names ``transform``.
        """
        records = [self._record(raw) for raw in self._records.__getitems__(indices.tolist())]
        try:
            return {name: np.stack([r[name] for r in records]) for name in self._columns}
        except ValueError as error:
            raise UserError(
                f"examples of {self.name!r} ({self.split}) differ in shape and cannot be batched; "
                "give TfdsSource a transform that crops or resizes every image to one size."
            ) from error


def tfds_source(
    dataset: str,
    split: str = "train",
    *,
    keys: Sequence[str] = ("image", "label"),
    data_dir: str = "",
) -> TfdsSource:
    """Returns a `TfdsSource`, from a config: there ``name`` is the function's own.

    An empty ``data_dir`` is TFDS's default.

    Raises:
        UserError: see `TfdsSource`.
    """
    return TfdsSource(dataset, split, keys=tuple(keys), data_dir=data_dir or None)


def _open_tfds(name: str, split: str, data_dir: str | pathlib.Path | None) -> Any:
    """Opens a prepared data set; every failure becomes a UserError with the fix."""
    # Imported here: TFDS takes seconds to import and most runs never read it.
    import tensorflow_datasets as tfds

    place = str(data_dir) if data_dir is not None else str(tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"data set {name!r}: TFDS has no data set of this name, and none is prepared in "
            f"{place}. Prepare it as array_record files and give the directory that holds the "
            f"folder {name.partition(':')[0]} as data_dir."
        ) from error
    if not builder.info.splits or not builder.info.file_format:
        prepared = False
    else:
        prepared = pathlib.Path(builder.data_dir).is_dir()
    if not prepared:
        raise UserError(
            f"data set {name!r} is not prepared in {place}. Prepare it once, where TensorFlow and "
            f"the network are at hand: tfds build {name} --data_dir {place} "
            "--file_format array_record"
        )
    try:
        return builder.as_data_source(split=split)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"data set {name!r}, split {split!r}: {error}") from error
