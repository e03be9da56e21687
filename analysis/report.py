"""One page about one or several runs: the answer first, then what it rests on. Works without a network."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from analysis import report_figures as drawn
from analysis.buckets import bucket_table
from analysis.compare import METRICS as COMPARED
from analysis.compare import Difference, compare
from analysis.groups import ALL
from analysis.load import RunData, load_run
from analysis.report_figures import Subject
from analysis.report_page import (
    SIMULATED,
    Card,
    Cell,
    Column,
    Page,
    Said,
    Section,
    Table,
    percent,
    short,
    table_of,
    whole,
)
from analysis.saved import RunEnergy
from analysis.tables import run_names, setting
from analysis.trust import cautions, verdict_texts
from replay.rundir import Run
from tracegen.console import format_si, plural
from tracegen.errors import AnalysisError, RunError

COLUMNS = (
    Column("run", "run"),
    Column("group", "size"),
    Column("ok", "served", whole),
    Column("requests", "of", whole),
    *(Column(f"ttft_ms_p{p}", f"TTFT p{p}, ms", short) for p in (50, 90, 99)),
    *(Column(f"tbt_ms_p{p}", f"TBT p{p}, ms", short) for p in (50, 90, 99)),
    *(Column(f"e2el_ms_p{p}", f"E2E p{p}, s", lambda ms: short(ms / 1e3)) for p in (50, 90, 99)),
    Column("energy_per_request_j", "J/request", short),
    Column("energy_per_input_token_j", "J/input token", short),
    Column("energy_per_output_token_j", "J/output token", short),
    Column("prefill_share", "prefill", percent),
    Column("slo_attainment", "SLO met", percent),
)
SIZES = (
    "Latencies are of answered requests. Objectives: TTFT 250, 400 and 2000 ms for short, medium and long inputs, and "
    "100 ms for a request's mean TBT; a request that failed has missed them. A heading sorts."
)


def run_page(runs: Sequence[Run], energies: Sequence[RunEnergy], title: str) -> Page:
    """The page about `runs` with their `energies`."""
    subjects = subjects_of(runs, energies)
    metered = [s for s in subjects if s.energy.summary is not None]
    simulated = [s.name for s in subjects if s.run.simulated]
    partly = f"SIMULATED in part: {', '.join(simulated)}" if simulated else None
    sections = [
        *(Section(figure.title, figures=[figure]) for figure in [drawn.joules(metered)] if figure),
        *(
            Section(f"Power over time{'' if len(metered) == 1 else f': {s.name}'}", figures=figures)
            for s in metered
            if (figures := drawn.over_time(s))
        ),
        *(Section(f.title, figures=[f]) for f in (drawn.buckets(metered), drawn.latency(subjects)) if f),
        Section(
            "By size of request",
            [SIZES],
            tables=_by_size(subjects),
        ),
        Section("The runs, and whether to trust them", cards=[card_of(s) for s in subjects]),
    ]
    return Page(
        title,
        SIMULATED if len(simulated) == len(subjects) > 0 else partly,
        [Said(line) for line in headlines(subjects)],
        sections,
        [line for s in subjects for line in cautions(s.name, s.run)],
    )


def subjects_of(runs: Sequence[Run], energies: Sequence[RunEnergy]) -> list[Subject]:
    """The runs with their energies, by the names that the report calls them."""
    return [subject_of(*each) for each in zip(runs, short_names(runs), energies, strict=True)]


def subject_of(run: Run, name: str, energy: RunEnergy) -> Subject:
    """A run as the report's figures need it."""
    return Subject(run, name, energy, bucket_table(run, energy.requests), *_readings(run, energy))


def short_names(runs: Sequence[Run]) -> list[str]:
    """The settings that tell the runs apart, where they do; else the runs' names."""
    settings = [(setting(run, "tp"), setting(run, "freq_mhz")) for run in runs]
    if len(runs) > 1 and len(set(settings)) == len(runs) and all(tp and mhz for tp, mhz in settings):
        return [f"TP{tp} at {mhz} MHz" for tp, mhz in settings]
    return run_names(runs)


def _by_size(subjects: Sequence[Subject]) -> list[Table]:
    """One table of all runs' sizes, and of what a run comes to as a whole."""
    if not subjects:
        return []
    frame = pl.concat([s.buckets.with_columns(run=pl.lit(s.name)) for s in subjects])
    columns = COLUMNS if len(subjects) > 1 else COLUMNS[1:]
    each, last = frame.filter(pl.col("group") != ALL), frame.filter(pl.col("group") == ALL)
    if len(subjects) == 1:
        return [table_of("By size of request", columns, each, total=last, sorts=True)]
    return [
        table_of("By size of request", columns, each, sorts=True),
        table_of("All sizes", columns, last, sorts=True),
    ]


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


def _readings(run: Run, energy: RunEnergy) -> tuple[RunData | None, str | None]:
    """What to draw power from; a run whose energy is kept may have lost its readings since: then why."""
    if energy.summary is None:
        return None, None
    try:
        return load_run(run), None
    except (AnalysisError, RunError) as error:
        return None, f"power over time is not shown: {error}"


def card_of(subject: Subject) -> Card:
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
    verdicts = manifest.get("verdicts") or []
    return Card(
        subject.name,
        subject.run.simulated,
        [subject.run.name] if subject.run.name != subject.name else [],
        {key: str(value) for key, value in settings.items() if value is not None},
        verdict_table(subject.name, verdicts) if verdicts else None,
        [*summary.get("notes", []), *(text for text in (subject.energy.why, subject.unmetered) if text)],
    )


def verdict_table(name: str, verdicts: Sequence[dict[str, Any]]) -> Table:
    """A run's verdicts on itself."""
    said = {True: "passed", False: "failed", None: "not judged"}
    rows = [
        [Cell(v["name"]), Cell(said[v["ok"]], ok=v["ok"]), Cell(v["value"]), Cell(v["bound"]), Cell(v["why"])]
        for v in map(verdict_texts, verdicts)
    ]
    headings = ["verdict", "found", "value", "bound", "why"]
    return Table(f"Verdicts of {name}", headings, [True, True, False, False, True], rows)


def _si(joules: float | None) -> str:
    return format_si(joules, " J", 3)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
