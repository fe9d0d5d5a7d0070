"""A paper's claims as inequalities between rows, and the paired test that judges them.

The test: rows that share a seed share data order, initialisation and evaluation noise, so the
differences are taken seed by seed. Over n such differences d_1..d_n, with mean m and standard
deviation s (n - 1 in the denominator), the two-sided 95 % interval of Student's t is

    m +- t(0.975, n - 1) s / sqrt(n)

and p is the two-sided p-value of m = 0 in the same test. It assumes that the differences are
independent and roughly normal; with 3 seeds t(0.975, 2) = 4.3, so small effects stay undecided.
Claims are judged one by one: nothing is corrected for their number.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import scipy.stats

CONFIDENCE = 0.95

Outcome = Literal["holds", "does not hold", "undecided"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number of one row and seed.

    Attributes:
        value: the number or, if ``censored``, what it certainly exceeds.
        censored: the run ended before the quantity was reached.
    """

    value: float
    censored: bool = False


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences, its two-sided 95 % t interval and p-value, and n."""

    estimate: float
    interval: tuple[float, float]
    p_value: float
    n: int


def paired_difference(differences: Sequence[int | float]) -> PairedDifference:
    """The paired t test of the module's docstring.

    Differences that are all equal have an interval of width zero; p is then 0, or 1 if they are 0.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    array = np.asarray(differences, np.float64)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError(f"a paired test needs at least two finite differences, got {differences}.")
    n = array.size
    estimate = float(array.mean())
    if (array == array[0]).all():
        estimate = float(array[0])
        return PairedDifference(estimate, (estimate, estimate), float(estimate == 0.0), n)
    error = float(array.std(ddof=1)) / math.sqrt(n)
    margin = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    p_value = float(2 * scipy.stats.t.sf(abs(estimate) / error, n - 1))
    return PairedDifference(estimate, (estimate - margin, estimate + margin), p_value, n)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the paired test says about one claim.

    Attributes:
        claim: the claim that was judged.
        outcome: ``holds`` if the interval lies wholly on the claimed side of zero,
            ``does not hold`` if wholly on the other side, ``undecided`` otherwise.
        test: estimate, interval, p-value and n; None if it could not be computed.
        differences: row minus what it is compared with (the margin included), by seed.
        reason: why the claim is undecided; empty if it is not.
    """

    claim: "Claim"
    outcome: Outcome
    test: PairedDifference | None
    differences: Mapping[int, float]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """``metric`` of ``row`` is less (greater) than that of ``than_row``, or than ``than``.

    With a margin it is compared with that plus the margin: "at most one point worse than the other
    row" is ``Greater(metric, row, than_row, margin=-0.01)``.

    Attributes:
        metric: the name of a column of the table.
        row: the title of a row.
        than_row: the title of the row it is compared with.
        than: or the constant it is compared with; exactly one of the two.
        margin: added to the value of ``than_row``; 0 with ``than``.
        label: a sentence in place of the text that is made from the fields.
    """

    metric: str
    row: str
    than_row: str | None = None
    than: int | float | None = None
    margin: int | float = 0.0
    label: str = ""

    _sign: ClassVar[int]
    _symbol: ClassVar[str]

    def __post_init__(self) -> None:
        if (self.than_row is None) == (self.than is None):
            raise ValueError(f"{self.metric}: a claim needs exactly one of than_row and than.")
        if self.row == self.than_row:
            raise ValueError(f"{self.metric}: the row {self.row!r} is compared with itself.")
        if self.margin and self.than_row is None:
            raise ValueError(f"{self.metric}: a margin needs than_row; add it to than instead.")

    @property
    def rows(self) -> tuple[str, ...]:
        """The titles of the rows that the claim speaks of."""
        return (self.row,) if self.than_row is None else (self.row, self.than_row)

    def text(self) -> str:
        """The label, or e.g. ``frechet_distance: SiT + REPA < SiT``."""
        other = self.than_row if self.than_row is not None else f"{self.than:g}"
        if self.margin:
            other += f" {'+' if self.margin > 0 else '-'} {abs(self.margin):g}"
        return self.label or f"{self.metric}: {self.row} {self._symbol} {other}"

    def judge(
        self, measurements: Mapping[str, Mapping[int, Measurement]], seeds: Sequence[int]
    ) -> Verdict:
        """Tests the claim.

        Args:
            measurements: the claim's metric, by row title and seed; every row is there.
            seeds: every seed that the table asks for; the claim stays undecided while one of them
                is missing, not finite or censored in a row it speaks of, for leaving seeds out
                would bias the answer.
        """
        differences: dict[int, float] = {}
        faults: list[str] = []
        for row in self.rows:
            faults += _faults(row, measurements[row], seeds)
        for seed in seeds:
            sides = [measurements[row][seed] for row in self.rows if seed in measurements[row]]
            if len(sides) == len(self.rows) and not any(map(_unusable, sides)):
                other = sides[1].value + self.margin if self.than is None else self.than
                differences[seed] = sides[0].value - other
        if len(seeds) < 2:
            faults.append(f"{len(seeds)} seed: an interval needs at least 2")
        test = paired_difference(list(differences.values())) if len(differences) > 1 else None
        if faults or test is None:
            return Verdict(self, "undecided", test, differences, "; ".join(faults))
        low, high = sorted(self._sign * bound for bound in test.interval)
        if low > 0:
            return Verdict(self, "holds", test, differences)
        if high < 0:
            return Verdict(self, "does not hold", test, differences)
        return Verdict(self, "undecided", test, differences, "the interval contains 0")


@dataclasses.dataclass(frozen=True)
class Less(Claim):
    """The claim that ``metric`` of ``row`` is less; see Claim."""

    _sign = -1
    _symbol = "<"


@dataclasses.dataclass(frozen=True)
class Greater(Claim):
    """The claim that ``metric`` of ``row`` is greater; see Claim."""

    _sign = 1
    _symbol = ">"


def _unusable(measurement: Measurement) -> bool:
    return measurement.censored or not math.isfinite(measurement.value)


def _faults(row: str, found: Mapping[int, Measurement], seeds: Sequence[int]) -> list[str]:
    """Says which seeds of a row cannot enter the test, and why."""
    groups = {
        "missing": [seed for seed in seeds if seed not in found],
        "not finite": [
            seed for seed in seeds if seed in found and not math.isfinite(found[seed].value)
        ],
        "never reached": [seed for seed in seeds if seed in found and found[seed].censored],
    }
    return [
        f"{row}: {what} for seed {', '.join(map(str, which))}"
        for what, which in groups.items()
        if which
    ]
