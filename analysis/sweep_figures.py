"""A sweep's figures: curves against the clock, heat maps of energy, Pareto fronts, each with the table behind it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from analysis import sweep_charts as charts
from analysis.drawing import draw_to
from analysis.groups import ALL
from analysis.pareto import ENERGY, FRONTS, with_fronts
from analysis.recommend import setting_name
from analysis.sweep import INVALID, MISSING, SATURATED, SweepTable, group_rank, settings_of
from analysis.sweep_file import SETTING
from analysis.sweep_text import METRICS, rate_name
from tracegen.console import plural
from tracegen.errors import AnalysisError

FORMATS = ("png", "svg", "vega", "csv")
CURVES = ("ttft_p99", "tbt", "e2e", "throughput", "power", "energy")  # of `analysis.sweep_text.METRICS`
UNLOCKED = "unlocked"
# What a cell of a heat map says that has no figure.
SATURATED_TEXT, MISSING_TEXT, NO_REQUEST_TEXT, NOT_PLANNED_TEXT, NO_FIGURE_TEXT = "sat.", "fail", "none", "n/a", "?"
WITHOUT = {
    SATURATED_TEXT: "saturated",
    MISSING_TEXT: "failed or not run",
    NO_REQUEST_TEXT: "no answered request of this group",
    NOT_PLANNED_TEXT: "not part of the sweep",
    NO_FIGURE_TEXT: "no energy known",
}


@dataclass(frozen=True)
class SweepFigure:
    """A figure of a sweep: `name` is its files', `frame` the table behind it."""

    name: str
    title: str
    says: str
    frame: pl.DataFrame
    chart: Any


def sweep_figures(table: SweepTable) -> list[SweepFigure]:
    """All figures of a sweep; one without a single value to draw is left out."""
    return [*heat_maps(table), *pareto_fronts(table), *curves(table, CURVES)]


def curves(table: SweepTable, metrics: Iterable[str]) -> list[SweepFigure]:
    """Each of `metrics` against the clock: by TP, by group, and by batch size where that was swept."""
    settings = _rated(table)
    whole = settings.filter(pl.col("group") == ALL)
    # A setting without figures has no groups; it keeps its place, empty.
    groups = whole.select(*SETTING).join(
        settings.filter(pl.col("group") != ALL), on=list(SETTING), how="left", nulls_equal=True, maintain_order="left"
    )
    groups = groups.sort(_rank(pl.col("group")), maintain_order=True)
    kinds: list[tuple[str, str, pl.DataFrame, Sequence[str]]] = [
        ("tp", "tensor-parallel size", whole.with_columns(series=pl.format("TP{}", "tp")), (*_CAPS, "rate_rps")),
        (
            table.by,
            "size" if table.by == "bucket" else table.by,
            groups.with_columns(series="group"),
            _OF_GROUPS,
        ),
    ]
    if settings["batch_cap"].n_unique() > 1:
        batch = pl.when(pl.col("batch_cap").is_null()).then(pl.lit("no cap")).otherwise(pl.format("{}", "batch_cap"))
        kinds.append(("batch", "batch size", whole.with_columns(series=batch), ("power_cap_w", "tp", "rate_rps")))
    drawn = []
    for name in metrics:
        metric = METRICS[name]
        for kind, text, frame, panel in kinds:
            ranked = frame.with_row_index("rank")
            shown = _shown(ranked.sort(*panel, nulls_last=True, maintain_order=True), panel).with_columns(
                value=pl.col(metric.column) * metric.unit, half=pl.col(f"{metric.column}_half") * metric.unit
            )
            if shown["value"].null_count() < shown.height:
                says = (
                    f"{_first_upper(metric.text)}, against the SM clock by {text}, means over repeats"
                    f"{_with_bars(shown)}. A gap is a setting without figures: saturated, failed, or not run."
                    f"{_drawn_invalid(shown['standing'])}"
                    f"{_of_groups(name, kind)}"
                )
                title = f"{_first_upper(metric.text.split(',')[0])} by {text}"
                keys = [*SETTING, "series", "standing", "repeats", "value", "half"]
                chart = charts.lines(shown, metric.text, _across(frame, panel))
                behind = shown.drop_nulls("series").select(keys)
                drawn.append(SweepFigure(f"{name}-by-{kind}", title, says, behind, chart))
    return drawn


_CAPS = ("batch_cap", "power_cap_w")
_OF_GROUPS = ("batch_cap", "power_cap_w", "tp", "rate_rps")


def _of_groups(metric: str, kind: str) -> str:
    """What a figure of requests of one group leaves out."""
    if kind in {"tp", "batch"}:
        return " Idle power is included." if metric in {"energy", "power"} else ""
    return {
        "energy": " Attributed joules, without idle power.",
        "power": " The attributed joules of the group's requests over the window's seconds, without idle power.",
        "throughput": " Answered requests of the group over the window's seconds.",
    }.get(metric, "")


