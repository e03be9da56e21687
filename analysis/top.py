"""Who cost most in a run: its requests, or its clients, sessions, labels or buckets, in order of a figure."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.groups import UNLABELLED
from analysis.requests import CORE, CORE_ENERGY, beside, request_table, stored_columns
from analysis.saved import RunEnergy
from replay.rundir import Run
from tracegen.console import format_si, plural
from tracegen.errors import AnalysisError

KINDS = ("request", "client", "session", "label", "bucket")
OF_TRACE = {"client": "client_id", "session": "session_id"}
SUMMED = (*CORE_ENERGY, "input_tokens", "output_tokens")  # what adds up over requests; latencies are means
LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
METRICS = (*SUMMED, *LATENCIES)
BAR = 24  # columns


@dataclass(frozen=True)
class Top:
    """The first `rows` by `metric`: `name`, `requests`, `value`, `share` of all (null for latencies), `energy_j`.

    Of single requests also bucket, label, input_tokens, output_tokens and status. `count`: how many there are in all.
    """

    run: Run
    by: str
    metric: str
    rows: pl.DataFrame
    count: int
    scope: str | None
    remark: str | None

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "run": self.run.name,
            "simulated": self.run.simulated,
            "by": self.by,
            "metric": self.metric,
            "of": "mean" if self.metric in LATENCIES and self.by != "request" else "sum",
            "scope": self.scope,
            "count": self.count,
            "remark": self.remark,
            "top": self.rows.to_dicts(),
        }


def top(run: Run, energy: RunEnergy, by: str = "request", metric: str = "energy_j", n: int = 10) -> Top:
    """The `n` of `run` that have most of `metric`: the sum over their requests, of a latency the mean.

    Joules are attributed, without idle; `share` is of those of all requests. Raises `AnalysisError` for another `by` or
    `metric`, and where the trace does not have what `by` names or the run no energy.
    """
    if by not in KINDS:
        raise AnalysisError(f"cannot list by '{by}'; use {', '.join(KINDS)}")
    if metric not in METRICS:
        raise AnalysisError(f"--metric '{metric}': use one of {', '.join(METRICS)}")
    if n < 1:
        raise AnalysisError(f"-n {n}: give a number of rows from 1 up")
    if metric in CORE_ENERGY and energy.requests is None:
        raise AnalysisError(f"{run.path}: no energy to list by ({energy.why}); latencies: --metric e2el_ms")
    table = request_table(run, energy.requests, CORE).with_columns(pl.col("bucket", "label", "status").cast(pl.String))
    unknown = table[metric].null_count()
    remark = f"{metric} is not known of {plural(unknown, 'request')}, which are left out" if unknown else None
    table = table.with_columns(_named(run, table, by)).drop_nulls(metric)
    whole = float(table[metric].sum())
    share = pl.col("value") / whole if metric in SUMMED and whole > 0 else pl.lit(None, pl.Float64)
    if by == "request":
        details = ("bucket", "label", "input_tokens", "output_tokens", "status")
        frame = table.select(
            "name",
            pl.lit(1, pl.Int64).alias("requests"),
            pl.col(metric).cast(pl.Float64).alias("value"),
            "energy_j",
            *details,
        )
    else:
        value = pl.col(metric).mean() if metric in LATENCIES else pl.col(metric).cast(pl.Float64).sum()
        joules = pl.when(pl.col("energy_j").count() > 0).then(pl.col("energy_j").sum())
        frame = table.group_by("name").agg(
            pl.len().cast(pl.Int64).alias("requests"), value.alias("value"), joules.alias("energy_j")
        )
    rows = frame.with_columns(share.alias("share")).sort("value", "name", descending=[True, False]).head(n)
    return Top(run, by, metric, rows, frame.height, energy.scope, remark)


def _named(run: Run, table: pl.DataFrame, by: str) -> pl.Expr | pl.Series:
    """Whose each request is, as text."""
    if by in {"bucket", "label"}:
        return pl.col(by).fill_null(UNLABELLED).alias("name")
    if by == "request":
        return pl.col("request_id").cast(pl.String).alias("name")
    column = OF_TRACE[by]
    if not run.has("trace") or column not in stored_columns(run, "trace"):
        raise AnalysisError(
            f"{run.path / 'trace.parquet'}: has no column '{column}', so requests have no {by}; "
            "use --by request, label or bucket"
        )
    found = beside(table["request_id"], run.scan("trace", ["request_id", column]).collect())
    return found[column].cast(pl.String).fill_null("(none)").alias("name")


def rows_for_people(found: Top) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, with a bar of each value against the greatest."""
    alone = found.by == "request"
    most = max((abs(value) for value in found.rows["value"]), default=0.0)
    heading = found.metric if alone or found.metric in SUMMED else f"mean {found.metric}"
    summed = found.metric in SUMMED
    rows = []
    for row in found.rows.iter_rows(named=True):
        size = f"{row['input_tokens']:,} in, {row['output_tokens'] or 0:,} out" if alone else f"{row['requests']:,}"
        rows.append(
            [
                row["name"],
                *([row["bucket"] or "-"] if alone else []),
                size,
                format_si(row["value"], digits=4),
                *(["-" if row["share"] is None else f"{100 * row['share']:.1f} %"] if summed else []),
                "█" * round(BAR * abs(row["value"]) / most) if most else "",
            ]
        )
    sizes = ["bucket", "tokens"] if alone else ["requests"]
    return [found.by, *sizes, heading, *(["of all"] if summed else []), ""], rows


def title(found: Top) -> str:
    """What the table is."""
    mark = "SIMULATED  " if found.run.simulated else ""
    kinds = plural(found.count, found.by)
    shown = f"the {found.rows.height} of {kinds} with most" if found.rows.height < found.count else f"{kinds}, by"
    return f"{mark}{found.run.name}: {shown} {found.metric}"


def remarks(found: Top) -> list[str]:
    """What the figures are."""
    joules = [f"joules: attributed, without idle; scope {found.scope}"] if found.metric in CORE_ENERGY else []
    return [*joules, *([f"note: {found.remark}"] if found.remark else [])]
