"""One page about one or several runs: the answer first, then what it rests on. Works without a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis import figures
from analysis.buckets import bucket_table, rows_for_people
from analysis.compare import METRICS as COMPARED
from analysis.compare import Difference, compare
from analysis.groups import ALL
from analysis.latency import answered
from analysis.load import RunData, load_run
from analysis.requests import CORE, request_table
from analysis.saved import RunEnergy
from analysis.series import power_series
from analysis.tables import run_names, setting
from analysis.trust import cautions, verdict_texts
from replay.rundir import Run
from tracegen.console import format_si, plural
from tracegen.errors import AnalysisError, RunError

PARTS = ("prefill", "decode", "idle", "other")
METRICS = {"TTFT": "ttft_ms", "TPOT (mean TBT)": "tpot_ms", "E2E latency": "e2el_ms"}
CURVE_POINTS = 200


@dataclass(frozen=True)
class Figure:
    """A picture with what it says in words and the numbers behind it."""

    title: str
    says: str
    svg: Markup
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


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


def write_report(runs: Sequence[Run], energies: Sequence[RunEnergy], path: Path, title: str) -> None:
    """Write the page about `runs` to `path`, by rename. Raises `AnalysisError` when it cannot be written."""
    page = render_report(runs, energies, title)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def render_report(runs: Sequence[Run], energies: Sequence[RunEnergy], title: str) -> str:
    """The page as HTML text: every text from a run is escaped, every figure is inlined."""
    subjects = subjects_of(runs, energies)
    metered = [s for s in subjects if s.energy.summary is not None]
    over_time = [figure for subject in metered for figure in _over_time(subject.name, subject.data)]
    shown = [_joules(metered), *over_time, _buckets(metered), _latency(subjects)]
    environment = Environment(loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("report.html.j2").render(
        title=title,
        simulated=[s.name for s in subjects if s.run.simulated],
        all_simulated=all(s.run.simulated for s in subjects),
        cautions=[line for s in subjects for line in cautions(s.name, s.run)],
        headlines=headlines(subjects),
        figures=[figure for figure in shown if figure],
        tables=[(s.name, *rows_for_people(s.buckets)) for s in subjects],
        runs=[_card(s) for s in subjects],
    )


def subjects_of(runs: Sequence[Run], energies: Sequence[RunEnergy]) -> list[Subject]:
    """The runs with their energies, by the names that the report calls them."""
    return [
        Subject(run, name, energy, bucket_table(run, energy.requests), *_readings(run, energy))
        for run, name, energy in zip(runs, short_names(runs), energies, strict=True)
    ]


def short_names(runs: Sequence[Run]) -> list[str]:
    """The settings that tell the runs apart, where they do; else the runs' names."""
    settings = [(setting(run, "tp"), setting(run, "freq_mhz")) for run in runs]
    if len(runs) > 1 and len(set(settings)) == len(runs) and all(tp and mhz for tp, mhz in settings):
        return [f"TP{tp} at {mhz} MHz" for tp, mhz in settings]
    return run_names(runs)


def headlines(subjects: Sequence[Subject]) -> list[str]:
    """What was found, in sentences; each figure is from the tables below."""
    lines = []
    metered = [s for s in subjects if s.each_j is not None]
    if len(metered) > 1:
        best, worst = (pick(metered, key=lambda s: s.each_j or 0.0) for pick in (min, max))
        lines += _least(best, worst)
        met = "; ".join(f"{_percent(s.whole['slo_attainment'])} in {s.name}" for s in metered)
        lines.append(f"Requests that met their latency objectives: {met}.")
    for subject in metered[: 1 if len(metered) == 1 else 2]:
        lines += _about(subject, alone=len(metered) == 1)
    lines += [f"{s.name}: no energy. {s.energy.why}" for s in subjects if s.energy.why]
    return lines


