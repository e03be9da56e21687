"""The report on a sweep: which setting serves best, how sure that is, and what it rests on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import polars as pl
from markupsafe import Markup

from analysis import recommend_text as told
from analysis import report_figures as drawn
from analysis.drawing import svg
from analysis.groups import ALL
from analysis.load import open_run
from analysis.objectives import TAIL, Wanted
from analysis.recommend import OPEN, Answer, Loser, Option, Recommendation
from analysis.report import card_of, subject_of
from analysis.report_figures import Subject
from analysis.report_page import (
    SIMULATED,
    Cell,
    Column,
    Figure,
    Page,
    Said,
    Section,
    Table,
    percent,
    plain_table,
    short,
    table_of,
    whole,
)
from analysis.saved import ensure_energy
from analysis.sweep import SOUND, SweepTable
from analysis.sweep_figures import SweepFigure, clock_text, curves, heat_maps, pareto_fronts
from analysis.sweep_text import missing_lines, rate_name, remarks
from tracegen.console import plural
from tracegen.errors import AnalysisError, RunError

PLAN = "plan.toml"  # beside sweep.json (docs/tables.md)
CURVES_SHOWN = ("energy", "ttft_p99", "tbt", "power")
_SETTING = (Column("rate_rps", "requests/s", lambda v: f"{v:g}"), Column("tp", "TP", whole), Column("clock", "MHz"))
_CAPS = (Column("batch_cap", "batch cap", whole), Column("power_cap_w", "power cap, W", whole))
_LATENCIES = (
    Column("ttft_p50_ms", "TTFT p50, ms", short),
    Column("ttft_p99_ms", "TTFT p99, ms", short),
    Column("tbt_mean_ms", "mean TBT, ms", short),
    Column("tbt_p99_ms", "TBT p99, ms", short),
    Column("e2e_mean_ms", "mean E2E, s", lambda ms: short(ms / 1e3)),
)
_RATES = (
    Column("throughput_rps", "served/s", short),
    Column("output_tokens_s", "output tokens/s", short),
    Column("power_w", "power, W", short),
)
_JOULES = (
    Column("energy_per_request_j", "J/request", short),
    Column("energy_per_request_j_half", "± J", short),
    Column("energy_per_output_token_j", "J/output token", short),
    Column("slo_attainment", "SLO met", percent),
)


def sweep_page(table: SweepTable, found: Recommendation, title: str) -> Page:
    """The page about a sweep; `found` is what is recommended of it."""
    subjects = _subjects(table, found)
    shown = [
        Section("How sure", _sure(table, found), tables=[_chosen(found), *_others(found)]),
        _drawn("Energy by size, clock and TP" if table.by == "bucket" else "Energy by label", heat_maps(table), table),
        _drawn("Energy against latency", pareto_fronts(table), table),
        _drawn("Against the clock", curves(table, CURVES_SHOWN), table),
        _all_settings(table),
        *_of_runs(subjects),
        _verdicts(table, subjects),
        _again(table, found),
    ]
    return Page(
        title,
        SIMULATED if table.simulated else None,
        [answer_of(found, answer) for answer in found.answers],
        [section for section in shown if section is not None],
        _cautions(table),
    )


def answer_of(found: Recommendation, answer: Answer) -> Said:
    """An answer in one sentence, and how sure it is and what it saves in others."""
    first, *rest = (line.strip() for line in told.answer_lines(found, answer))
    opened = _sentence(first)
    if answer.verdict == OPEN:
        opened = f"Not enough data to name a winner {rate_name(answer.rate_rps)}. Least, but not for sure: {first}."
    return Said(opened, " ".join(map(_sentence, rest)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _cautions(table: SweepTable) -> list[str]:
    """Why to read on with care."""
    unsound = table.settings.filter(pl.col("group") == ALL, pl.col("standing") != SOUND)
    counts = unsound.group_by("standing", maintain_order=True).len().iter_rows()
    said = [f"{plural(count, 'setting')} {standing}" for standing, count in counts]
    lost = [f"Not all of the sweep can be answered from: {', '.join(said)}; see below."] if said else []
    return [*lost, *map(_sentence, table.remarks)]


def _sure(table: SweepTable, found: Recommendation) -> list[str]:
    """What was asked, and how to read the figures; what is missing is told further down."""
    elsewhere = {*missing_lines(table), *(f"note: {remark}" for remark in table.remarks)}
    lines = dict.fromkeys((told.opening(found)[-1], *remarks(table), *told.closing(found)))
    return [_sentence(line) for line in lines if line not in elsewhere]


def _chosen(found: Recommendation) -> Table:
    headings, rows = told.answer_rows(found)
    return plain_table("The best settings", [heading.replace("\n", " ") for heading in headings], rows, text=2)


def _others(found: Recommendation) -> Iterator[Table]:
    """Why each other setting was not chosen."""
    for answer in found.answers:
        headings, rows = told.loser_rows(found, answer)
        names = ["setting", *(heading.replace("\n", " ") for heading in headings[1:])]
        cells = [
            [Cell(row[0]), Cell(row[1], loser.option.value), Cell(row[2], _percent_of(loser)), *map(Cell, row[3:])]
            for row, loser in zip(rows, answer.losers, strict=True)
        ]
        text = [True, False, False, False, True]
        yield Table(f"Why not the others, {rate_name(answer.rate_rps)}", names, text, cells, sorts=True, folded=True)


def _percent_of(loser: Loser) -> float | None:
    return None if loser.apart is None else loser.apart.percent


def _drawn(title: str, figures: Sequence[SweepFigure], table: SweepTable) -> Section | None:
    """Figures with the tables behind them."""
    shown = []
    for figure in figures:
        rows = [["-" if v is None else f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row] for row in
                figure.frame.iter_rows()]  # fmt: skip
        behind = plain_table(figure.title, figure.frame.columns, rows, text=0)
        picture = Markup(svg(figure.chart))  # noqa: S704 - drawn here; the renderer escapes what it writes
        shown.append(Figure(figure.title, figure.says, picture, behind, table.simulated))
    return Section(title, figures=shown) if shown else None


def _all_settings(table: SweepTable) -> Section:
    """Every setting, and every size at every setting."""
    frame = table.settings.with_columns(clock=clock_text(), standing=pl.col("standing").cast(pl.String))
    caps = [column for column in _CAPS if frame[column.name].n_unique() > 1]
    repeats = Column("repeats", "repeats", whole)
    each = [*_SETTING, *caps, Column("standing", "standing"), repeats, *_LATENCIES, *_RATES, *_JOULES]
    sized = [Column("group", table.by), *_SETTING, *caps, *_LATENCIES, *_JOULES]
    groups = frame.filter(pl.col("group") != ALL, pl.col("repeats") > 0)
    tables = [table_of("Every setting", each, frame.filter(pl.col("group") == ALL), sorts=True)]
    if groups.height:
        long = table_of(f"Every {table.by} at every setting", sized, groups, sorts=True)
        tables.append(replace(long, folded=True))
    says = (
        f"Means over repeats; ± is half a 95 % interval. Joules of every setting are with idle power, those of a "
        f"{table.by} attributed and without. A heading sorts; a word such as TP2 or 1200 filters."
    )
    return Section("Every setting", [says], tables=tables)


def _subjects(table: SweepTable, found: Recommendation) -> list[Subject]:
    """Two runs to look into: the best setting's at the highest rate that has one, and what it is set against."""
    best = [answer for answer in found.answers if answer.best is not None]
    if not best:
        return []
    answer = best[-1]
    options = [answer.best, *(versus.option for versus in answer.against)]
    chosen: dict[str, Option] = {option.name: option for option in options if option is not None and option.runs}
    subjects = []
    for option in list(chosen.values())[:2]:
        run_name = option.runs[min(option.runs)]
        try:
            run = open_run(table.path / run_name)
            subjects.append(
                subject_of(run, f"{option.name} {rate_name(answer.rate_rps)}", ensure_energy(run, table.scope))
            )
        except (AnalysisError, RunError):  # it is listed as missing
            continue
    return subjects


