"""Rates that change with time: steps, ramps, daily and weekly profiles, curves from a file or from another trace.

A rate is linear between knots and may jump at them. Its integral is then exact, and so is the inverse of that, which
places the points of a process of unit rate on the clock (time rescaling, Brown et al., Neural Computation 14, 2002).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S, parse_duration_ns
from tracegen.errors import TraceError

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
HOUR_S, DAY_S, WEEK_S = 3600.0, 86400.0, 604800.0


@dataclass(frozen=True)
class RatePath:
    """A rate on [at_s[0], at_s[-1]]: m pieces, from `start_rps` to `end_rps` between neighbours of the m + 1 `at_s`."""

    at_s: Floats
    start_rps: Floats
    end_rps: Floats

    @cached_property
    def expected(self) -> Floats:
        """Requests expected up to each knot, m + 1 values from 0 on."""
        expected: Floats = np.zeros(self.at_s.size)
        expected[1:] = np.cumsum((self.start_rps + self.end_rps) / 2 * np.diff(self.at_s))
        return expected

    def times_s(self, expected: Floats) -> Floats:
        """When so many requests are `expected`, each in [0, self.expected[-1]); ascending, as they are."""
        if self.start_rps.size == 1 and self.start_rps[0] == self.end_rps[0]:
            times_s: Floats = self.at_s[0] + expected / self.start_rps[0]
            return times_s
        piece = np.searchsorted(self.expected, expected, side="right") - 1
        slope = (self.end_rps - self.start_rps) / np.diff(self.at_s)
        ahead, start = expected - self.expected[piece], self.start_rps[piece]
        # The root of start·t + slope·t²/2 = ahead in the form that loses no digits.
        below = start + np.sqrt(np.maximum(start * start + 2 * slope[piece] * ahead, 0))
        later = np.divide(2 * ahead, below, out=np.zeros_like(ahead), where=below > 0)
        return np.minimum(self.at_s[piece] + later, self.at_s[piece + 1])

    def cut(self, start_s: float, end_s: float) -> "RatePath":
        """The part from `start_s` to `end_s`, moved to begin at 0; beyond its ends the rate stays what it is there."""
        inner = self.at_s[(self.at_s > start_s) & (self.at_s < end_s)]
        return self.on(np.concatenate(([start_s], inner, [end_s])), start_s)

    def times(self, other: "RatePath") -> "RatePath":
        """The product of two rates on the same stretch; where both change it is linear between all their knots."""
        if self.at_s.size == 2 and self.start_rps[0] == self.end_rps[0]:  # the common case, one constant
            return RatePath(other.at_s, other.start_rps * self.start_rps[0], other.end_rps * self.start_rps[0])
        knots = np.union1d(self.at_s, other.at_s)
        a, b = self.on(knots, 0.0), other.on(knots, 0.0)
        return RatePath(knots, a.start_rps * b.start_rps, a.end_rps * b.end_rps)

    def on(self, knots: Floats, origin_s: float) -> "RatePath":
        """The same rate with pieces between `knots`, which hold all of its own there, on a clock from `origin_s`."""
        middle = (knots[:-1] + knots[1:]) / 2
        piece = np.clip(np.searchsorted(self.at_s, middle, side="right") - 1, 0, self.start_rps.size - 1)
        first, last = self.at_s[piece], self.at_s[piece + 1]
        slope = (self.end_rps[piece] - self.start_rps[piece]) / (last - first)
        rates = [self.start_rps[piece] + slope * (np.clip(at, first, last) - first) for at in (knots[:-1], knots[1:])]
        return RatePath(knots - origin_s, rates[0], rates[1])

    @property
    def mean_rps(self) -> float:
        """The mean over the whole stretch."""
        return float(self.expected[-1] / (self.at_s[-1] - self.at_s[0]))

    @property
    def peak_rps(self) -> float:
        """The highest rate."""
        return float(max(self.start_rps.max(), self.end_rps.max()))


def steps_path(rates: Floats, at_s: Floats) -> RatePath:
    """`rates` (m), each held from one of `at_s` (m + 1) to the next."""
    return RatePath(at_s, rates, rates)


def linear_path(rates: Floats, at_s: Floats) -> RatePath:
    """`rates` (m) at the knots `at_s` (m), linear between."""
    return RatePath(at_s, rates[:-1], rates[1:])


def is_curve_file(text: str) -> bool:
    """Whether a rate or a profile is the name of a file (see `read_curve`)."""
    return text.endswith((".csv", ".parquet"))


def parse_rate(text: str, duration_s: float) -> RatePath:
    """The rate over [0, `duration_s`] that `text` means, in requests/s.

    `5`; `1..5`, a ramp over the whole duration; `0.5,1,2`, steps of equal length; `0.5,1,2:60s`, steps of 60 s, the
    last one staying; or a file (see `read_curve`). Raises `TraceError` for anything else.
    """
    if is_curve_file(text):
        return read_curve(text)
    steps, _, hold = text.partition(":")
    ramp = steps.split("..")
    rates = np.array([_rate(part, text) for part in (ramp if len(ramp) == 2 else steps.split(","))])
    if rates.max() == 0:
        raise TraceError(f"rate {text} is not a positive number of requests per second")
    if len(ramp) == 2:
        return linear_path(rates, np.array([0.0, duration_s]))
    step_s = parse_duration_ns(hold) / NS_PER_S if hold else duration_s / rates.size
    at_s = np.arange(rates.size + 1, dtype=np.float64) * step_s
    at_s[-1] = max(at_s[-1], duration_s)
    return steps_path(rates, at_s)


def _rate(part: str, text: str) -> float:
    """One number of a rate."""
    try:
        value = float(part)
    except ValueError:
        raise TraceError(
            f"'{text}' is not a rate: use requests per second (5), a ramp (1..5), steps (0.5,1,2:60s), "
            "or a .csv or .parquet file with columns time and rate"
        ) from None
    if not (math.isfinite(value) and value >= 0):
        raise TraceError(f"rate {value:g} is not a positive number of requests per second")
    return value


# Mean of five weekdays by hour of the day in UTC, over the mean of all: Azure LLM inference dataset 2024,
# conversation, hourly counts of 27.3 million requests.
_CHAT_DAY = (
    0.890101, 0.964404, 0.964386, 0.790513, 0.799142, 0.867414, 1.01038, 1.08119, 1.11075, 1.07946, 0.980267, 1.02718,
    1.14171, 1.27314, 1.33698, 1.24898, 1.13543, 1.07818, 1.08228, 1.02006, 0.930619, 0.769707, 0.696301, 0.721426,
)  # fmt: skip
# Code in the same dataset is published as a summary only: weekday peak over trough 10, here as a log-sinusoid, which is
# highest when conversation's first harmonic is (12.8 h).
_CODE_DAY = tuple(math.exp(math.log(10) / 2 * math.cos(2 * math.pi * (hour + 0.5 - 12.8) / 24)) for hour in range(24))
_WEEKEND = {"chat": 0.568, "code": 0.319}  # weekend day over weekday, the same dataset
_DAYS = {"chat": _CHAT_DAY, "code": _CODE_DAY}
PROFILES = tuple(f"{mix}-{period}" for mix in _DAYS for period in ("day", "week"))


def parse_profile(text: str, duration_s: float) -> RatePath:
    """The shape over [0, `duration_s`] that `text` means, as multiples of the mean rate.

    One of `PROFILES`, from midnight UTC (a week: of Monday) or, with `@14h`, from so much later on; its mean over whole
    periods is 1. Or a file (see `read_curve`), divided by its own mean. Raises `TraceError` for anything else.
    """
    if is_curve_file(text):
        curve = read_curve(text)
        return curve.times(steps_path(np.array([1 / curve.mean_rps]), curve.at_s[[0, -1]]))
    name, _, start = text.partition("@")
    if name not in PROFILES:
        raise TraceError(f"there is no profile '{name}'; use {', '.join(PROFILES)}, or a .csv or .parquet file")
    start_s = parse_duration_ns(start, zero_ok=True) / NS_PER_S if start else 0.0
    mix, period = name.split("-")
    hours = np.array(_DAYS[mix])
    if period == "week":
        hours = np.concatenate([np.tile(hours, 5), np.tile(hours * _WEEKEND[mix], 2)])
    hours /= hours.mean()
    # Hourly means stand at the middle of their hours. Twelve knots an hour, so that products with ramps are close.
    at_s = start_s + np.arange(0, duration_s + 300, 300.0)
    middles_s = (np.arange(hours.size) + 0.5) * HOUR_S
    return linear_path(np.interp(at_s, middles_s, hours, period=hours.size * HOUR_S), at_s - start_s)


def read_curve(path: str | Path) -> RatePath:
    """A rate in requests/s from a file.

    CSV or Parquet with columns `time` (s) and `rate` (requests/s), linear between rows; or a trace, whose requests are
    counted minute by minute. Before and after, the rate stays what it is at the ends. Raises `TraceError` that names
    file, row (from 0) and column.
    """
    import polars as pl

    from tracegen.schema import check_trace

    path = Path(path)
    frame = _read_frame(path)
    if "arrival_ns" in frame.columns:
        at_s = check_trace(frame, str(path))["arrival_ns"].to_numpy() / NS_PER_S
        counts = np.bincount((at_s // 60).astype(np.int64))[:-1]  # the last minute may be a part of one
        if not counts.any():
            raise TraceError(f"{path}: lasts less than a minute, in which its rate is counted; use a longer trace")
        return steps_path(counts / 60.0, np.arange(counts.size + 1, dtype=np.float64) * 60)
    columns = []
    for name in ("time", "rate"):
        if name not in frame.columns or not frame[name].dtype.is_numeric():
            raise TraceError(f"{path}: column '{name}' of numbers is missing; a rate curve has time (s) and rate (1/s)")
        values = frame[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
        if (bad := ~np.isfinite(values) | (values < 0)).any():
            row = int(bad.argmax())
            raise TraceError(f"{path}: row {row}, column '{name}': {frame[name][row]} is not a number from 0 on")
        columns.append(values)
    at_s, rates = columns
    if at_s.size < 2 or rates.max() == 0:
        raise TraceError(f"{path}: a rate curve needs two rows or more, and a rate above 0")
    if (back := np.diff(at_s) <= 0).any():
        raise TraceError(f"{path}: row {int(back.argmax()) + 1}, column 'time': is not later than the row before")
    return linear_path(rates, at_s)


def _read_frame(path: Path) -> "pl.DataFrame":
    """The rows of the CSV or Parquet file at `path`."""
    import polars as pl

    from tracegen.schema import read_table

    if not path.exists():
        raise TraceError(f"{path}: no such file; a rate curve is CSV or Parquet with columns time and rate")
    if path.suffix == ".parquet":
        return read_table(path)[0]
    try:
        return pl.read_csv(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        why = str(error).splitlines()[0]
        raise TraceError(f"{path}: not readable ({why}); use columns time and rate") from None
