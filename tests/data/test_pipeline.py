import json
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from repalign.data.pipeline import DeviceLoader, EvaluationBatches, Loader, TrainingBatches
from repalign.data.sources import ArraySource
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


def test_shards_are_slices_of_the_same_global_batch():
    whole = TrainingBatches(SOURCE, batch_size=6, seed=0)
    parts = [
        TrainingBatches(SOURCE, batch_size=6, seed=0, shard_index=shard, shard_count=3)
        for shard in range(3)
    ]
    for step in (0, 2, 5):
        joined = np.concatenate([part[step]["index"] for part in parts])
        np.testing.assert_array_equal(joined, whole[step]["index"])


def test_replica_sees_what_a_run_with_its_seed_sees():
    stacked = TrainingBatches(SOURCE, batch_size=4, replicas=(7, 9), shard_index=1, shard_count=2)
    batch = stacked[11]
    assert batch["image"].shape == (2, 2, 2, 2, 1)
    for row, seed in zip(batch["index"], (7, 9), strict=True):
        alone = TrainingBatches(SOURCE, batch_size=4, seed=seed, shard_index=1, shard_count=2)
        np.testing.assert_array_equal(row, alone[11]["index"])


def test_evaluation_covers_every_example_once():
    for shard_count in (1, 2):
        seen = []
        for shard in range(shard_count):
            batches = EvaluationBatches(SOURCE, 8, shard_index=shard, shard_count=shard_count)
            with Loader(batches) as loader:
                for batch in loader:
                    assert batch["index"].shape == batch["mask"].shape == (8 // shard_count,)
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
        ({"batch_size": 4, "seed": 0, "shard_count": 3}, "cannot be split over 3"),
        ({"batch_size": 4, "seed": 0, "shard_index": 2, "shard_count": 2}, "not one of 2 shards"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        TrainingBatches(SOURCE, **arguments)
