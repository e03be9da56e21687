"""How a run served: latency percentiles, rates, goodput and what a watt bought, for all and by group or time window.

Names are vLLM's (`request_throughput`, `request_goodput`, `output_throughput`, `total_token_throughput`) and AIPerf's
(`goodput_per_watt`, `output_tokens_per_joule`, `energy_delay_product`); docs/latency.md defines each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from analysis.groups import ITL, PER_REQUEST, Grouping, aggregate, group_by_column
from analysis.latency import answered
from analysis.requests import CORE, request_table, worker_offset_ns
from analysis.saved import RunEnergy
from analysis.slo import DEFAULT_SLO, Slo
from analysis.steady import NS_PER_S, Floats, Ints, Steady, elapsed, find_steady
from analysis.stretches import joules_between, meters
from replay.rundir import Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError, RunError

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
GROUPINGS = ("bucket", "label", "window")
METRICS = ("ttft_ms", ITL, *PER_REQUEST[1:])
MOST_WINDOWS = 2000  # as `analysis.gaps.MOST_GROUPS`
REMARKABLE_REL = 0.1  # between the steady window and the whole, or between requests and their measured energy


@dataclass(frozen=True)
class Question:
    """What to tell of a run: grouped how, by which objectives and percentiles, over all of it or its steady part."""

    by: str | None = None
    window_s: float = 60.0
    slo: Slo = DEFAULT_SLO
    percentiles: Sequence[float] = PERCENTILES
    steady: bool = False


@dataclass(frozen=True)
class Serving:
    """The answer. `figures` has one row a group and last `all`; times are on the replayer's clock."""

    run: Run
    question: Question
    window_ns: tuple[int, int]
    steady: Steady
    figures: pl.DataFrame
    itl_source: str  # tokens | requests
    scope: str | None  # whose joules: gpu | node
    why_no_energy: str | None
    remarks: tuple[str, ...]

    @property
    def whole(self) -> dict[str, Any]:
        """The row of all requests."""
        return self.figures.row(-1, named=True)

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        start, end = self.window_ns
        return {
            "run": self.run.name,
            "simulated": self.run.simulated,
            "window": {
                "kind": "steady" if self.question.steady else "measured",
                "start_ns": start,
                "end_ns": end,
                "duration_s": (end - start) / NS_PER_S,
            },
            "steady": self.steady.document(),
            "slo": {"bounds_ms": dict(self.question.slo.bounds_ms), "source": self.question.slo.source},
            "itl_source": self.itl_source,
            "scope": self.scope,
            "metric_percentiles": list(self.question.percentiles),
            "by": self.question.by,
            "all": self.whole,
            "groups": self.figures.head(-1).to_dicts() if self.question.by else [],
            "why_no_energy": self.why_no_energy,
            "remarks": list(self.remarks),
        }


def serving(run: Run, energy: RunEnergy, question: Question | None = None) -> Serving:
    """How `run` served. Raises `AnalysisError` for a question that it cannot answer.

    Rates are of the requests sent in the window, over its length: the run's measured window, drain included, or its
    steady window. Power is of the meter, idle included; joules per request and token are attributed.
    """
    question = question or Question()
    if question.by not in {*GROUPINGS, None}:
        raise AnalysisError(f"cannot group by '{question.by}'; use {', '.join(GROUPINGS)}")
    table = _on_one_clock(run, request_table(run, energy.requests, [*CORE, "done_ns"]))
    window = _measured_window(run, table)
    steady = _steady(table, window)
    everyone = table
    if question.steady:
        window = only_steady(run, steady)
        table = table.filter(pl.col("at_ns").is_between(*window, closed="left"))
    groups, edges = _grouping(table, window, question)
    figures, source = aggregate(run, table, groups, question.slo, METRICS, question.percentiles)
    measured_j, why = _measured_j(run, energy, edges)
    warmup_j, unknown = _warmup_j(run, energy, edges)
    spans_s = np.diff(edges) / NS_PER_S
    if question.by != "window":  # each group has the whole window, and the meter does not know groups
        spans_s = np.repeat(spans_s, len(groups.names))
        measured_j = [*[None] * len(groups.names), measured_j[-1]]
        warmup_j = [*[0.0] * len(groups.names), warmup_j[-1]]
    figures = _with_rates(figures, [*spans_s, (window[1] - window[0]) / NS_PER_S], measured_j, warmup_j)
    if question.by == "window":
        figures = _made_in_each(figures, everyone, edges, warmup_j[:-1])
        start_s = pl.Series("start_s", [*(edges[:-1] - edges[0]) / NS_PER_S, 0.0])
        figures = figures.insert_column(1, start_s)
    remarks = (*unknown, *_remarks(table, figures, steady, question, source))
    return Serving(run, question, window, steady, figures, source, energy.scope, why, remarks)


