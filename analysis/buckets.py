"""Requests by size bucket or label: how many, how fast, how many joules, how many within their latency objectives."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.latency import answered, has_chunks, token_gaps
from analysis.requests import request_table
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.errors import AnalysisError

PERCENTILES = (50, 90, 99)
GROUPINGS = ("bucket", "label")
ALL, UNLABELLED = "all", "(none)"


@dataclass(frozen=True)
class Slo:
    """Latency objectives: TTFT for short, medium and long inputs (X counts as long), and mean TBT, ms.

    Defaults after DynamoLLM (Stojkovic et al., HPCA 2025).
    """

    ttft_ms: tuple[float, float, float] = (250.0, 400.0, 2000.0)
    tbt_ms: float = 100.0

    def met(self) -> pl.Expr:
        """Whether a request of `request_table` met both; one that failed did not.

        TBT is a request's mean (TPOT); a one-token answer has none.
        """
        short, medium, long = self.ttft_ms
        size = pl.col("bucket").str.head(1)
        bound_ms = pl.when(size == "S").then(short).when(size == "M").then(medium).otherwise(long)
        in_time = (pl.col("ttft_ms") <= bound_ms) & (pl.col("tpot_ms").fill_null(0.0) <= self.tbt_ms)
        return answered() & in_time.fill_null(value=False)


def bucket_table(run: Run, energy: pl.DataFrame | None, by: str = "bucket", slo: Slo | None = None) -> pl.DataFrame:
    """One row a group in order of size, then one for `all`; a figure without data is null.

    Latencies and energies are of the requests that were answered (`analysis.latency.answered`); `slo_attainment` is
    the share of all requests, one that failed having missed.
    Percentiles are over requests (TTFT, E2EL) and over tokens (TBT), or over requests' mean TPOT where the run has no
    chunk times; `tbt_source` says which. Energies are means over the requests whose energy is known:
    `energy_per_request_j`, and per token the joules of those whose tokens are known over their tokens, also with
    prefill's joules over input tokens and decode's over output tokens. `energy` is `analysis.energy.Energy.requests`.
    """
    if by not in GROUPINGS:
        raise AnalysisError(f"cannot group by '{by}'; use {' or '.join(GROUPINGS)}")
    table = request_table(run, energy).with_columns((slo or Slo()).met().alias("slo_met"))
    table = table.with_columns(pl.col(by).fill_null(UNLABELLED).alias("group"))
    gaps, source = _gaps(table)
    wholes = [(table, gaps), (table.with_columns(group=pl.lit(ALL)), gaps.with_columns(group=pl.lit(ALL)))]
    frame = pl.concat([_aggregate(rows, itl) for rows, itl in wholes])
    order = {name: i for i, name in enumerate((*BUCKETS, UNLABELLED))} if by == "bucket" else {UNLABELLED: 1}
    rank = pl.col("group").replace_strict({**order, ALL: 10**6}, default=0, return_dtype=pl.Int64)
    return frame.sort(rank, "group").with_columns(pl.lit(source).alias("tbt_source"))


def _gaps(table: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Times between tokens with their group, and where they come from."""
    table = table.filter(answered())
    if has_chunks(table):
        return token_gaps(table).join(table.select("request_id", "group"), on="request_id"), "tokens"
    return table.select("request_id", pl.col("tpot_ms").alias("itl_ms"), "group"), "requests"


def _aggregate(table: pl.DataFrame, gaps: pl.DataFrame) -> pl.DataFrame:
    """The figures of each group."""
    known = pl.col("energy_j").is_not_null() & answered()
    whole = {part: pl.col(f"{part}_j").filter(known).sum() for part in ("energy", "prefill", "decode")}

    def per_token(part: str, tokens: str) -> pl.Expr:
        counted = known & pl.col(tokens).is_not_null()  # or joules would be counted whose tokens are not
        return _ratio(pl.col(f"{part}_j").filter(counted).sum(), pl.col(tokens).filter(counted).cast(pl.Float64).sum())

    figures = table.group_by("group").agg(
        pl.len().alias("requests"),
        (pl.col("status") == "ok").sum().alias("ok"),
        *_percentiles(pl.col("ttft_ms").filter(answered()), "ttft_ms"),
        *_percentiles(pl.col("e2el_ms").filter(answered()), "e2el_ms"),
        known.sum().alias("requests_with_energy"),
        _ratio(whole["energy"], known.sum()).alias("energy_per_request_j"),
        per_token("energy", "input_tokens").alias("energy_per_input_token_j"),
        per_token("energy", "output_tokens").alias("energy_per_output_token_j"),
        per_token("prefill", "input_tokens").alias("energy_per_input_token_prefill_j"),
        per_token("decode", "output_tokens").alias("energy_per_output_token_decode_j"),
        _ratio(whole["prefill"], whole["energy"]).alias("prefill_share"),
        _ratio(whole["decode"], whole["energy"]).alias("decode_share"),
        pl.col("slo_met").mean().alias("slo_attainment"),
    )
    between = gaps.group_by("group").agg(_percentiles(pl.col("itl_ms"), "tbt_ms"))
    return figures.join(between, on="group", how="left").select(_COLUMNS)


def _percentiles(column: pl.Expr, name: str) -> list[pl.Expr]:
    return [column.quantile(p / 100, "linear").alias(f"{name}_p{p}") for p in PERCENTILES]


def _ratio(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    return pl.when(whole > 0).then(part / whole)


_COLUMNS = [
    "group",
    "requests",
    "ok",
    *(f"{name}_p{p}" for name in ("ttft_ms", "tbt_ms", "e2el_ms") for p in PERCENTILES),
    "requests_with_energy",
    "energy_per_request_j",
    "energy_per_input_token_j",
    "energy_per_output_token_j",
    "energy_per_input_token_prefill_j",
    "energy_per_output_token_decode_j",
    "prefill_share",
    "decode_share",
    "slo_attainment",
]


def parse_slo(ttft: str, tbt_ms: float) -> Slo:
    """`Slo` from `250,400,2000` (or one number for all inputs) and a bound on TBT. Raises `AnalysisError`."""
    try:
        bounds = [float(part) for part in ttft.split(",")]
    except ValueError:
        bounds = []
    bounds = bounds * 3 if len(bounds) == 1 else bounds
    if len(bounds) != 3 or min(bounds) <= 0 or tbt_ms <= 0:
        raise AnalysisError(f"--slo-ttft '{ttft}': give three positive numbers of ms, for example 250,400,2000")
    return Slo((bounds[0], bounds[1], bounds[2]), tbt_ms)


def rows_for_people(table: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `bucket_table` for a terminal or a page."""
    headings = ["", "requests", "TTFT ms", "TBT ms", "E2E s", "J/request", "J/in token", "J/out token"]
    headings += ["prefill", "decode", "SLO met"]
    return headings, [_cells(row) for row in table.iter_rows(named=True)]


def _cells(row: dict[str, Any]) -> list[str]:
    def trio(name: str, unit: float = 1.0) -> str:
        values = [row[f"{name}_p{p}"] for p in PERCENTILES]
        return "-" if values[0] is None else " / ".join(_short(v / unit) for v in values)

    ok, count = row["ok"], row["requests"]
    return [
        row["group"],
        f"{count:,}" if ok == count else f"{ok:,} ok of {count:,}",
        trio("ttft_ms"),
        trio("tbt_ms"),
        trio("e2el_ms", unit=1e3),
        *(_short(row[f"energy_per_{name}_j"]) for name in ("request", "input_token", "output_token")),
        *(_percent(row[name]) for name in ("prefill_share", "decode_share", "slo_attainment")),
    ]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
