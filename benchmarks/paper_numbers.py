"""Figures of docs/paper.md: each is a mean over the repeats of cells of a sweep, or a ratio of two such, and is kept.

What is shown is kept with the cells that it came from, so that a test can look for it in the tables again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from analysis.paired import over_repeats
from analysis.sweep import INVALID, SOUND, SweepTable, half_interval

NONE = "–"  # noqa: RUF001 - a dash that stands for no figure
SCOPES = ("gpu", "node")


@dataclass(frozen=True)
class Cells:
    """The repeats of one setting, of one figure: cells of the sweep's table of `scope`."""

    sweep: str
    scope: str
    column: str
    names: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the repeats."""
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class Number:
    """A mean over repeats, or how many times that of `to` it is (of repeats the geometric mean), and its interval."""

    value: float
    low: float | None  # 95 % by Student's t over repeats; None with one
    high: float | None
    of: Cells
    to: Cells | None = None


@dataclass(frozen=True)
class Shown:
    """A figure as the page has it."""

    text: str
    number: Number


@dataclass
class Book:
    """The tables of all sweeps, by name and scope, and every figure that was shown of them."""

    tables: Mapping[tuple[str, str], SweepTable]
    shown: list[Shown] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)

    def number(self, sweep: str, column: str, scope: str = "gpu", **setting: float | None) -> Number | None:
        """The mean of `column` over the repeats of `setting`; None where one is saturated, failed or not there."""
        if (table := self.tables.get((sweep, scope))) is None:
            return None
        rows = table.cells.filter(pl.col(name) == value for name, value in setting.items())
        kept = rows.filter(pl.col("standing").is_in([SOUND, INVALID])).drop_nulls(column)
        if kept.is_empty() or kept.height < rows.height:
            return None
        of = Cells(sweep, scope, column, tuple(kept["cell"]), tuple(map(float, kept[column])))
        half = half_interval(of.values)
        return Number(of.mean, None if half is None else of.mean - half, None if half is None else of.mean + half, of)

    def show(self, number: Number | None, form: str = "{:,.0f}", interval: bool = False) -> str:
        """`number` by `form`, with half its interval where asked and known; a dash for None."""
        if number is None:
            return NONE
        text = form.format(number.value)
        if interval and number.low is not None and number.high is not None:
            text += f" ±{form.format((number.high - number.low) / 2)}"
        self.shown.append(Shown(text, number))
        return text

    def change(self, number: Number | None, interval: bool = False) -> str:
        """A ratio as a change in %, with its interval where asked and known."""
        if number is None:
            return NONE
        text = f"{number.value - 1:+.1%}"
        if interval and number.low is not None and number.high is not None:
            text += f" ({number.low - 1:+.1%} to {number.high - 1:+.1%})"
        self.shown.append(Shown(text, number))
        return text

    def count(self, true: int, of: int) -> str:
        """So many of so many."""
        self.counts.append(f"{true} of {of}")
        return self.counts[-1]


def ratio(of: Number | None, to: Number | None) -> Number | None:
    """How many times `to` the figure `of` is, in pairs of the same repeat; None where one of them is."""
    if of is None or to is None:
        return None
    if len(of.of.values) > 1 and len(of.of.values) == len(to.of.values):
        apart = over_repeats(to.of.values, of.of.values)
        low, high = (None if end is None else 1 + end / 100 for end in (apart.low_percent, apart.high_percent))
        return Number(1 + apart.percent / 100, low, high, of.of, to.of)
    return Number(of.value / to.value, None, None, of.of, to.of)
