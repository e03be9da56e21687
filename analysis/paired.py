"""How far two settings of a sweep are apart, from pairs: their repeats, which replay the same requests, or requests.

The difference is the ratio of the two on a logarithmic scale, its interval Student's t over the repeats' differences:
what a repeat's trace does to both settings drops out. With one repeat of each, requests are the pairs
(`analysis.bootstrap`): such an interval says nothing of how a repeat would vary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t as student

from analysis.bootstrap import CONFIDENCE, Draws, Floats, compare_means
from analysis.compare import FEWEST_PAIRS
from analysis.groups import ALL, UNLABELLED
from analysis.latency import answered
from analysis.load import open_run
from analysis.requests import CORE, request_table
from analysis.saved import ensure_energy
from analysis.sweep_cells import OF_THAT_NAME


@dataclass(frozen=True)
class Apart:
    """How far b is from a in %, and the 95 % interval of that; None: not known, and `why`."""

    percent: float
    low_percent: float | None
    high_percent: float | None
    pairs: int
    paired_by: str | None  # repeats | requests; None: there is no interval
    why: str | None = None

    @property
    def told(self) -> bool:
        """Whether the interval leaves out zero, so that the sign of the difference is known."""
        low, high = self.low_percent, self.high_percent
        return low is not None and high is not None and low * high > 0


def over_repeats(a: Sequence[float], b: Sequence[float]) -> Apart:
    """How far `b` is from `a`, positive values of the same two or more repeats."""
    logs = np.log(np.asarray(b, dtype=np.float64)) - np.log(np.asarray(a, dtype=np.float64))
    mean, n = float(logs.mean()), logs.size
    reach = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(logs.std(ddof=1)) / float(np.sqrt(n))
    return Apart(_percent(mean), _percent(mean - reach), _percent(mean + reach), n, "repeats")


def apart(
    a: dict[int, float], b: dict[int, float], by_requests: Callable[[int], tuple[Floats, Floats] | str]
) -> Apart | None:
    """How far setting b is from setting a, of each a value by repeat; None where they have no repeat in common.

    `by_requests` gives the values of the requests that both served in a repeat, or why there are none.
    """
    common = sorted(a.keys() & b.keys())
    if not common or min(*(a[r] for r in common), *(b[r] for r in common)) <= 0:
        return None
    if len(common) > 1:
        return over_repeats([a[r] for r in common], [b[r] for r in common])
    percent = _percent(float(np.log(b[common[0]] / a[common[0]])))
    values = by_requests(common[0])
    if isinstance(values, str):
        return Apart(percent, None, None, 1, None, values)
    if values[0].size < FEWEST_PAIRS:
        return Apart(percent, None, None, values[0].size, None, f"{values[0].size} requests in common are too few")
    found = compare_means([values[0]], [values[1]], Draws(np.random.default_rng(0)), paired=True)
    if found is None:
        return Apart(percent, None, None, values[0].size, None, "a mean over requests is not positive")
    return Apart(percent, found.low_percent, found.high_percent, values[0].size, "requests")


def _percent(log_ratio: float) -> float:
    return 100 * float(np.expm1(log_ratio))


class Requests:
    """The requests of a sweep's runs, read when they are needed and kept: the pairs where there is one repeat."""

    def __init__(self, path: Path, by: str, scope: str, objective: str) -> None:
        self._path, self._by, self._scope, self._objective = path, by, scope, objective
        self._kept: dict[str, pl.DataFrame] = {}

    def __call__(self, run_a: str, run_b: str, group: str) -> tuple[Floats, Floats] | str:
        """Values of the requests of `group` that both runs answered, in one order; or why there are none."""
        if self._objective in {"power", "cost"}:
            return "one repeat, and it is of whole runs, not of single requests"
        both = self._of(run_a).join(self._of(run_b), on="request_id", suffix="_b")
        if group != ALL:
            both = both.filter(pl.col("group") == group)
        names = {"energy": ("j",), "performance": ("e2el_ms",), "edp": ("j", "e2el_ms")}[self._objective]
        if group == ALL and "j" in names:
            names = ("whole_j", *names[1:])
        rows = both.drop_nulls([*names, *(f"{name}_b" for name in names)])
        if rows.is_empty():
            return "no request in common has a value"
        return _values(rows, names), _values(rows, [f"{name}_b" for name in names])

    def _of(self, run: str) -> pl.DataFrame:
        if run not in self._kept:
            self._kept[run] = self._read(run)
        return self._kept[run]

    def _read(self, name: str) -> pl.DataFrame:
        run = open_run(self._path / name)
        energy = ensure_energy(run, self._scope)
        table = request_table(run, energy.requests, CORE).filter(answered())
        summary: dict[str, Any] = energy.summary or {}
        own_j = summary.get("measured_j", 0.0) - float(summary.get("warmup_j") or 0.0)
        # What no request was charged with (idle, mostly) is shared equally: the mean is the setting's J/request.
        rest_j = (own_j - float(table["energy_j"].sum())) / max(table.height, 1)
        return table.select(
            "request_id",
            pl.col(self._by).cast(pl.String).fill_null(UNLABELLED).replace(ALL, OF_THAT_NAME).alias("group"),
            "e2el_ms",
            pl.col("energy_j").alias("j"),
            (pl.col("energy_j") + rest_j).alias("whole_j"),
        )


def _values(rows: pl.DataFrame, names: Sequence[str]) -> Floats:
    """The values of one column; of two, linear in each so that their mean is the product of means (delta method)."""
    columns = [rows[name].to_numpy().astype(np.float64) for name in names]
    if len(columns) == 1:
        return columns[0]
    first, second = columns
    return np.asarray(first * second.mean() + second * first.mean() - first.mean() * second.mean())
