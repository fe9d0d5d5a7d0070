import json
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from repalign.data.pipeline import DeviceLoader, EvaluationBatches, Loader, TrainingBatches
from repalign.data.sources import ArraySource, ReplicaSources
from repalign.registry import UserError

SOURCE = ArraySource({"index": np.arange(23, dtype=np.int32), "image": np.ones((23, 2, 2, 1))})


def take(loader, count):
    return [next(loader)["index"] for _ in range(count)]


def test_epochs_are_different_permutations():
    batches = TrainingBatches(SOURCE, batch_size=5, seed=3)
    assert batches.steps_per_epoch == 4
    epochs = [np.concatenate([batches[4 * e + i]["index"] for i in range(4)]) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 20
    assert (epochs[0] != epochs[1]).any()


def test_order_depends_on_nothing_but_seed_and_step():
    batches = TrainingBatches(SOURCE, batch_size=5, seed=3)
    expected = [batches[step]["index"] for step in range(40)]
    for threads in (0, 3):
        with Loader(batches, threads=threads) as loader:
            np.testing.assert_array_equal(take(loader, 40), expected)
    assert (TrainingBatches(SOURCE, batch_size=5, seed=4)[0]["index"] != expected[0]).any()


@pytest.mark.parametrize("step", [0, 3, 4, 17])
def test_resume_is_exact_at_any_step(step):
    batches = TrainingBatches(SOURCE, batch_size=5, seed=3)
    with Loader(batches) as first:
        take(first, step)
        state = json.loads(json.dumps(first.get_state()))
        expected = take(first, 9)
    with Loader(batches) as second:
        take(second, 2)
        second.set_state(state)
        np.testing.assert_array_equal(take(second, 9), expected)


def test_resume_in_another_order_is_refused():
    with Loader(TrainingBatches(SOURCE, batch_size=5, seed=3)) as first:
        state = first.get_state()
    refused = pytest.raises(UserError, match="same seed, batch size and data")
    with Loader(TrainingBatches(SOURCE, batch_size=4, seed=3)) as second, refused:
        second.set_state(state)


def test_rows_are_rows_of_the_same_global_batch():
    whole = TrainingBatches(SOURCE, batch_size=6, seed=0)
    for rows in ([0, 1], [2, 3, 4, 5], [0, 1, 4, 5], [5]):
        part = TrainingBatches(SOURCE, batch_size=6, seed=0, rows=np.array(rows))
        assert part.order == whole.order
        for step in (0, 2, 5):
            np.testing.assert_array_equal(part[step]["index"], whole[step]["index"][rows])


def test_replica_sees_what_a_run_with_its_seed_sees():
    rows = np.array([2, 3])
    stacked = TrainingBatches(SOURCE, batch_size=4, replicas=(7, 9), rows=rows)
    batch = stacked[11]
    assert batch["image"].shape == (2, 2, 2, 2, 1)
    for row, seed in zip(batch["index"], (7, 9), strict=True):
        alone = TrainingBatches(SOURCE, batch_size=4, seed=seed, rows=rows)
        np.testing.assert_array_equal(row, alone[11]["index"])


def test_evaluation_covers_every_example_once():
    for parts in ([None], [np.arange(3), np.arange(3, 8)]):
        seen = []
        for rows in parts:
            batches = EvaluationBatches(SOURCE, 8, rows=rows)
            size = 8 if rows is None else len(rows)
            with Loader(batches) as loader:
                for batch in loader:
                    assert batch["index"].shape == batch["mask"].shape == (size,)
                    seen += batch["index"][batch["mask"]].tolist()
        assert sorted(seen) == list(range(23))


def test_device_loader_state_does_not_count_batches_ahead():
    batches = TrainingBatches(SOURCE, batch_size=5, seed=1, total_steps=6)
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data"))
    with DeviceLoader(Loader(batches), sharding=sharding) as loader:
        np.testing.assert_array_equal(take(loader, 2), [batches[0]["index"], batches[1]["index"]])
        state = loader.get_state()
        assert state["step"] == 2
        rest = list(loader)
        assert len(rest) == 4
        assert isinstance(rest[0]["image"], jax.Array) and rest[0]["image"].sharding == sharding
        assert loader.get_state()["step"] == 6
    with DeviceLoader(Loader(batches)) as again:
        next(again)
        again.set_state(state)
        np.testing.assert_array_equal(next(again)["index"], rest[0]["index"])


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    loader = Loader(TrainingBatches(SOURCE, batch_size=5, seed=1))
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_next_costs_little():
    images = np.zeros((2000, 28, 28, 1), np.uint8)
    batches = TrainingBatches(ArraySource({"image": images}), batch_size=192, seed=0)
    with Loader(batches) as loader:
        seconds = []
        for _ in range(50):
            start = time.perf_counter()
            next(loader)
            seconds.append(time.perf_counter() - start)
            time.sleep(0.002)
    # 0.05 ms on two idle cores; the bound leaves room for a busy machine.
    assert np.median(seconds) < 3e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 24, "seed": 0}, "between 1 and the 23"),
        ({"batch_size": 4}, "either a seed or"),
        ({"batch_size": 4, "seed": 0, "replicas": (1,)}, "either a seed or"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        TrainingBatches(SOURCE, **arguments)


@pytest.mark.parametrize("rows", [[], [4], [-1, 0]])
def test_rows_that_the_batch_does_not_have_are_refused(rows):
    with pytest.raises(ValueError, match="are not rows of a batch of 4"):
        TrainingBatches(SOURCE, batch_size=4, seed=0, rows=np.array(rows, int))


def test_replicas_read_columns_of_their_own_in_their_own_order():
    own = [{"old/value": np.arange(23) + 100 * replica} for replica in (1, 2)]
    source = ReplicaSources(SOURCE, own)
    batch = TrainingBatches(source, batch_size=5, replicas=(3, 8))[6]
    assert {name: column.shape[:2] for name, column in batch.items()} == dict.fromkeys(
        source.columns, (2, 5)
    )
    for replica, seed in enumerate((3, 8)):
        alone = TrainingBatches(SOURCE.with_columns(**own[replica]), batch_size=5, seed=seed)[6]
        np.testing.assert_array_equal(batch["index"][replica], alone["index"])
        np.testing.assert_array_equal(batch["old/value"][replica], alone["old/value"])
    assert set(source.gather(np.array([4, 0]))) == set(SOURCE.columns)  # What all have in common.
    assert len(source) == 23 and set(source[2]) == set(SOURCE.columns)
    with pytest.raises(ValueError, match="replicas need equal columns"):
        ReplicaSources(SOURCE, [own[0], {"old/value": np.zeros((23, 2))}])
