"""The grid's carbon intensity, one figure or a series of them, and the time of day at which a run took place."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.load import NS_PER_S, Floats
from replay.rundir import MANIFEST, Run
from tracegen.errors import AnalysisError

COLUMNS = ("time", "g_per_kwh")
LATE_REL = 1.5  # a value that comes later than so many usual distances leaves a gap; below, the one before holds on


@dataclass(frozen=True)
class CarbonSeries:
    """Carbon intensity over time: `g_per_kwh[i]` holds from `since_s[i]` to `until_s[i]`, unix seconds, ascending."""

    source: str  # the file
    since_s: Floats
    until_s: Floats
    g_per_kwh: Floats

    def check_covers(self, begin_s: float, end_s: float) -> None:
        """Raise `AnalysisError` naming the first moment of `[begin_s, end_s]` that has no value."""
        at = int(np.searchsorted(self.since_s, begin_s, side="right")) - 1
        ends = self.until_s[max(at, 0) :]
        gap = (np.append(self.since_s[max(at, 0) + 1 :], np.inf) > ends) & (ends < end_s)
        missing_s = begin_s if at < 0 else max(begin_s, float(ends[gap][0])) if gap.any() else None
        if missing_s is not None:
            raise AnalysisError(
                f"{self.source}: column 'time': has no value for {_iso(missing_s)}; the run was from {_iso(begin_s)} "
                f"to {_iso(end_s)}, and the series tells {_iso(self.since_s[0])} to {_iso(self.until_s[-1])}"
            )

    def mean(self, begin_s: Floats, end_s: Floats) -> Floats:
        """Mean intensity over each `[begin_s, end_s]`, g/kWh; at `begin_s` where that is a moment."""
        zero = self.since_s[0]
        knots = np.append(self.since_s, self.until_s[-1]) - zero
        area = np.concatenate([[0.0], np.cumsum(self.g_per_kwh * np.diff(knots))])
        begin, end = begin_s - zero, end_s - zero
        span = end - begin
        total = np.interp(end, knots, area) - np.interp(begin, knots, area)
        return np.where(span > 0, total / np.where(span > 0, span, 1.0), self.at(begin_s))

    def at(self, t_s: Floats) -> Floats:
        """Intensity at moments, g/kWh."""
        return self.g_per_kwh[np.clip(np.searchsorted(self.since_s, t_s, side="right") - 1, 0, None)]


def parse_carbon(text: str) -> float | CarbonSeries:
    """`--carbon`: a number of g/kWh, or the path of a series (`read_series`). Raises `AnalysisError`."""
    try:
        value = float(text)
    except ValueError:
        return read_series(Path(text))
    if not 0 <= value < float("inf"):
        raise AnalysisError(f"--carbon {text}: give g/kWh, a number from 0 up, for example 400")
    return value


def read_series(path: Path) -> CarbonSeries:
    """A series of carbon intensity from a CSV or Parquet file with columns `time` and `g_per_kwh`.

    `time` is unix seconds or ISO 8601, without a zone UTC; ascending. A value holds until the next one's time; where
    that comes later than 1.5 times the usual distance (the median) there is a gap, and the value holds for the usual
    distance, as the last one does. Raises `AnalysisError` naming file, row (counted from 0, without the header) and
    column.
    """
    frame = _read(path)
    missing = next((name for name in COLUMNS if name not in frame.columns), None)
    if missing:
        raise AnalysisError(
            f"{path}: column '{missing}' is missing; a carbon series has time (ISO 8601 or unix seconds) and g_per_kwh"
        )
    if frame.height < 2:
        raise AnalysisError(
            f"{path}: has {frame.height} rows; two at least tell how long a value holds, one is --carbon G"
        )
    since_s = np.array([_seconds(value, f"{path}: row {i}") for i, value in enumerate(frame["time"])])
    grams = np.array([_grams(value, f"{path}: row {i}") for i, value in enumerate(frame["g_per_kwh"])])
    steps_s = np.diff(since_s)
    if np.any(steps_s <= 0):
        row = int(np.argmax(steps_s <= 0)) + 1
        raise AnalysisError(f"{path}: row {row}, column 'time': is not after the row before; sort the file by time")
    usual_s = float(np.median(steps_s))
    holds_s = np.append(np.where(steps_s > LATE_REL * usual_s, usual_s, steps_s), usual_s)
    return CarbonSeries(str(path), since_s, since_s + holds_s, grams)


def _read(path: Path) -> pl.DataFrame:
    """The file as it is; CSV as text."""
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise AnalysisError(f"--carbon '{path}': is neither a number of g/kWh nor a .csv or .parquet file")
    try:
        if path.suffix.lower() == ".csv":
            return pl.read_csv(path, infer_schema=False)
        return pl.read_parquet(path, glob=False)
    except FileNotFoundError:
        raise AnalysisError(f"{path}: no such file; --carbon takes g/kWh or a series with time and g_per_kwh") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise AnalysisError(f"{path}: not readable ({str(error).splitlines()[0]})") from None


def _seconds(value: Any, where: str) -> float:
    """Unix seconds of a cell of `time`."""
    try:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = datetime.fromisoformat(value.strip())
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not np.isfinite(seconds):
        raise AnalysisError(f"{where}, column 'time': {value!r} is neither ISO 8601 nor unix seconds")
    return seconds


def _grams(value: Any, where: str) -> float:
    """A cell of `g_per_kwh`."""
    try:
        grams = float(value)
    except (TypeError, ValueError):
        grams = float("nan")
    if not 0 <= grams < float("inf"):
        raise AnalysisError(f"{where}, column 'g_per_kwh': {value!r} is not a number of g/kWh from 0 up")
    return grams


def wall_clock_s(run: Run, t_ns: Any) -> Floats:
    """Unix seconds of times on the replayer's clock, by the manifest's `clock_anchors`; between two in proportion.

    Raises `AnalysisError` where the run has none, as one in virtual time has no time of day.
    """
    anchors = run.manifest.get("clock_anchors") or []
    if not anchors:
        raise AnalysisError(
            f"{run.path / MANIFEST}: key 'clock_anchors' is missing or empty, so the run has no time of day (one in "
            "virtual time never has); give --carbon one number of g/kWh"
        )
    for i, anchor in enumerate(anchors):
        for key in ("monotonic_ns", "unix_ns"):
            if anchor.get(key) is None:
                raise AnalysisError(f"{run.path / MANIFEST}: key 'clock_anchors[{i}].{key}' is missing")
    anchors = sorted(anchors, key=lambda a: int(a["monotonic_ns"]))
    first = int(anchors[0]["unix_ns"]) - int(anchors[0]["monotonic_ns"])
    since = np.array([float(a["monotonic_ns"]) for a in anchors])
    drift = np.array([float(int(a["unix_ns"]) - int(a["monotonic_ns"]) - first) for a in anchors])
    t = np.asarray(t_ns, dtype=np.int64)
    return np.asarray((t + first) / NS_PER_S + np.interp(t.astype(np.float64), since, drift) / NS_PER_S)


def _iso(unix_s: float) -> str:
    """A moment for people, UTC."""
    return datetime.fromtimestamp(float(unix_s), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
