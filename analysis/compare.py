"""Two runs of one trace side by side: what changed per request, and whether it is more than chance.

Requests are paired by `request_id`, so that the spread between requests drops out. The interval is a bootstrap over
pairs (95 %, percentile): it speaks of these requests served once by each, not of what a repeated run would vary by.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.buckets import ALL
from analysis.load import Floats
from analysis.requests import request_table
from analysis.saved import RunEnergy
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.errors import AnalysisError

METRICS = {"energy_j": "J/request", "ttft_ms": "TTFT ms", "tpot_ms": "TBT ms", "e2el_ms": "E2E ms"}
RESAMPLES = 2000
FEWEST_PAIRS = 10
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Means of one metric in one group of requests, and how far the second run is from the first, in %."""

    group: str
    metric: str
    pairs: int
    mean_a: float | None
    mean_b: float | None
    difference_percent: float | None
    low_percent: float | None  # of the 95 % interval; None with too few pairs
    high_percent: float | None
    verdict: str  # lower | higher | not distinguishable | too few pairs | no data


@dataclass(frozen=True)
class Comparison:
    """The differences of run b against run a; `warnings` say what limits them."""

    run_a: str
    run_b: str
    paired: bool
    simulated: bool
    totals: list[dict[str, Any]]  # per run: measured_j, duration_s, energy per request with idle power included
    differences: list[Difference]
    warnings: list[str]

    def document(self) -> dict[str, Any]:
        """The comparison as a JSON document."""
        return asdict(self)


def compare(
    a: Run, b: Run, energy_a: RunEnergy, energy_b: RunEnergy, *, paired: bool = True, seed: int = 0
) -> Comparison:
    """Compare run `b` with run `a`, per bucket and over all, over requests that both served.

    Raises `AnalysisError` when the traces differ and `paired` is asked for, or when no request was served by both.
    """
    sha_a, sha_b = a.manifest.get("trace_sha256"), b.manifest.get("trace_sha256")
    if paired and sha_a and sha_b and sha_a != sha_b:
        raise AnalysisError(
            f"{a.path} and {b.path} replayed different traces (trace_sha256), so their requests do not pair; "
            "compare group means with --unpaired"
        )
    tables = [_served(run, energy) for run, energy in ((a, energy_a), (b, energy_b))]
    if paired:
        both = tables[0].join(tables[1], on="request_id", suffix="_b", maintain_order="left")
        if both.is_empty():
            raise AnalysisError(f"{a.path} and {b.path} served no request in common; compare with --unpaired")
        first, second = tables[0].columns, [f"{c}_b" for c in tables[0].columns[1:]]
        tables = [both.select(first), both.select("request_id", *second).rename(lambda n: n.removesuffix("_b"))]
    elif tables[0].is_empty() or tables[1].is_empty():
        raise AnalysisError(f"{a.path if tables[0].is_empty() else b.path}: no request was served")
    rng = np.random.default_rng(seed)
    here = set(tables[0]["bucket"]) & set(tables[1]["bucket"])
    groups = [ALL, *(name for name in BUCKETS if name in here)]
    differences = [_difference(g, m, tables, rng, paired=paired) for g in groups for m in METRICS]
    totals = [_total(run, energy) for run, energy in ((a, energy_a), (b, energy_b))]
    simulated = a.simulated or b.simulated
    return Comparison(a.name, b.name, paired, simulated, totals, differences, _warnings((a, energy_a), (b, energy_b)))


def _served(run: Run, energy: RunEnergy) -> pl.DataFrame:
    """The requests that were answered in full."""
    table = request_table(run, energy.requests).filter(pl.col("status") == "ok")
    return table.select("request_id", "bucket", *METRICS)