def _rated(table: SweepTable) -> pl.DataFrame:
    """The settings, with throughput and power of groups too: over the seconds of the cell's window."""
    groups = table.groups.join(table.cells.select("cell", "duration_s"), on="cell", how="left").with_columns(
        throughput_rps=pl.col("served") / pl.col("duration_s"),
        power_w=pl.col("energy_per_request_j") * pl.col("served") / pl.col("duration_s"),
    )
    return settings_of(table.cells, groups.drop("duration_s"))


def _rank(group: pl.Expr) -> pl.Expr:
    """Where a group stands: sizes from small to large, labels by name, none first."""
    return group.map_elements(lambda name: f"{group_rank(name)[0]:04d} {name}", pl.String).fill_null("")


def _across(frame: pl.DataFrame, panel: Sequence[str]) -> int:
    """How many panels to a row: as many as the last of what makes a panel has values, where that makes a grid."""
    several = [frame[name].n_unique() for name in panel if frame[name].n_unique() > 1]
    return several[-1] if len(several) > 1 else 0


def _drawn_invalid(standings: pl.Series) -> str:
    count = len(standings.filter(standings.cast(pl.String) == INVALID))
    return (
        f" {plural(count, 'point')} of runs whose own verdicts are against them (standing: invalid)." if count else ""
    )


def _shown(frame: pl.DataFrame, panel: Sequence[str]) -> pl.DataFrame:
    """`frame` with `clock`, its text, and `panel`, the setting that a panel is of, where there are several."""
    rows = frame.iter_rows(named=True)
    several = [name for name in panel if frame[name].n_unique() > 1]
    named = [", ".join(_SAID[name](row[name]) for name in several) for row in rows]
    return frame.with_columns(clock=clock_text(), panel=pl.Series(named, dtype=pl.String))


_SAID: dict[str, Callable[[Any], str]] = {
    "tp": lambda tp: f"TP{tp}",
    "rate_rps": rate_name,
    "batch_cap": lambda cap: "no batch cap" if cap is None else f"batch {cap}",
    "power_cap_w": lambda cap: "no power cap" if cap is None else f"{cap:g} W",
}


def clock_text() -> pl.Expr:
    """A clock as axes name it."""
    number = pl.col("freq_mhz").map_elements(lambda mhz: f"{mhz:g}", pl.String)
    return pl.when(pl.col("freq_mhz").is_null()).then(pl.lit(UNLOCKED)).otherwise(number)


def _with_bars(frame: pl.DataFrame) -> str:
    if frame["half"].drop_nulls().is_empty():
        return ""
    if frame["series"].n_unique() > charts.MOST_WITH_BARS:
        return "; their 95 % intervals are with the numbers"
    return "; bars are 95 % intervals, as far as the panel reaches"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def heat_maps(table: SweepTable) -> list[SweepFigure]:
    """Energy per request by group, clock and TP: one figure a rate."""
    groups = table.settings.filter(pl.col("group") != ALL)
    drawn = []
    for (rate,), part in groups.group_by("rate_rps", maintain_order=True):
        frame = _full(table, part, rate)
        if frame["value"].null_count() == frame.height:
            continue
        where = f" {rate_name(rate)}" if groups["rate_rps"].n_unique() > 1 else ""
        missing = [f"{text}: {WITHOUT[text]}" for text in WITHOUT if text in frame["text"].to_list()]
        says = (
            f"J per request (attributed, without idle power){where}, by {_what(table.by)}, SM clock in MHz and "
            "tensor-parallel size. The darker, the more than the least of the row's "
            f"{table.by} at any setting.{' Grey has no figure: ' if missing else ''}{'; '.join(missing)}"
            f"{'.' if missing else ''}{_of_invalid(frame['state'])}"
        )
        name = "energy-map" if rate is None else f"energy-map-{rate:g}rps"
        keys = [*SETTING, "group", "value", "over_least", "text", "why"]
        drawn.append(
            SweepFigure(
                name,
                f"Energy by {_what(table.by)}, clock and TP{where}",
                says,
                frame.select(keys),
                charts.map_of(frame),
            )
        )
    return drawn


def _of_invalid(standings: pl.Series) -> str:
    """What brackets mean, where there are some."""
    found = (standings.cast(pl.String) == INVALID).any()
    return " In brackets: the runs' own verdicts are against them." if found else ""


def _what(by: str) -> str:
    return "size" if by == "bucket" else by