def steady_part(run: Run) -> tuple[Steady, list[str]]:
    """The steady window of `run`, and in words why there is none or where its latencies are far from the whole run's.

    Raises `AnalysisError` where no request was sent.
    """
    table = _on_one_clock(run, request_table(run, None, [*CORE, "done_ns"]))
    steady = _steady(table, _measured_window(run, table))
    if steady.why is not None:
        return steady, [steady.why]
    everyone = Grouping([], pl.repeat(0, table.height, dtype=pl.UInt32, eager=True))
    whole = aggregate(run, table, everyone, DEFAULT_SLO, ("ttft_ms", "e2el_ms"), PERCENTILES)[0].row(-1, named=True)
    return steady, _difference(table, whole, steady, Question())


def only_steady(run: Run, steady: Steady) -> tuple[int, int]:
    """The window of `steady` in ns. Raises `AnalysisError` where there is none."""
    if steady.start_ns is None or steady.end_ns is None:
        raise AnalysisError(f"{run.path}: {steady.why}; without --steady all requests are shown")
    return steady.start_ns, steady.end_ns


def _on_one_clock(run: Run, table: pl.DataFrame) -> pl.DataFrame:
    """`table` with the times that matter here, on the replayer's clock.

    `at_ns`: when a request was sent, or should have been if it was not `sent`; `begun_ns`, `gone_ns`: its first sign of
    life and its last.
    """
    offset = worker_offset_ns(run)
    return table.with_columns(
        pl.col("sent_ns").is_not_null().alias("sent"),
        (pl.coalesce("sent_ns", "scheduled_ns") - offset).alias("at_ns"),
        (pl.col("first_token_ns") - offset).alias("begun_ns"),
        (pl.coalesce("last_token_ns", "done_ns") - offset).alias("gone_ns"),
    ).drop("worker", "done_ns", "first_token_ns", "last_token_ns", "sent_ns", "scheduled_ns", "output_tokens_wanted")


def _measured_window(run: Run, table: pl.DataFrame) -> tuple[int, int]:
    """The manifest's window; where it has none, from the first send to the last response."""
    start, end = run.manifest.get("measure_start_ns"), run.manifest.get("measure_end_ns")
    sent = table.select(pl.col("at_ns").min(), pl.max_horizontal(pl.col("gone_ns").max(), pl.col("at_ns").max()))
    first, last = sent.row(0) if table.height else (None, None)
    start, end = (first if start is None else start), (last if end is None else end)
    if start is None or end is None or end <= start:
        raise AnalysisError(f"{run.path}: no request was sent, so there is no window to tell of")
    return int(start), int(end)


def _steady(table: pl.DataFrame, window: tuple[int, int]) -> Steady:
    seen = table.lazy().filter("sent").select("at_ns", "gone_ns").collect()
    gone = seen["gone_ns"].fill_null(window[1])
    return find_steady(seen["at_ns"].to_numpy(), np.maximum(gone.to_numpy(), seen["at_ns"].to_numpy()))