def _least(best: Subject, worst: Subject) -> list[str]:
    """Which run used least and what else changed, or that the two cannot be told apart."""
    saving = 100 * (1 - (best.each_j or 0.0) / (worst.each_j or 1.0))
    found = _paired(worst, best)
    energy = next((d for d in found if d.metric == "energy_j"), None)
    apart = saving > 0 and f"{saving:.1f}" != "0.0"
    if energy is not None and energy.verdict == "not distinguishable" and energy.low_percent is not None:
        apart = apart and saving > max(-energy.low_percent, energy.high_percent or 0.0)
    each = f"per served request with idle power included, {saving:.1f} % below {worst.name} ({_si(worst.each_j)})."
    if not apart:
        both = f"{_si(best.each_j)} and {_si(worst.each_j)} per served request with idle power included"
        lines = [f"{best.name} and {worst.name} cannot be told apart by their energy: {both}."]
    else:
        lines = [f"{best.name} used least: {_si(best.each_j)} {each}"]
    return lines + _changes(found, worst, best)


def _paired(before: Subject, after: Subject) -> list[Difference]:
    """What changed from run to run over all requests; nothing where the runs cannot be paired."""
    try:
        found = compare(before.run, after.run, before.energy, after.energy).differences
    except AnalysisError:
        return []
    return [difference for difference in found if difference.group == ALL]


def _changes(found: Sequence[Difference], before: Subject, after: Subject) -> list[str]:
    """The differences of a pair of runs, request by request."""
    parts = []
    for difference in found:
        if difference.low_percent is not None:
            interval = f"{difference.low_percent:+.1f} to {difference.high_percent:+.1f} %"
            chance = ", not distinguishable" if difference.verdict == "not distinguishable" else ""
            name = COMPARED[difference.metric].removesuffix(" ms")
            parts.append(f"{name} {difference.difference_percent:+.1f} % ({interval}{chance})")
    text = (
        f"The same requests in {after.name} against {before.name}, one run each, with 95 % intervals: "
        f"{'; '.join(parts)}."
    )
    return [text] if parts else []


def _about(subject: Subject, *, alone: bool) -> list[str]:
    """Sentences on one run."""
    whole, summary = subject.whole, subject.energy.summary or {}
    prefix = "" if alone else f"{subject.name}: "
    lines = []
    if whole["energy_per_request_j"] is not None:
        lines.append(
            f"{prefix}A request cost {_si(whole['energy_per_request_j'])} on average: "
            f"{_percent(whole['prefill_share'])} of it prefill, {_percent(whole['decode_share'])} decode."
        )
    sizes = subject.buckets.filter((pl.col("group") != ALL) & (pl.col("requests_with_energy") > 0))
    if alone and sizes.height > 1:
        ranked = sizes.sort("energy_per_request_j")
        low, high = ranked.row(0, named=True), ranked.row(-1, named=True)
        lines.append(
            f"The cheapest size is {low['group']} with {_si(low['energy_per_request_j'])} a request; "
            f"the dearest is {high['group']} with {_si(high['energy_per_request_j'])}."
        )
    if alone and summary["measured_j"]:
        idle = _percent(summary["idle_j"] / summary["measured_j"])
        lines.append(f"{idle} of the energy was spent with no request in the engine.")
    return lines


def _joules(subjects: Sequence[Subject]) -> Figure | None:
    """Where the joules went."""
    rows = [
        {"run": s.name, "part": part, "rank": i, "joules": summary[f"{part}_j"] / s.whole["ok"]}
        for s in subjects
        if (summary := s.energy.summary) and s.whole["ok"]
        for i, part in enumerate(PARTS)
        if summary[f"{part}_j"] > 0
    ]
    if not rows:
        return None
    frame = pl.DataFrame(rows)
    return Figure(
        "Where the joules went",
        "The energy that the GPUs drew over the whole window, divided by the requests served. Idle is time with no "
        "request in the engine; other is the work of requests that are not of this run, such as warm-up.",
        Markup(figures.joules(frame)),  # noqa: S704 - drawn here; the renderer escapes what it writes
        ["run", "part", "J per served request"],
        [[r["run"], r["part"], f"{r['joules']:,.2f}"] for r in rows],
    )


def _readings(run: Run, energy: RunEnergy) -> tuple[RunData | None, str | None]:
    """What to draw power from; a run whose energy is kept may have lost its readings since: then why."""
    if energy.summary is None:
        return None, None
    try:
        return load_run(run), None
    except (AnalysisError, RunError) as error:
        return None, f"power over time is not shown: {error}"


