"""The figures of a report on runs: each with what it says in words and the numbers behind it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from analysis import figures
from analysis.groups import ALL
from analysis.latency import answered
from analysis.load import RunData
from analysis.report_page import Figure, plain_table
from analysis.requests import CORE, request_table
from analysis.saved import RunEnergy
from analysis.series import Bins, Series, power_series
from replay.rundir import Run

METRICS = {"TTFT": "ttft_ms", "TPOT (mean TBT)": "tpot_ms", "E2E latency": "e2el_ms"}
CURVE_POINTS = 200


@dataclass(frozen=True)
class Subject:
    """A run of the report."""

    run: Run
    name: str
    energy: RunEnergy
    buckets: pl.DataFrame
    data: RunData | None  # the meter's readings, or
    unmetered: str | None  # why there are none to draw

    @property
    def whole(self) -> dict[str, Any]:
        """The bucket table's last row: all requests."""
        return self.buckets.row(-1, named=True)

    @property
    def each_j(self) -> float | None:
        """Joules measured per served request, idle power included; None where either is missing."""
        measured_j = (self.energy.summary or {}).get("measured_j")
        return measured_j / self.whole["ok"] if measured_j is not None and self.whole["ok"] else None


def joules(subjects: Sequence[Subject]) -> Figure | None:
    """Where the joules went, part by part down to what was measured."""
    rows = [row for s in subjects if s.energy.summary and s.whole["ok"] for row in _waterfall(s)]
    if not rows:
        return None
    return Figure(
        "Where the joules went",
        "The energy that the GPUs drew over the whole window, divided by the requests served, part by part. Shared is "
        "what prefill and decode hold of the cost of running a step at all, which its requests bear equally. Idle is "
        "time with no request in the engine; other is the work of requests that are not of this run, such as warm-up.",
        Markup(figures.waterfall(pl.DataFrame(rows))),  # noqa: S704 - drawn here; the renderer escapes what it writes
        plain_table(
            "Where the joules went",
            ["run", "part", "J per served request", "share of what was measured"],
            [[row["run"], row["part"], row["text"], row["share"]] for row in rows],
            text=2,
        ),
        simulated=any(s.run.simulated for s in subjects),
    )


def _waterfall(subject: Subject) -> Iterator[dict[str, Any]]:
    """The bars of a run: where each begins and ends."""
    summary, served = subject.energy.summary or {}, subject.whole["ok"]
    attributed_j = summary["prefill_j"] + summary["decode_j"]
    ends_j = np.cumsum([0.0, *(summary[f"{part}_j"] for part in ("prefill", "decode", "idle", "other"))]).tolist()
    bars = [
        ("prefill", ends_j[0], ends_j[1]),
        ("decode", ends_j[1], ends_j[2]),
        ("of these shared", max(0.0, attributed_j - summary["shared_j"]), attributed_j),
        ("idle", ends_j[2], ends_j[3]),
        ("other", ends_j[3], ends_j[4]),
        ("measured", 0.0, summary["measured_j"]),
    ]
    for part, start_j, end_j in bars:
        share = (end_j - start_j) / summary["measured_j"] if summary["measured_j"] else 0.0
        each = {"start": start_j / served, "end": end_j / served, "text": _joules((end_j - start_j) / served)}
        yield {"run": subject.name, "part": part, **each, "share": f"{100 * share:.1f} %"}


def _joules(value_j: float) -> str:
    return f"{value_j:,.0f} J" if value_j >= 100 else f"{value_j:.3g} J"


