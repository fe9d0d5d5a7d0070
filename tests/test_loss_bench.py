"""The bench of losses beside other libraries, and the committed page."""

import json
import pathlib
import sys

import numpy as np

from repalign import loss_bench

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "losses"


def committed():
    return json.loads((DOCS / "peers.json").read_text())


def test_the_committed_page_is_what_was_measured():
    assert (DOCS / "peers.md").read_text() == loss_bench.page(committed()), "run `make docs`"


def test_every_loss_and_size_was_measured_and_peers_agree():
    rows = committed()
    expected = {
        (loss, count, dim, "repalign")
        for loss in loss_bench.LOSSES
        for count in loss_bench.EXAMPLES
        for dim in loss_bench.DIMS
    }
    keys = {(row["loss"], row["examples"], row["dim"], row["library"]): row for row in rows}
    assert expected <= set(keys)
    compared = [row for row in rows if row["ratio"] is not None]
    assert {row["library"] for row in compared} >= {"torch", "lightly", "open_clip"}
    for row in compared:
        ours = keys[row["loss"], row["examples"], row["dim"], "repalign"]["value"]
        np.testing.assert_allclose(ours, row["value"], rtol=1e-4, atol=1e-4, err_msg=str(row))
    assert all((row["seconds"] is None) == (row["reason"] is not None) for row in rows)


def test_no_memory_is_quadratic_beyond_8192():
    """Four times the examples take about four times the memory, not sixteen times."""
    needed = {
        (row["loss"], row["dim"], row["examples"]): row["temp_bytes"]
        for row in committed()
        if row["library"] == "repalign" and row["loss"] != "matmul"
    }
    for loss, dim, examples in needed:
        if examples == 65536:
            assert needed[loss, dim, 65536] < 5 * needed[loss, dim, 16384], (loss, dim)


def test_bench(monkeypatch):
    monkeypatch.setattr(loss_bench, "CELL_SECONDS", 0.0)
    # This interpreter has no torch, so that only optax has a row beside ours.
    rows = list(loss_bench.run(sys.executable, examples=(8, 16), dims=(4,), losses=("nt_xent",)))
    assert [(row["examples"], row["library"]) for row in rows] == [
        (8, "repalign"),
        (8, "optax"),
        (16, "repalign"),
        (16, "optax"),
    ]
    assert all(row["seconds"] > 0 and row["calls"] for row in rows)
    np.testing.assert_allclose(rows[0]["value"], rows[1]["value"], rtol=1e-5)
    assert rows[1]["ratio"] == rows[0]["seconds"] / rows[1]["seconds"]
    monkeypatch.setattr(loss_bench, "MOST_BYTES", rows[1]["temp_bytes"])
    monkeypatch.setattr(loss_bench, "MOST_SECONDS", 0.0)
    rows = list(loss_bench.run(sys.executable, examples=(8, 16), dims=(4,), losses=("nt_xent",)))
    assert [row["seconds"] is None for row in rows] == [False, False, True, True]
    assert rows[2]["reason"].startswith("would take") and rows[3]["reason"].startswith("would need")
    page = loss_bench.page(rows)
    assert f"| 4 | 16 | – {rows[2]['reason']}; 0 MiB | – {rows[3]['reason']} |" in page
