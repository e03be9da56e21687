"""A sweep's tables for people: one a rate, and TP x clock of a metric by group."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.groups import ALL
from analysis.objectives import bounds_text
from analysis.recommend import setting_name
from analysis.sweep import MEANS, MISSING, SATURATED, SOUND, SweepTable
from tracegen.console import plural
from tracegen.errors import AnalysisError

MOST_LISTED = 20  # reasons why something is missing; more are counted
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Metric:
    """A figure of a sweep's tables: its column, what to call it, and what to multiply it by."""

    column: str
    text: str
    unit: float = 1.0


METRICS: Mapping[str, Metric] = {
    "ttft": Metric("ttft_mean_ms", "mean TTFT, ms"),
    "ttft_p50": Metric("ttft_p50_ms", "TTFT p50, ms"),
    "ttft_p99": Metric("ttft_p99_ms", "TTFT p99, ms"),
    "tbt": Metric("tbt_mean_ms", "mean TBT, ms"),
    "tbt_p99": Metric("tbt_p99_ms", "TBT p99, ms"),
    "e2e": Metric("e2e_mean_ms", "mean E2E, s", 1e-3),
    "e2e_p99": Metric("e2e_p99_ms", "E2E p99, s", 1e-3),
    "throughput": Metric("throughput_rps", "requests/s"),
    "tokens": Metric("output_tokens_s", "output tokens/s"),
    "power": Metric("power_w", "mean power, W"),
    "energy": Metric("energy_per_request_j", "J/request"),
    "token_energy": Metric("energy_per_output_token_j", "J/output token"),
    "slo": Metric("slo_attainment", "SLO met, %", 100.0),
}
DEFAULT_METRICS = ("energy",)


def parse_metrics(text: str | None) -> list[Metric]:
    """Metrics by their short names or columns, with commas between. Raises `AnalysisError`."""
    found = []
    for name in (word.strip() for word in text.split(",")) if text is not None else DEFAULT_METRICS:
        if name not in METRICS and name not in MEANS:
            raise AnalysisError(f"--metric '{name}': use {', '.join(METRICS)}, or a column of --csv")
        found.append(METRICS.get(name) or Metric(name, name))
    return found


def headline(table: SweepTable) -> str:
    """What the sweep is of, and how much of it there is."""
    mark = "SIMULATED  " if table.simulated else ""
    count = table.cells.height
    there = plural(count, "cell") if not table.missing else f"{count - len(table.missing)} of {plural(count, 'cell')}"
    time = "" if table.clock is None else f", {table.clock} time"
    of = f"{table.model or 'model unknown'}, engine {table.engine or 'unknown'}{time}, scope {table.scope}"
    return f"{mark}{table.path}: {of}; {there}"


def rate_tables(table: SweepTable) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells of one table a rate: every setting over all requests."""
    whole = table.settings.filter(pl.col("group") == ALL, pl.col("standing") != MISSING)
    odd = any(_is(row) for row in whole.iter_rows(named=True))
    headings = ["", "TTFT ms\np50 / p99", "TBT ms\nmean / p99", "done/s", "W", "J/request", "J/out\ntoken"]
    headings += [*(["SLO\nmet"] if table.slo is not None else []), *(["is"] if odd else [])]
    tables = []
    for (rate,), part in whole.group_by("rate_rps", maintain_order=True):
        rows = []
        for row in part.iter_rows(named=True):
            cells = [
                row_name(row),
                f"{short(row['ttft_p50_ms'])} / {short(row['ttft_p99_ms'])}",
                f"{short(row['tbt_mean_ms'])} / {short(row['tbt_p99_ms'])}",
                short(row["throughput_rps"]),
                short(row["power_w"]),
                with_half(row["energy_per_request_j"], row["energy_per_request_j_half"]),
                short(row["energy_per_output_token_j"]),
                *([percent(row["slo_attainment"])] if table.slo is not None else []),
                *([_is(row)] if odd else []),
            ]
            rows.append(["-" if cell == "- / -" else cell for cell in cells])
        tables.append((rate_name(rate), headings, rows))
    return tables


def _is(row: Mapping[str, Any]) -> str:
    """What keeps a setting's means from standing beside those of the others."""
    said = [] if row["standing"] == SOUND else [str(row["standing"])]
    said += ["clock not held"] if row["clock_held"] is False else []
    few = row["standing"] != SATURATED and row["repeats"] < row["planned"]
    return ", ".join([*said, *([f"{row['repeats']} of {row['planned']} repeats"] if few else [])])