def over_time(subject: Subject) -> list[Figure]:
    """Power over the window, to zoom into, and the busiest seconds step by step where there are step records."""
    if subject.data is None:
        return []
    series, simulated = power_series(subject.data), subject.run.simulated
    drawn = [[f"{t:.1f}", f"{w:,.0f}", f"{n:.1f}"] for t, w, n in series.overview.frame.gather_every(10).iter_rows()]
    whole = Figure(
        f"Power over time: {subject.name}",
        f"Mean power of the engine's GPUs in bins of {series.overview.bin_s:.2g} s, and below it the mean number of "
        "requests in the engine.",
        Markup(figures.power(series)),  # noqa: S704 - drawn here
        plain_table("Every tenth bin", ["s", "power, W", "requests"], drawn, text=0),
        simulated,
        zoom=_zoom(series, subject.data.duration_s),
    )
    if series.steps is None or series.steps.is_empty():
        return [whole]
    steps = [[f"{a:.3f}", f"{b:.3f}", str(n), kind] for a, b, n, kind in series.steps.iter_rows()]
    close_up = Figure(
        f"The busiest {series.close_up_s[1] - series.close_up_s[0]:.0f} seconds: {subject.name}",
        "Above, each GPU's power readings; below, each engine step, as wide as it took and as high as the requests it "
        "served together. They share its energy, which is why a request's cost cannot be read off a meter.",
        Markup(figures.close_up(series)),  # noqa: S704 - drawn here
        plain_table("The engine's steps", ["start, s", "end, s", "requests", "work"], steps, text=0),
        simulated,
    )
    return [whole, close_up]


def _zoom(series: Series, duration_s: float) -> dict[str, Any]:
    """What the page's script draws: bins, the finest last, and steps."""
    steps = series.zoomed_steps
    some = steps is not None and not steps.is_empty()
    return {
        "duration_s": duration_s,
        "busiest_s": series.close_up_s,
        "layers": [_layer(bins) for bins in (series.overview, series.fine, series.close) if bins is not None],
        "steps": {
            name: [round(value, 4) for value in column] if column.dtype.is_float() else column.to_list()
            for name, column in ((column.name, column) for column in steps.iter_columns())
        }
        if some and steps is not None
        else None,
    }


def _layer(bins: Bins) -> dict[str, Any]:
    power_w, requests = (np.where(np.isfinite(part), part, 0.0) for part in (bins.power_w, bins.requests))
    return {
        "start_s": bins.start_s,
        "bin_s": bins.bin_s,
        "power_w": power_w.round(1).tolist(),
        "requests": requests.round(2).tolist(),
    }


def buckets(subjects: Sequence[Subject]) -> Figure | None:
    """Energy per request by size."""
    rows = [
        {"run": s.name, "group": row["group"], "part": part, "rank": i, "joules": share * row["energy_per_request_j"]}
        for s in subjects
        for row in s.buckets.iter_rows(named=True)
        if row["group"] != ALL and row["energy_per_request_j"] is not None
        for i, part in enumerate(("prefill", "decode"))
        if (share := row[f"{part}_share"]) is not None
    ]
    if not rows:
        return None
    return Figure(
        "Energy per request by size",
        "First letter: input (S under 256 tokens, M under 1024, L up to 8192, X beyond). Second letter: output "
        "(S under 100, M under 350, L). Means over the requests of each size, idle power apart.",
        Markup(figures.buckets(pl.DataFrame(rows))),  # noqa: S704 - drawn here
        plain_table(
            "Energy per request by size",
            ["run", "size", "part", "J per request"],
            [[r["run"], r["group"], r["part"], f"{r['joules']:,.1f}"] for r in rows],
            text=3,
        ),
        simulated=any(s.run.simulated for s in subjects),
    )


def latency(subjects: Sequence[Subject]) -> Figure | None:
    """Distributions of latency."""
    frames, rows = [], []
    shares = np.linspace(0, 1, CURVE_POINTS + 1)
    for subject in subjects:
        table = request_table(subject.run, None, CORE).filter(answered())
        for metric, column in METRICS.items():
            values = table[column].drop_nulls().to_numpy()
            values = values[values > 0]  # a logarithmic axis has no zero
            if values.size:
                curve = pl.DataFrame({"ms": np.quantile(values, shares), "share": shares})
                frames.append(curve.with_columns(run=pl.lit(subject.name), metric=pl.lit(metric)))
                rows.append([subject.name, metric, *(f"{np.quantile(values, p):,.1f}" for p in (0.5, 0.9, 0.99))])
    if not frames:
        return None
    return Figure(
        "Latency",
        "Share of answered requests that took at most so long, from the time of sending.",
        Markup(figures.latency(pl.concat(frames))),  # noqa: S704 - drawn here
        plain_table("Latency", ["run", "metric, ms", "p50", "p90", "p99"], rows, text=2),
        simulated=any(s.run.simulated for s in subjects),
    )