def _over_time(name: str, data: RunData | None) -> list[Figure]:
    """Power over the window, and the busiest seconds step by step where there are step records."""
    if data is None:
        return []
    series = power_series(data)
    whole = Figure(
        f"Power over time: {name}",
        f"Mean power of the engine's GPUs in bins of {series.bin_s:.2g} s, and below it the mean number of requests in "
        "the engine.",
        Markup(figures.power(series)),  # noqa: S704 - drawn here
        ["s", "power, W", "requests"],
        [[f"{t:.1f}", f"{w:,.0f}", f"{n:.1f}"] for t, w, n in series.overview.gather_every(10).iter_rows()],
    )
    if series.steps is None or series.steps.is_empty():
        return [whole]
    close_up = Figure(
        f"The busiest {series.close_up_s[1] - series.close_up_s[0]:.0f} seconds: {name}",
        "Above, each GPU's power readings; below, each engine step, as wide as it took and as high as the requests it "
        "served together. They share its energy, which is why a request's cost cannot be read off a meter.",
        Markup(figures.close_up(series)),  # noqa: S704 - drawn here
        ["start, s", "end, s", "requests", "work"],
        [[f"{a:.3f}", f"{b:.3f}", str(n), kind] for a, b, n, kind in series.steps.iter_rows()],
    )
    return [whole, close_up]


def _buckets(subjects: Sequence[Subject]) -> Figure | None:
    """Energy per request by size."""
    rows = [
        {"run": s.name, "group": row["group"], "part": part, "rank": i, "joules": share * row["energy_per_request_j"]}
        for s in subjects
        for row in s.buckets.iter_rows(named=True)
        if row["group"] != ALL and row["energy_per_request_j"] is not None
        for i, part in enumerate(PARTS[:2])
        if (share := row[f"{part}_share"]) is not None
    ]
    if not rows:
        return None
    return Figure(
        "Energy per request by size",
        "First letter: input (S under 256 tokens, M under 1024, L up to 8192, X beyond). Second letter: output "
        "(S under 100, M under 350, L). Means over the requests of each size, idle power apart.",
        Markup(figures.buckets(pl.DataFrame(rows))),  # noqa: S704 - drawn here
        ["run", "size", "part", "J per request"],
        [[r["run"], r["group"], r["part"], f"{r['joules']:,.1f}"] for r in rows],
    )


def _latency(subjects: Sequence[Subject]) -> Figure | None:
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
        ["run", "metric, ms", "p50", "p90", "p99"],
        rows,
    )


def _card(subject: Subject) -> dict[str, Any]:
    """A run's settings, verdicts, and how its energy was found."""
    manifest, summary = subject.run.manifest, subject.energy.summary or {}
    instances = manifest.get("instances") or []
    sources = [f"{fit['energy_source']} of {plural(fit['gpus'], 'GPU')}" for fit in summary.get("fit", [])]
    settings = {
        "engine": manifest.get("engine"),
        "state": manifest.get("state"),
        "model": setting(subject.run, "model"),
        "instances": len(instances) or None,
        "tensor parallel": setting(subject.run, "tp"),
        "SM clock, MHz": setting(subject.run, "freq_mhz"),
        "requests served": f"{subject.whole['ok']:,} of {subject.whole['requests']:,}",
        "window, s": f"{summary['window']['duration_s']:,.1f}" if summary else None,
        "measured, kJ": f"{summary['measured_j'] / 1e3:,.1f}" if summary else None,
        "method": summary.get("method"),
        "scope": subject.energy.scope,
        "membership": summary.get("membership"),
        "energy from": "; ".join(sources) or None,
    }
    return {
        "name": subject.name,
        "directory": subject.run.name,
        "simulated": subject.run.simulated,
        "settings": {key: str(value) for key, value in settings.items() if value is not None},
        "verdicts": [verdict_texts(v) for v in manifest.get("verdicts") or []],
        "notes": [*summary.get("notes", []), *(text for text in (subject.energy.why, subject.unmetered) if text)],
    }


def _si(joules: float | None) -> str:
    return format_si(joules, " J", 3)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