def pivots(table: SweepTable, metric: Metric) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells of one table a rate: `metric` by group and TP (rows) and clock (columns)."""
    shown = table.settings.filter(pl.col("standing") != MISSING)
    clocks = shown["freq_mhz"].unique().sort(nulls_last=True).to_list()
    headings = [table.by, "", *("unlocked" if clock is None else f"{clock:g}" for clock in clocks)]
    tables = []
    rows_of = ["group", "tp", "batch_cap", "power_cap_w"]
    for (rate,), part in shown.group_by("rate_rps", maintain_order=True):
        by_row: dict[tuple[Any, ...], dict[float | None, str]] = {}
        for row in part.iter_rows(named=True):
            line = by_row.setdefault(tuple(row[name] for name in rows_of), {})
            line[row["freq_mhz"]] = _marked(row, metric)
        if not any(set(line.values()) - {"-"} for line in by_row.values()):
            continue
        groups = list(dict.fromkeys(key[0] for key in by_row))
        ordered = sorted(by_row, key=lambda key: (groups.index(key[0]), key[1], key[2] or 0, key[3] or 0.0))
        rows = [
            [
                group if not i or ordered[i - 1][0] != group else "",
                setting_name(tp, None, cap, watts).replace(" unlocked", ""),
                *(by_row[group, tp, cap, watts].get(clock, "-") for clock in clocks),
            ]
            for i, (group, tp, cap, watts) in enumerate(ordered)
        ]
        tables.append((f"{metric.text}, by clock in MHz; {rate_name(rate)}", headings, rows))
    return tables


def _marked(row: Mapping[str, Any], metric: Metric) -> str:
    """A figure; in brackets where its runs say that they are not valid."""
    if row["standing"] == SATURATED:
        return "sat."
    value = row.get(metric.column)
    text = "-" if value is None else short(value * metric.unit)
    return text if row["standing"] == SOUND or value is None else f"({text})"


def remarks(table: SweepTable) -> list[str]:
    """What the columns are, what to know of them, and what is missing and why."""
    whose = "the GPUs that serve" if table.scope == "gpu" else "every GPU of the node"
    lines = [f"W and J/request over all: of {whose}, idle included; by {table.by} joules are attributed, without idle"]
    if table.settings["repeats"].max() != 1:
        lines.append("±: half the 95 % interval over repeats")
    if table.slo is not None:
        lines.append(f"SLO met: of all requests, {bounds_text(table.slo)}")
    standings = set(table.settings["standing"])
    if SATURATED in standings:
        lines.append("saturated (sat.): more came than could be served, so figures would only tell how long it ran")
    if not table.settings["clock_held"].all():
        lines.append("clock not held: under load the GPUs' own limits kept them below the clock that was asked for")
    if "invalid" in standings:
        lines.append("invalid (in brackets): the runs' own verdicts are against them")
    lines += [f"note: {remark}" for remark in table.remarks]
    return [*lines, *missing_lines(table)]


def missing_lines(table: SweepTable) -> list[str]:
    """What has no figures or is not to be believed, and why: a line for all cells whose reasons differ in numbers."""
    reasons = {cell: (state, why) for cell, state, why in table.missing}
    for row in table.cells.filter(pl.col("standing") != SOUND).iter_rows(named=True):
        said = row["why"] or "; ".join(row["invalid_because"] or [])
        reasons.setdefault(row["cell"], (row["standing"], said))
    alike: dict[tuple[str, str], list[str]] = {}
    for cell, (state, why) in reasons.items():
        alike.setdefault((state, _NUMBER.sub("#", why)), []).append(cell)
    if not alike:
        return []
    lines = [
        f"  {cells[0]}{f' and {len(cells) - 1} more' if cells[1:] else ''}: {state}; {reasons[cells[0]][1]}"
        for (state, _), cells in alike.items()
    ]
    more = [] if len(lines) <= MOST_LISTED else [f"  and {len(lines) - MOST_LISTED} other reasons (--json has all)"]
    return ["without figures, or not to be believed:", *lines[:MOST_LISTED], *more]


def document(table: SweepTable) -> dict[str, Any]:
    """The sweep as a JSON document."""
    return {
        "sweep": str(table.path),
        "simulated": table.simulated,
        "clock": table.clock,
        "model": table.model,
        "engine": table.engine,
        "by": table.by,
        "scope": table.scope,
        "slo": None if table.slo is None else {"bounds_ms": dict(table.slo.bounds_ms), "source": table.slo.source},
        "settings": table.settings.to_dicts(),
        "cells": table.cells.to_dicts(),
        "groups": table.groups.to_dicts(),
        "missing": [{"cell": cell, "state": state, "why": why} for cell, state, why in table.missing],
        "remarks": table.remarks,
    }


def row_name(row: Mapping[str, Any]) -> str:
    """The setting of a row of `SweepTable.settings` or `cells`."""
    return setting_name(row["tp"], row["freq_mhz"], row["batch_cap"], row["power_cap_w"])


def rate_name(rate_rps: float | None) -> str:
    """A rate, or that the trace had its own."""
    return "at the trace's own rate" if rate_rps is None else f"at {rate_rps:g} requests/s"


def short(value: float | None) -> str:
    """A figure to three digits, `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_half(value: float | None, half: float | None) -> str:
    """A mean and half its interval."""
    if value is None or half is None:
        return short(value)
    return f"{short(value)} ±{half:,.0f}" if half >= 10 else f"{short(value)} ±{half:.2g}"


def percent(share: float | None) -> str:
    """A share in per cent."""
    return "-" if share is None else f"{100 * share:.1f} %"


def csv_ready(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` with its lists as text, for CSV has none."""
    lists: Sequence[str] = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(lists).list.join("; ")) if lists else frame