def _difference(
    group: str, metric: str, tables: list[pl.DataFrame], rng: np.random.Generator, *, paired: bool
) -> Difference:
    """One metric in one group. In a pair the group is the first run's: served lengths may differ."""
    if paired:
        both = pl.DataFrame({"group": tables[0]["bucket"], "a": tables[0][metric], "b": tables[1][metric]}).drop_nulls()
        both = both if group == ALL else both.filter(pl.col("group") == group)
        a, b = both["a"].to_numpy(), both["b"].to_numpy()
    else:
        a, b = (
            (t if group == ALL else t.filter(pl.col("bucket") == group))[metric].drop_nulls().to_numpy() for t in tables
        )
    pairs = min(a.size, b.size)
    if not pairs or a.mean() <= 0:
        return Difference(group, metric, pairs, None, None, None, None, None, "no data")
    percent = 100 * (b.mean() / a.mean() - 1)
    if pairs < FEWEST_PAIRS:
        return Difference(group, metric, pairs, a.mean(), b.mean(), percent, None, None, "too few pairs")
    low, high = np.quantile(_resample(a, b, rng, paired=paired), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not distinguishable"
    return Difference(group, metric, pairs, a.mean(), b.mean(), percent, float(low), float(high), verdict)


def _resample(a: Floats, b: Floats, rng: np.random.Generator, *, paired: bool) -> Floats:
    """Differences of means in % over resamples of the requests."""
    percents = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows_a = rng.integers(a.size, size=a.size)
        rows_b = rows_a if paired else rng.integers(b.size, size=b.size)
        percents[i] = 100 * (b[rows_b].mean() / a[rows_a].mean() - 1)
    return percents


def _total(run: Run, energy: RunEnergy) -> dict[str, Any]:
    """A run's whole energy over the requests that it served, idle time included."""
    served = run.scan("requests").filter(pl.col("status") == "ok").select(pl.len(), pl.col("output_tokens").sum())
    count, tokens = served.collect().row(0)
    summary = energy.summary or {}
    measured_j = summary.get("measured_j")
    return {
        "run": run.name,
        "served": count,
        "duration_s": summary.get("window", {}).get("duration_s"),
        "measured_j": measured_j,
        "idle_j": summary.get("idle_j"),
        "measured_per_request_j": measured_j / count if measured_j is not None and count else None,
        "measured_per_output_token_j": measured_j / tokens if measured_j is not None and tokens else None,
    }


def _warnings(a: tuple[Run, RunEnergy], b: tuple[Run, RunEnergy]) -> list[str]:
    """What a reader should know before believing the differences."""
    warnings = []
    for key in ("engine", "state"):
        first, second = a[0].manifest.get(key), b[0].manifest.get(key)
        if first != second:
            warnings.append(f"the runs differ in {key}: {first} and {second}")
    models = [{i.get("model") for i in run.manifest.get("instances") or []} for run, _ in (a, b)]
    if models[0] != models[1]:
        warnings.append("the runs served different models")
    for run, energy in (a, b):
        if not run.manifest.get("trace_sha256"):
            warnings.append(f"{run.name}: no trace_sha256, so it is not certain that the traces are the same")
        if energy.why:
            warnings.append(f"no energy: {energy.why}")
        failed = [str(v.get("name")) for v in run.manifest.get("verdicts") or [] if v.get("ok") is False]
        if failed:
            warnings.append(f"{run.name}: failed its verdicts {', '.join(failed)}")
    return warnings


def findings(comparison: Comparison) -> list[str]:
    """The comparison in three sentences: energy, latency, sizes. What the data does not tell is said to be so."""
    of = {(d.group, d.metric): d for d in comparison.differences}
    mark = "SIMULATED: " if comparison.simulated else ""
    energy = of[ALL, "energy_j"]
    if energy.mean_a is None or energy.difference_percent is None:
        first = f"{mark}the energy of {comparison.run_a} and {comparison.run_b} cannot be compared: no data"
    else:
        # The sign of a difference that may be chance would be read as an answer.
        change = f"{energy.difference_percent:+.1f} %" if energy.verdict in {"lower", "higher"} else energy.verdict
        span = (
            ""
            if energy.low_percent is None
            else f"; 95 % interval {energy.low_percent:+.1f} to {energy.high_percent:+.1f} %"
        )
        first = (
            f"{mark}a request costs {_short(energy.mean_b)} J in {comparison.run_b} and {_short(energy.mean_a)} J in "
            f"{comparison.run_a}: {change} ({energy.pairs:,} {_counted(comparison)}{span})"
        )
    latencies = [f"{METRICS[m].split()[0]} {_bracketed(of[ALL, m])}" for m in METRICS if m != "energy_j"]
    second = f"{mark}latency in {comparison.run_b} against {comparison.run_a}: {', '.join(latencies)}"
    sizes = [d for d in comparison.differences if d.metric == "energy_j" and d.verdict in {"lower", "higher"}]
    sizes = sorted((d for d in sizes if d.group != ALL), key=lambda d: d.difference_percent or 0.0)
    if not sizes:
        return [first, second, f"{mark}no size of request has enough {_counted(comparison)} to tell its energy apart"]
    dearest = max(sizes, key=lambda d: d.mean_b or 0.0)
    low, high = (f"{d.difference_percent:+.1f} % ({d.group})" for d in (sizes[0], sizes[-1]))
    most = f"dearest is {dearest.group} with {_short(dearest.mean_b)} J"
    third = f"{mark}by size the change goes from {low} to {high}; {most}"
    return [first, second, third]


def _counted(comparison: Comparison) -> str:
    """What the groups are counted in."""
    return "pairs" if comparison.paired else "requests"


def overall_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: every metric over all requests."""
    rows = [
        [
            METRICS[d.metric],
            _short(d.mean_a),
            _short(d.mean_b),
            "-" if d.difference_percent is None else f"{d.difference_percent:+.1f} %",
            "-" if d.low_percent is None else f"{d.low_percent:+.1f} to {d.high_percent:+.1f} %",
            d.verdict,
        ]
        for d in comparison.differences
        if d.group == ALL
    ]
    return ["mean", "A", "B", "B against A", "95 % interval", "B is"], rows


def bucket_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: J/request in full and the other metrics' differences, one row a bucket.

    A difference that is not distinguishable from none stands in brackets, so does one of too few pairs.
    """
    groups: dict[str, dict[str, Difference]] = {}
    for difference in comparison.differences:
        if difference.group != ALL:
            groups.setdefault(difference.group, {})[difference.metric] = difference
    rows = []
    for group, by_metric in groups.items():
        joules = by_metric["energy_j"]
        rows.append(
            [
                group,
                f"{max(d.pairs for d in by_metric.values()):,}",
                _short(joules.mean_a),
                _short(joules.mean_b),
                *(_bracketed(by_metric[metric]) for metric in METRICS),
            ]
        )
    return ["", _counted(comparison), "J/request A", "B", "J/request", "TTFT", "TBT", "E2E"], rows


def _bracketed(difference: Difference) -> str:
    if difference.difference_percent is None:
        return "-"
    text = f"{difference.difference_percent:+.1f} %"
    return text if difference.verdict in {"lower", "higher"} else f"({text})"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
