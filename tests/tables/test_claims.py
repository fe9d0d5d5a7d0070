import pytest
import scipy.stats

from repalign.tables.claims import Greater, Less, Measurement, paired_difference


def measurements(**rows):
    return {
        row: {seed: Measurement(value) for seed, value in enumerate(values)}
        for row, values in rows.items()
    }


def test_paired_difference_is_scipys_paired_t_test():
    first, second = [2.0, 2.5, 1.9, 2.2], [1.0, 1.8, 1.5, 1.1]
    ours = paired_difference([a - b for a, b in zip(first, second, strict=True)])
    reference = scipy.stats.ttest_rel(first, second)
    low, high = reference.confidence_interval(0.95)
    assert ours.estimate == pytest.approx(0.8, rel=1e-12)
    assert ours.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert ours.interval == pytest.approx((low, high), rel=1e-9)
    assert ours.n == 4


def test_interval_of_three_seeds_by_hand():
    # t(0.975, 2) = 4.302653 and the standard error of (1, 2, 3) is 1 / sqrt(3).
    assert paired_difference([1.0, 2.0, 3.0]).interval == pytest.approx(
        (-0.484138, 4.484138), rel=1e-6
    )


@pytest.mark.parametrize(("value", "p_value"), [(0.25, 0.0), (0.0, 1.0)])
def test_equal_differences_have_an_interval_of_width_zero(value, p_value):
    test = paired_difference([value] * 3)
    assert test.interval == (value, value)
    assert test.p_value == p_value


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_paired_difference_refuses_what_it_cannot_test(differences):
    with pytest.raises(ValueError, match="at least two finite"):
        paired_difference(differences)


@pytest.mark.parametrize(
    ("claim", "outcome"),
    [
        (Less("loss", "new", "old"), "holds"),
        (Greater("loss", "old", "new"), "holds"),
        (Greater("loss", "new", "old"), "does not hold"),
        (Less("loss", "old", "new"), "does not hold"),
        (Less("loss", "new", "noisy"), "undecided"),
        (Less("loss", "new", than=1.5), "holds"),
        (Greater("loss", "new", than=1.5), "does not hold"),
        (Less("loss", "new", than=1.0), "undecided"),
        (Less("loss", "old", "new", margin=1.2), "holds"),
        (Less("loss", "new", "old", margin=-1.2), "does not hold"),
        (Greater("loss", "new", "old", margin=-1.2), "holds"),
        (Greater("loss", "new", "old", margin=-1.03), "undecided"),
    ],
)
def test_verdict(claim, outcome):
    found = measurements(old=[2.0, 2.1, 2.2], new=[1.0, 1.05, 1.15], noisy=[0.0, 5.0, 0.5])
    verdict = claim.judge(found, (0, 1, 2))
    assert verdict.outcome == outcome
    assert verdict.reason == ("the interval contains 0" if outcome == "undecided" else "")
    assert verdict.test is not None
    assert sum(verdict.differences.values()) / 3 == pytest.approx(verdict.test.estimate)


def test_pairing_decides_what_an_unpaired_test_would_not():
    old, new = [1.0, 5.0, 9.0], [0.9, 4.88, 8.89]
    verdict = Less("loss", "new", "old").judge(measurements(old=old, new=new), (0, 1, 2))
    assert verdict.outcome == "holds"
    assert scipy.stats.ttest_ind(old, new).pvalue > 0.9


def test_seeds_are_paired_by_number_not_by_order():
    found = measurements(old=[1.0, 2.0, 3.0], new=[0.0, 1.0, 2.0])
    found["new"] = dict(reversed(found["new"].items()))
    verdict = Less("loss", "new", "old").judge(found, (0, 1, 2))
    assert verdict.differences == {0: -1.0, 1: -1.0, 2: -1.0}


def test_a_missing_seed_leaves_a_clear_difference_undecided():
    found = measurements(old=[2.0, 2.1, 2.2], new=[1.0, 1.05])
    verdict = Less("loss", "new", "old").judge(found, (0, 1, 2))
    assert verdict.outcome == "undecided"
    assert verdict.reason == "new: missing for seed 2"
    assert verdict.test is not None and verdict.test.n == 2


def test_one_seed_is_undecided():
    verdict = Less("loss", "new", "old").judge(measurements(old=[2.0], new=[1.0]), (0,))
    assert (verdict.outcome, verdict.test) == ("undecided", None)
    assert "at least 2" in verdict.reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Measurement(float("nan")), "new: not finite for seed 1"),
        (Measurement(9.0, censored=True), "new: never reached for seed 1"),
    ],
)
def test_a_value_that_cannot_enter_the_test_is_undecided(bad, reason):
    found = measurements(old=[2.0, 2.1, 2.2], new=[1.0, 1.05, 1.15])
    found["new"][1] = bad
    verdict = Less("loss", "new", "old").judge(found, (0, 1, 2))
    assert (verdict.outcome, verdict.reason) == ("undecided", reason)
    assert set(verdict.differences) == {0, 2}


def test_text_is_made_from_the_fields_or_given():
    assert Less("fid", "A", "B").text() == "fid: A < B"
    assert Greater("fid", "A", than=0.5).text() == "fid: A > 0.5"
    assert Greater("fid", "A", "B", margin=-0.01).text() == "fid: A > B - 0.01"
    assert Less("fid", "A", "B", margin=2).text() == "fid: A < B + 2"
    assert Greater("fid", "A", than=0.5, label="A is large").text() == "A is large"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"than_row": "B", "than": 1.0}, {"than_row": "A"}, {"than": 1.0, "margin": 0.1}],
)
def test_a_claim_compares_with_exactly_one_other_thing(arguments):
    with pytest.raises(ValueError, match="fid"):
        Less("fid", "A", **arguments)