def _grouping(table: pl.DataFrame, window: tuple[int, int], question: Question) -> tuple[Grouping, Ints]:
    """The groups, and the edges in ns of the stretches of time that they are of: windows, or one for all."""
    start, end = window
    if question.by is None:
        return Grouping([], pl.repeat(0, table.height, dtype=pl.UInt32, eager=True)), np.array([start, end])
    if question.by != "window":
        return group_by_column(table, question.by), np.array([start, end])
    width_ns = round(question.window_s * NS_PER_S)
    if width_ns <= 0:
        raise AnalysisError(f"--window {question.window_s:g}: give a positive length, for example 60s")
    count = -(-(end - start) // width_ns)
    if count > MOST_WINDOWS:
        raise AnalysisError(
            f"--window {question.window_s:g}s makes {count:,} windows, more than {MOST_WINDOWS:,}; give a longer one"
        )
    edges = np.minimum(start + width_ns * np.arange(count + 1), end)
    # What was sent a moment before the window or after it is counted in the first or last.
    code = np.clip((table["at_ns"].to_numpy() - start) // width_ns, 0, count - 1)
    at_s = [f"{round((edge - start) / NS_PER_S, 1):g}" for edge in edges]
    names = [f"{a}-{b} s" for a, b in pairwise(at_s)]
    return Grouping(names, pl.Series(code, dtype=pl.UInt32)), edges


def _measured_j(run: Run, energy: RunEnergy, edges: Ints) -> tuple[list[float | None], str | None]:
    """The meter's joules in each stretch between `edges` and in all; or Nones and why.

    The shape over time is that of the power samples; their sum is scaled to the run's measured joules, which may come
    from the energy counter.
    """
    if energy.summary is None:
        return [None] * len(edges), energy.why or "the run's energy was not attributed"
    whole = energy.summary["window"]
    ends = (int(whole["start_ns"]), int(whole["end_ns"]))
    if len(edges) == 2 and abs(edges[0] - ends[0]) + abs(edges[1] - ends[1]) < NS_PER_S:
        return [energy.summary["measured_j"]] * 2, None
    cuts = np.unique(np.clip([*ends, *edges], *ends))
    try:
        parts = joules_between(run, meters(run, str(energy.scope)), [int(c) for c in cuts])
    except (AnalysisError, RunError) as error:
        return [None] * len(edges), str(error)
    if parts.sum() <= 0:
        return [None] * len(edges), "the power samples say nothing of when the energy was used"
    upto = np.concatenate([[0.0], np.cumsum(parts)]) * (energy.summary["measured_j"] / parts.sum())
    at = np.interp(edges.astype(np.float64) - cuts[0], (cuts - cuts[0]).astype(np.float64), upto)
    return [*(float(j) for j in np.diff(at)), float(at[-1] - at[0])], None


def _warmup_j(run: Run, energy: RunEnergy, edges: Ints) -> tuple[list[float], list[str]]:
    """Of the meter's joules between `edges` and in all those of the warm-up's requests, and what to say of them.

    They are known of the measured window as a whole: whoever has all the time in which these requests ended has all of
    them. A stretch that has a part of that time is given none, and is said to have some.
    """
    warmup_j = float((energy.summary or {}).get("warmup_j") or 0.0)
    if energy.summary is None or not warmup_j:
        return [0.0] * len(edges), []
    first_ns = int(energy.summary["window"]["start_ns"])
    gone = pl.coalesce("done_ns", "last_token_ns") - worker_offset_ns(run)
    last_ns = run.scan("warmup", ["worker", "done_ns", "last_token_ns"]).select(gone.max()).collect().item()
    last_ns = int(energy.summary["window"]["end_ns"]) if last_ns is None else last_ns
    told_j, parted = [], False
    for start_ns, end_ns in [*pairwise(edges.tolist()), (int(edges[0]), int(edges[-1]))]:
        whole = start_ns - first_ns < NS_PER_S and end_ns >= last_ns
        told_j.append(warmup_j if whole else 0.0)
        parted |= not whole and start_ns < last_ns
    text = f"{format_si(warmup_j, ' J', 4)} went into requests that were due in the warm-up"
    said = [f"{text}: left out of what is per joule or watt"] if any(told_j) else []
    if parted:
        said.append(f"{text}, how much of it in each stretch of time is not known: what is per joule or watt has it")
    return told_j, said


def _with_rates(
    figures: pl.DataFrame, spans_s: Sequence[float], measured_j: Sequence[float | None], warmup_j: Sequence[float]
) -> pl.DataFrame:
    """`figures` with what is per second, per watt and per measured joule, less the `warmup_j` that others took."""
    span, measured, joules = pl.col("duration_s"), pl.col("measured_j"), pl.col("measured_j") - pl.Series(warmup_j)
    return figures.with_columns(
        pl.Series("duration_s", spans_s, pl.Float64), pl.Series("measured_j", measured_j, pl.Float64)
    ).with_columns(
        (pl.col("requests") / span).alias("request_rate"),
        (pl.col("answered") / span).alias("request_throughput"),
        (pl.col("slo_met") / span).alias("request_goodput"),
        (pl.col("output_tokens") / span).alias("output_throughput"),
        ((pl.col("input_tokens") + pl.col("output_tokens")) / span).alias("total_token_throughput"),
        pl.when(measured > 0).then(measured / span).alias("power_w"),
        pl.when(joules > 0).then(pl.col("slo_met") / joules).alias("goodput_per_watt"),
        pl.when(joules > 0).then(pl.col("output_tokens") / joules).alias("output_tokens_per_joule"),
        pl.when(pl.col("answered") > 0)
        .then(joules / pl.col("answered") * pl.col("e2el_ms_mean") / 1e3)
        .alias("energy_delay_product"),
    )


def _made_in_each(figures: pl.DataFrame, table: pl.DataFrame, edges: Ints, warmup_j: Sequence[float]) -> pl.DataFrame:
    """`figures` of windows with what came out in each, whenever it was sent: else a queue would look like throughput.

    An answer's tokens are spread evenly from its first to its last; its input counts when the first came.
    """
    names = ("begun_ns", "gone_ns", "input_tokens", "output_tokens")
    rows = table.lazy().filter(answered()).select(names).drop_nulls(names[:2]).fill_null(0).collect()
    begun_s, gone_s = (((rows[n] - edges[0]) / NS_PER_S).to_numpy() for n in names[:2])
    given, made = (rows[n].to_numpy().astype(np.float64) for n in names[2:])
    edges_s = (edges - edges[0]) / NS_PER_S
    flows = gone_s > begun_s  # else all tokens came at one moment
    rate = made[flows] / (gone_s[flows] - begun_s[flows])
    tokens = np.diff(_since(begun_s[flows], edges_s, rate) - _since(gone_s[flows], edges_s, rate))
    tokens += np.histogram(gone_s[~flows], edges_s, weights=made[~flows])[0]
    whole, joules = figures.tail(1), pl.col("measured_j") - pl.Series(warmup_j)
    each = figures.head(-1).with_columns(
        pl.Series("request_throughput", np.histogram(gone_s, edges_s)[0]) / pl.col("duration_s"),
        pl.Series("output_throughput", tokens) / pl.col("duration_s"),
        pl.Series("total_token_throughput", tokens + np.histogram(begun_s, edges_s, weights=given)[0])
        / pl.col("duration_s"),
        pl.when(joules > 0).then(pl.Series(tokens) / joules).alias("output_tokens_per_joule"),
        pl.lit(None, pl.Float64).alias("energy_delay_product"),  # its joules and its requests are not the same ones
    )
    return pl.concat([each, whole])


def _since(times_s: Floats, edges_s: Floats, weights: Floats) -> Floats:
    """`elapsed` of times in any order."""
    order = np.argsort(times_s, kind="stable")  # they are nearly in order, which this makes use of
    return elapsed(times_s[order], edges_s, weights[order])


def _remarks(
    table: pl.DataFrame, figures: pl.DataFrame, steady: Steady, question: Question, source: str
) -> tuple[str, ...]:
    """What a reader should know beside the figures."""
    remarks = []
    whole = figures.row(-1, named=True)
    unknown = table.filter(pl.col("output_tokens").is_null() & answered()).height
    if unknown and "tpot" in question.slo.bounds_ms:
        remarks.append(f"{unknown:,} answers have no token count: their TPOT is not known, so they count as missed")
    if source == "requests" and whole["answered"]:
        remarks.append("ITL is over requests' mean TPOT, for the run has no times of chunks")
    if steady.start_ns is None:
        remarks.append(str(steady.why))
    elif not question.steady:
        remarks += _difference(table, whole, steady, question)
    return tuple(remarks)


def _difference(table: pl.DataFrame, whole: Mapping[str, Any], steady: Steady, question: Question) -> list[str]:
    """Where the steady window's latencies are far from the whole run's."""
    inside = pl.col("at_ns").is_between(steady.start_ns, steady.end_ns, closed="left") & answered()
    exprs = [
        pl.col(f"{metric}_ms").quantile(p / 100, "linear").alias(f"{metric}_ms_p{p:g}")
        for metric in ("ttft", "e2el")
        for p in question.percentiles
    ]
    part = table.lazy().filter(inside).select(exprs).collect().row(0, named=True)
    said = []
    for metric in ("ttft", "e2el"):
        for p in question.percentiles:
            there, all_of_it = part[f"{metric}_ms_p{p:g}"], whole[f"{metric}_ms_p{p:g}"]
            if there is not None and all_of_it and abs(there / all_of_it - 1) > REMARKABLE_REL:
                said.append(f"{metric.upper()} p{p:g} is {there:,.0f} ms there and {all_of_it:,.0f} ms over all")
    if not said:
        return []
    return [
        f"steady from {steady.start_s:,.0f} to {steady.end_s:,.0f} s after the first send: {'; '.join(said)} (--steady)"
    ]


def parse_percentiles(text: str) -> tuple[float, ...]:
    """`50,90,99` as numbers. Raises `AnalysisError`."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values) or len(set(values)) < len(values):
        raise AnalysisError(
            f"--metric-percentiles '{text}': give different numbers from 0 to 100, for example 50,90,99"
        )
    return values
