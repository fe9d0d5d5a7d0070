import math

import numpy as np
import pytest

from repalign.registry import UserError
from repalign.tables.claims import Less, Measurement
from repalign.tables.table import (
    Column,
    Curve,
    Difference,
    Result,
    ShareOfGain,
    StepsToReach,
    Table,
    evaluate,
    steps_to_reach,
)


def curve(values, every=100):
    return Curve(np.arange(1, len(values) + 1) * every, np.asarray(values, float))


def result(*values):
    return Result({"fid": curve(values)}, seconds=10.0)


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [
        ([4.0, 3.0, 1.0], 2.0, 250.0),  # half of the way from step 200 to step 300
        ([4.0, 3.0, 1.0], 3.0, 200.0),
        ([4.0, 3.0, 1.0], 5.0, 100.0),
        ([4.0, 3.0, 1.0], 0.5, None),
        ([4.0, 2.0, 3.0, 1.0], 2.5, 175.0),  # the first crossing, although it is left again
        ([4.0, math.nan, 1.0], 2.0, 300.0),  # no interpolation out of a gap
        ([math.nan, math.nan, math.nan], 2.0, None),
    ],
)
def test_steps_to_reach(values, threshold, expected):
    points = curve(values)
    assert steps_to_reach(points.steps, points.values, threshold) == expected
    mirrored = steps_to_reach(points.steps, -points.values, -threshold, lower_is_better=False)
    assert mirrored == expected


def test_relative_steps_against_the_reference_of_the_same_seed():
    ratio = StepsToReach("fid", "old", relative=True)
    old, fast, slow = result(4.0, 3.0, 2.0), result(3.0, 1.0, 0.5), result(5.0, 4.0, 3.0)
    assert ratio(old, {"old": old}) == Measurement(1.0)
    assert ratio(fast, {"old": old}) == Measurement(0.5)  # 150 of 300 steps
    assert ratio(slow, {"old": old}) == Measurement(1.0, censored=True)
    assert StepsToReach("fid", "old")(slow, {"old": old}) == Measurement(300.0, censored=True)
    assert ratio(Result({}), {"old": old}) is None


def test_a_reference_that_dips_early_is_timed_by_its_own_first_crossing():
    old, new = result(4.0, 2.0, 3.0), result(4.0, 3.0, 1.0)
    ratio = StepsToReach("fid", "old", relative=True)
    assert ratio(new, {"old": old}) == Measurement(200 / 150)


def test_a_diverged_reference_gives_no_number():
    ratio = StepsToReach("fid", "old", relative=True)
    assert math.isnan(ratio(result(4.0, 3.0), {"old": result(4.0, math.nan)}).value)


def test_share_of_gain():
    share = ShareOfGain("fid", "old", "new")
    others = {"old": result(4.0, 3.0), "new": result(4.0, 1.0)}
    assert share(result(9.0, 1.5), others) == Measurement(0.75)
    assert share(others["old"], others) == Measurement(0.0)
    assert share(others["new"], others) == Measurement(1.0)
    assert share(Result({}), others) is None
    assert math.isnan(share(others["old"], {"old": others["old"], "new": others["old"]}).value)


def test_difference_from_another_row_and_from_another_metric():
    row = Result({"before": curve([0.5, 0.9]), "after": curve([0.2, 0.6])})
    other = Result({"before": curve([0.4, 0.8])})
    assert Difference("before", "old")(row, {"old": other}).value == pytest.approx(0.1)
    assert Difference("before", minus="after")(row, {}).value == pytest.approx(0.3)
    assert Difference("after", "old", "before")(row, {"old": other}).value == pytest.approx(-0.2)
    assert Difference("after", "old")(row, {"old": other}) is None
    with pytest.raises(ValueError, match="needs a reference row or a metric"):
        Difference("before", minus="before")