def _full(table: SweepTable, part: pl.DataFrame, rate: float | None) -> pl.DataFrame:
    """Every group at every setting of a rate: its joules, or why there are none (`text` is short for it)."""
    at_rate = pl.col("rate_rps").eq_missing(pl.lit(rate, pl.Float64))
    order = table.settings.filter(pl.col("group") != ALL).select("group").unique().sort(_rank(pl.col("group")))
    whole = table.settings.filter(at_rate, pl.col("group") == ALL).select(*SETTING, pl.col("standing").alias("state"))
    # A TP that some clocks were not run at has a hole, not a narrower map.
    knobs = [name for name in SETTING if name not in {"rate_rps", "freq_mhz"}]
    grid = (
        whole.select(*knobs)
        .unique(maintain_order=True)
        .join(whole.select("freq_mhz", "rate_rps").unique().sort("freq_mhz", nulls_last=True), how="cross")
    )
    known = part.select(*SETTING, "group", "served", value=pl.col("energy_per_request_j"))
    full = (
        grid.join(whole, on=list(SETTING), how="left", nulls_equal=True, maintain_order="left")
        .join(order, how="cross", maintain_order="left")
        .join(known, on=[*SETTING, "group"], how="left", nulls_equal=True, maintain_order="left")
    )
    state = pl.col("state").cast(pl.String)
    joules = pl.col("value").map_elements(_joules, pl.String)
    text = (
        pl.when(pl.col("value").is_not_null() & (state == INVALID))
        .then(pl.format("({})", joules))
        .when(pl.col("value").is_not_null())
        .then(joules)
        .when(state.is_null())
        .then(pl.lit(NOT_PLANNED_TEXT))
        .when(state == SATURATED)
        .then(pl.lit(SATURATED_TEXT))
        .when(state == MISSING)
        .then(pl.lit(MISSING_TEXT))
        .when(pl.col("served").fill_null(0) == 0)
        .then(pl.lit(NO_REQUEST_TEXT))
        .otherwise(pl.lit(NO_FIGURE_TEXT))
    )
    least = pl.col("value").min().over("group")
    shown = full.with_columns(over_least=pl.col("value") / least, text=text)
    why = pl.col("text").replace_strict(list(WITHOUT), list(WITHOUT.values()), default=None, return_dtype=pl.String)
    return _shown(shown.with_columns(why=why), [*knobs])


def _joules(value_j: float) -> str:
    return f"{value_j:,.0f}" if value_j >= 100 else f"{value_j:.3g}"


def pareto_fronts(table: SweepTable) -> list[SweepFigure]:
    """J/request against each of two latencies: one figure a rate."""
    whole = with_fronts(table.settings.filter(pl.col("group") == ALL))
    drawn = []
    for (rate,), part in whole.group_by("rate_rps", maintain_order=True):
        names = [
            setting_name(row["tp"], row["freq_mhz"], row["batch_cap"], row["power_cap_w"])
            for row in part.iter_rows(named=True)
        ]
        frame = pl.concat(
            part.with_columns(
                setting=pl.Series(names),
                series=pl.format("TP{}", "tp"),
                latency=pl.lit(_LATENCIES[name]),
                latency_ms=pl.col(column),
                energy_j=pl.col(ENERGY),
                on_front=pl.col(f"pareto_{name}"),
                clock=clock_text(),
            )
            for name, column in FRONTS.items()
        ).filter(pl.col("on_front").is_not_null(), pl.col("latency_ms").is_not_null(), pl.col("energy_j").is_not_null())
        if frame.is_empty():
            continue
        where = f" {rate_name(rate)}" if whole["rate_rps"].n_unique() > 1 else ""
        says = (
            f"Each point is a sound setting{where}: J per served request, idle power included, against a latency. "
            "Those on the line are the front: no other setting is better in one of the two and not worse in the other."
        )
        keys = [*SETTING, "setting", "latency", "latency_ms", "energy_j", "on_front", "repeats"]
        name = "pareto" if rate is None else f"pareto-{rate:g}rps"
        drawn.append(
            SweepFigure(name, f"Energy against latency{where}", says, frame.select(keys), charts.fronts(frame))
        )
    return drawn


_LATENCIES = {"ttft": "TTFT p99, ms", "tbt": "mean TBT, ms"}


def parse_formats(text: str) -> list[str]:
    """Formats with commas between. Raises `AnalysisError`."""
    formats = [word.strip() for word in text.split(",")]
    for kind in formats:
        if kind not in FORMATS:
            raise AnalysisError(f"--format '{kind}': use {', '.join(FORMATS)}, several with commas")
    return formats


def write_figures(table: SweepTable, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write all figures of `table` into `folder` in each of `formats` (`FORMATS`); the files.

    Raises `AnalysisError` where the file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnalysisError(f"{folder}: cannot be made ({error.strerror or error})") from None
    written = []
    for figure in sweep_figures(table):
        for kind in formats:
            if kind == "csv":
                written.append(_write_csv(figure, folder, simulated=table.simulated))
            else:
                written.append(draw_to(figure.chart, folder, figure.name, kind, figure.title, subtitle_of(table)))
    return written


def subtitle_of(table: SweepTable) -> str:
    """What stands under a figure's title where it stands alone."""
    said = "SIMULATED: no GPU was measured. " if table.simulated else ""
    return f"{said}{table.model or 'unknown model'}, scope {table.scope}"


def _write_csv(figure: SweepFigure, folder: Path, *, simulated: bool) -> Path:
    path = folder / f"{figure.name}.csv"
    frame = figure.frame.with_columns(pl.lit(simulated).alias("simulated"))
    try:
        frame.write_csv(path)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path
