"""Plans compiled for TPUs that are not here. Needs libtpu: the level ``.ci/aot`` installs it.

Without libtpu none of these can run; then this file holds one other test, of the refusal, whose
name says so in every report.
"""

import importlib.util
import json
import pathlib

import pytest

from repalign import cli
from repalign.train.plan import Request, plan

TINY = """
import tiny_experiment


def get_config():
    config = tiny_experiment.aligned_flow()
    config.data.batch_size = 64
    config.mesh = {"rules": {"smallest": 1}}
    config.model.update(width=256, depth=6, scan=True, taps=(2,))
    config.objective.repa.student = "sit/block_2"
    config.data.spec = {
        "image": ((8, 8, 1), "uint8"),
        "label": ((), "int32"),
        "teacher/patches": ((4, 6), "float32"),
    }
    return config.lock()
"""


if importlib.util.find_spec("libtpu") is None:

    def test_left_out_because_libtpu_is_not_installed(capsys):
        arguments = ["plan", "--config=repa:imagenet256_b2", "--topology=v5e:4x4"]
        assert cli.main(arguments) == 2
        assert "needs libtpu, which is not installed: pip install" in capsys.readouterr().err

else:

    @pytest.fixture
    def tiny(tmp_path, monkeypatch):
        # The compiling process has to find `tiny_experiment`, as pytest does.
        monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[1]))
        path = tmp_path / "tiny_plan.py"
        path.write_text(TINY)
        return str(path)

    def test_a_step_on_four_chips(tiny):
        whole = plan(Request(tiny, "v5e:2x2"))
        assert (whole["chips"], whole["mesh"]["data"]) == (4, 4)
        memory = whole["memory"]
        # The state is donated: it is written over the arguments, to the last few bytes.
        assert memory["aliased"] > 0.98 * memory["outputs"]
        assert memory["total"] < memory["capacity"] == 15.75 * 2**30
        # Loops are counted: all products of the model are there, and little else.
        model = whole["flops"]["model"] * whole["batch_size"] / whole["devices"]
        assert 0.95 * model < whole["flops"]["compiled"] < 1.3 * model
        assert whole["notes"] == []
        # Gradients are summed once, in float32, over data.
        rows = {(row["kind"], row["axes"]): row for row in whole["collectives"]}
        assert set(rows) == {("all-reduce", "data")}
        assert rows["all-reduce", "data"]["bytes"] == pytest.approx(
            4 * whole["parameters"], rel=0.01
        )
        assert 0 < whole["seconds"]["bound"] <= whole["seconds"]["serial"] < 1

        split = plan(Request(tiny, "v5e:2x2", ("--config.mesh.fsdp=4",)))
        assert split["memory"]["arguments"] < 0.4 * memory["arguments"]
        assert split["flops"]["compiled"] == pytest.approx(whole["flops"]["compiled"], rel=0.1)
        assert "fsdp" in {row["axes"] for row in split["collectives"]}

    def test_the_command_searches(tiny, capsys):
        arguments = ["plan", f"--config={tiny}", "--topology=v5e:2x2", "--search", "--format=json"]
        assert cli.main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert 2 <= len(found["plans"]) + len(found["failed"]) <= 3
        times = [one["seconds"]["serial"] for one in found["plans"]]
        assert found["best"] == found["plans"][0] and times == sorted(times)
        assert "shortest step without overlap" in found["reason"]

    def test_a_step_that_does_not_fit(capsys):
        arguments = ["plan", "--config=repa:imagenet256_xl2", "--topology=v5e:2x2"]
        assert cli.main([*arguments, "--config.model.remat=everything_saveable"]) == 2
        said = capsys.readouterr().err
        assert "does not fit into v5e:2x2 on mesh data=4" in said
        assert "GiB too much" in said
        assert "What should fit, by estimate: --" in said
