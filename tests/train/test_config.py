import json

import pytest
import tiny_experiment
from ml_collections import ConfigDict

from repalign.registry import UserError
from repalign.train import config as configs
from repalign.train.experiment import assemble

FILE = tiny_experiment.__file__


def fast(*overrides):
    config = configs.load_config(f"{FILE}:fast")
    return configs.override(config, [f"--config.{one}" for one in overrides])


def test_a_config_becomes_dataclasses_with_defaults():
    config = configs.parse(tiny_experiment.get_config("fast"))
    assert config.optimizer.learning_rate == 0.03 and config.optimizer.name == "adamw"
    assert (config.data.batch_size, config.evaluation.every, config.mesh.data) == (16, 2, -1)
    assert (config.replicas, config.checkpoint_every, config.seeds) == (1, 0, (0,))
    assert configs.parse(fast("seed=3", "replicas=2")).seeds == (3, 4)


@pytest.mark.parametrize(
    ("duration", "examples", "steps"),
    [
        ({"total_steps": 7}, None, 7),
        ({"total_epochs": 1.5}, 64, 6),
        ({"total_epochs": 0.01}, 64, 1),
        ({"total_examples": 100}, None, 6),
    ],
)
def test_the_number_of_steps(duration, examples, steps):
    raw = tiny_experiment.get_config("fast").unlock()
    del raw.total_steps
    raw.update(duration)
    assert configs.parse(raw).steps(examples) == steps


def test_epochs_need_a_data_set_of_known_size():
    raw = tiny_experiment.get_config("fast").unlock()
    del raw.total_steps
    raw.total_epochs = 2.0
    with pytest.raises(UserError, match="total_epochs needs a data set that knows its size"):
        configs.parse(raw).steps(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, r"config\.modle: no such key\. Did you mean 'model'"),
        ({"data": {"batchsize": 3}}, r"config\.data\.batchsize: .*'batch_size'"),
        ({"optimizer": {"learning_rte": 3}}, r"config\.optimizer\.learning_rte"),
        ({"total_epochs": 1.0}, "give exactly one of total_steps, total_epochs"),
        ({"replicas": 0}, "replicas and log_every must be positive"),
        ({"log_every": 0}, "replicas and log_every must be positive"),
        ({"data": {"batch_size": 0}}, "data.batch_size must be positive, not 0"),
        ({"mesh": {"fsdp": 0}}, "mesh sizes must be positive"),
    ],
)
def test_mistakes_in_a_config_name_the_place(change, message):
    raw = tiny_experiment.get_config("fast").unlock()
    raw.update(ConfigDict(change))
    with pytest.raises(UserError, match=message):
        configs.parse(raw)


def test_a_missing_section_is_named():
    raw = tiny_experiment.get_config("fast").unlock()
    del raw["forward"]
    with pytest.raises(UserError, match="config: missing forward"):
        configs.parse(raw)


def test_overrides_change_a_copy_also_of_fields_that_were_not_written_out():
    original = configs.load_config(f"{FILE}:fast")
    changed = configs.override(
        original,
        [
            "--config.optimizer.weight_decay=0.5",
            "--config.model.widths=(4,)",
            "--config.mesh.data=1",
        ],
    )
    assert changed.optimizer.weight_decay == 0.5 and changed.model.widths == (4,)
    assert changed.mesh.data == 1
    assert "mesh" not in original and original.model.widths == (8,)


def test_a_duration_can_be_exchanged_for_another():
    config = configs.parse(fast("total_steps=None", "total_epochs=2.0"))
    assert config.steps(64) == 8
    with pytest.raises(UserError, match="give exactly one of total_steps, total_epochs"):
        configs.parse(fast("total_epochs=2.0"))
    with pytest.raises(UserError, match="give exactly one of total_steps, total_epochs"):
        configs.parse(fast("total_steps=None"))


def test_numbers_that_may_be_none_can_be_set_and_unset():
    assert fast("optimizer.clip_norm=1").optimizer.clip_norm == 1.0
    config = configs.load_config(f"{FILE}:averaged")
    config = configs.override(config, ["--config.optimizer.average_decay=None"])
    assert configs.parse(config).optimizer.average_decay is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=3", r"config\.model has no key 'width'\. Did you mean 'widths'"),
        ("optimiser.b1=0.5", r"config has no key 'optimiser'\. Did you mean 'optimizer'"),
        ("seed.low=3", r"config\.seed has no key 'low'"),
        ("total_steps=many", "total_steps=many"),
        ("optimizer.learning_rate=fast", "learning_rate=fast"),
        ("data.batch_size=1.5", r"batch_size=1\.5"),
    ],
)
def test_mistakes_in_overrides_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        fast(override)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"depth": 3}, r"config\.model\.depth: no such key"),
        ("forward", {"clases": 3}, r"config\.forward\.clases: .*'classes'"),
        ("model", {"name": "models.convnet.ConvNetz"}, "Did you mean 'ConvNet'"),
        ("model", {"blocks": "1"}, r"config\.model\.blocks must be of type int, not '1'"),
        ("objective", {"cross_entropy": {"tau": 1.0}}, r"objective\.cross_entropy\.tau: no"),
        ("data", {"source": {"exampels": 3}}, r"config\.data\.source\.exampels: .*'examples'"),
        (
            "data",
            {"columns": {"x/y": {"name": "tiny_experiment:random_tokens", "tokns": 2}}},
            r"config\.data\.columns\.x/y\.tokns: .*'tokens'",
        ),
        (
            "evaluation",
            {"metrics": {"source": {"classes": 3}}},
            r"config\.evaluation\.metrics\.source\.classes: no such key",
        ),
    ],
)
def test_assembling_checks_every_section_before_anything_runs(section, change, message):
    raw = configs.complete(tiny_experiment.get_config("fast")).unlock()
    raw[section].update(ConfigDict(change))
    with pytest.raises(UserError, match=message):
        assemble(raw)


def test_a_source_without_a_name_is_an_error():
    raw = tiny_experiment.get_config("fast").unlock()
    raw.data.source = ConfigDict({"examples": 3})
    with pytest.raises(UserError, match=r"config\.data\.source: missing the key 'name'"):
        assemble(raw)


def test_experiments_are_found_by_key_or_path():
    assert configs.experiment_path(FILE).name == "tiny_experiment.py"
    assert configs.experiment_path("repa").name == "repa.py"
    assert configs.load_experiment("repa") is configs.load_experiment("repa")
    with pytest.raises(UserError, match="unknown experiment 'rpea'. Did you mean 'repa'"):
        configs.load_config("rpea:baseline")
    with pytest.raises(UserError, match="there is no experiment file 'gone.py'"):
        configs.load_config("gone.py")
    with pytest.raises(UserError, match="variant of tiny_experiment 'fst'. Did you mean 'fast'"):
        configs.load_config(f"{FILE}:fst")


def test_an_experiment_file_that_fails_is_not_half_imported(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('broken on purpose')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            configs.load_experiment(str(path))


def test_the_digest_is_that_of_the_content():
    one, other = fast("seed=1"), fast("seed=2")
    assert configs.digest(one) == configs.digest(fast("seed=1")) != configs.digest(other)
    assert json.loads(configs.as_json(one))["model"]["widths"] == [8]