def test_each_row_of_a_column_can_have_a_reference_of_its_own():
    gain = Column("gain", derive={"SiT + REPA": Difference("fid", "SiT")})
    own = table(columns=("fid", gain), claims=(Less("gain", "SiT + REPA", than=0.0),))
    results = {
        "SiT": {0: result(2.0), 1: result(2.5)},
        "SiT + REPA": {0: result(1.5), 1: result(1.75)},
    }
    cells = evaluate(own, results, experiment="repa").cells
    assert cells["SiT"]["gain"] == {}
    assert cells["SiT + REPA"]["gain"] == {0: Measurement(-0.5), 1: Measurement(-0.75)}
    without = evaluate(own, {"SiT + REPA": results["SiT + REPA"]}, experiment="repa")
    assert without.cells["SiT + REPA"]["gain"] == {}


def table(**changes):
    fields = {
        "paper": 0,
        "rows": {"SiT": "baseline", "SiT + REPA": "repa"},
        "columns": (
            "fid",
            Column("speed", derive=StepsToReach("fid", "SiT", relative=True)),
        ),
        "claims": (Less("fid", "SiT + REPA", "SiT"), Less("speed", "SiT + REPA", than=1.0)),
        "reported": {"SiT": {"fid_xl2": 17.2}},
        "seeds": 2,
    }
    return Table(**(fields | changes))


def test_evaluate_fills_cells_and_judges_claims():
    results = {
        "SiT": {0: result(4.0, 3.0, 2.0), 1: result(4.0, 3.0, 2.1)},
        "SiT + REPA": {0: result(3.0, 1.0, 0.5), 1: result(3.0, 1.1, 0.61)},
    }
    evaluation = evaluate(table(), results, experiment="repa")
    assert evaluation.cells["SiT"]["fid"] == {0: Measurement(2.0), 1: Measurement(2.1)}
    assert evaluation.cells["SiT + REPA"]["speed"][0] == Measurement(0.5)
    assert [verdict.outcome for verdict in evaluation.verdicts] == ["holds", "holds"]
    assert evaluation.verdicts[0].differences == pytest.approx({0: -1.5, 1: -1.49})


def test_evaluate_leaves_gaps_where_runs_are_missing():
    evaluation = evaluate(table(), {"SiT + REPA": {0: result(1.0)}}, experiment="repa")
    assert evaluation.cells["SiT"]["fid"] == {}
    assert evaluation.cells["SiT + REPA"]["fid"] == {0: Measurement(1.0)}
    assert evaluation.cells["SiT + REPA"]["speed"] == {}  # its reference is not there
    reasons = [verdict.reason for verdict in evaluation.verdicts]
    assert reasons[0] == "SiT + REPA: missing for seed 1; SiT: missing for seed 0, 1"
    assert {verdict.outcome for verdict in evaluation.verdicts} == {"undecided"}


@pytest.mark.parametrize("arguments", [{"rows": ["SiT+REPA"]}, {"results": {"SiT+REPA": {}}}])
def test_evaluate_names_the_nearest_row(arguments):
    with pytest.raises(UserError, match="Did you mean 'SiT \\+ REPA'"):
        evaluate(table(), **({"results": {}, "experiment": "repa"} | arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claims": (Less("fdi", "SiT", "SiT + REPA"),)}, "Did you mean 'fid'"),
        ({"claims": (Less("fid", "SiT", "SiT+REPA"),)}, "Did you mean 'SiT \\+ REPA'"),
        ({"reported": {"Sit": {"fid": 1.0}}}, "Did you mean 'SiT'"),
        ({"columns": (Column("x", derive=ShareOfGain("fid", "SiT", "DiT")),)}, "column 'x'"),
        ({"columns": (Column("x", derive={"DiT": Difference("fid", "SiT")}),)}, "column 'x'"),
    ],
)
def test_a_name_that_the_table_lacks_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        table(**({"claims": ()} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "at least one row"),
        ({"columns": ()}, "at least one row and one column"),
        ({"columns": ("fid", "fid")}, "share a name"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_an_impossible_table_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**({"claims": (), "reported": {}} | changes))


def test_heading():
    assert Column("linear_probe", unit="%", better="higher").heading == "linear probe [%] ↑"
    with pytest.raises(UserError, match="Did you mean 'lower'"):
        Column("fid", better="low")