def _of_runs(subjects: Sequence[Subject]) -> Iterator[Section]:
    """What happened in the runs that were chosen."""
    metered = [s for s in subjects if s.energy.summary is not None]
    says = ["The best setting, and the first that it is set against: one repeat of each."] if len(metered) > 1 else []
    figure = drawn.joules(metered)
    if figure is not None:
        yield Section(figure.title, says, figures=[figure])
    for subject in metered:
        figures = drawn.over_time(subject)
        if figures:
            yield Section(f"Power over time: {subject.name}", figures=figures)


def _verdicts(table: SweepTable, subjects: Sequence[Subject]) -> Section:
    """What each cell's run says against itself, and the verdicts of those that were shown."""
    rows = []
    for row in table.cells.filter(pl.col("standing") != SOUND).iter_rows(named=True):
        why = row["why"] or "; ".join(row["invalid_because"] or []) or "no reason given"
        rows.append([Cell(row["cell"]), Cell(row["state"]), Cell(row["standing"], ok=False), Cell(why)])
    sound = table.cells.height - len(rows)
    says = (
        f"{sound} of {plural(table.cells.height, 'cell')} are sound: complete, and none of its verdicts is against it "
        "(but for clocks that the GPUs' own limits did not let them hold)."
    )
    headings = ["cell", "state", "standing", "why"]
    listed = [Table("Cells that are not sound", headings, [True] * 4, rows, sorts=True)] if rows else []
    return Section("Whether to trust the runs", [says], tables=listed, cards=[card_of(s) for s in subjects])


def _again(table: SweepTable, found: Recommendation) -> Section:
    """The commands, and the plan that they take."""
    try:
        plan = (table.path / PLAN).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        plan = None
    scope = f" --scope {table.scope} --by {table.by}"
    asked = f" --slo {_slo_words(found.wanted)} --attainment {found.wanted.attainment:g}"
    asked += f" --objective {found.objective.name}"
    commands = "\n".join(
        [
            *(["replay sweep --plan plan.toml -o DIR"] if plan else []),
            f"analysis sweep DIR{scope}",
            f"analysis recommend DIR{scope}{asked}",
            f"analysis report DIR{scope}{asked} -o report.html",
        ]
    )
    says = ["With the plan below kept as plan.toml:" if plan else f"The sweep has no {PLAN}, so it says no more than:"]
    return Section("How to repeat it", says, commands=[commands, *([plan] if plan else [])])


def _slo_words(wanted: Wanted) -> str:
    """Latency objectives as `--slo` takes them."""
    names = {"ttft": "ttft", "tpot": "tbt", "e2el": "e2e"}
    bounds = {names[m]: ",".join(f"{b:g}" for b in dict.fromkeys(v)) for m, v in wanted.slo.bounds_ms.items()}
    tail = {} if wanted.tbt_p99_ms is None else {TAIL: f"{wanted.tbt_p99_ms:g}"}
    return ",".join(f"{name}:{value}" for name, value in {**bounds, **tail}.items())
