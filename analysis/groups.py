"""Figures of requests by group: one aggregation for size buckets, labels and time windows, and for all at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.gaps import GapHistogram, chunk_batches, token_gaps
from analysis.latency import answered
from analysis.slo import Slo
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.errors import AnalysisError

ALL, UNLABELLED = "all", "(none)"
PER_REQUEST = ("ttft_ms", "tpot_ms", "e2el_ms", "ttft_from_schedule_ms", "e2el_from_schedule_ms", "dispatch_lag_ms")
ITL, LAG = "itl_ms", PER_REQUEST[-1]
_ORDER = {"code": pl.UInt32(), "group": pl.String()}
_COUNTED = (
    *("code", "ok", "answered", "met", "known", "input_tokens", "output_tokens"),
    *("energy_j", "prefill_j", "decode_j"),
)
_MEANS = ("ttft_ms", "tpot_ms", "e2el_ms")


@dataclass(frozen=True)
class Grouping:
    """The groups' names in the order to show, and for each row of a request table the number of its group."""

    names: Sequence[str]
    code: pl.Series  # UInt32


def group_by_column(table: pl.DataFrame, column: str) -> Grouping:
    """The groups of `table` by `bucket` (in order of size) or `label` (by name, the unlabelled last)."""
    found = table[column].unique().to_list()
    order = BUCKETS if column == "bucket" else sorted(name for name in found if name is not None)
    names = [*(name for name in order if name in found), *([UNLABELLED] if None in found else [])]
    # An Enum's physical values are the places of its names.
    return Grouping(
        names, table[column].cast(pl.String).fill_null(UNLABELLED).cast(pl.Enum(names)).to_physical().cast(pl.UInt32)
    )


def aggregate(
    run: Run, table: pl.DataFrame, groups: Grouping, slo: Slo, metrics: Sequence[str], percentiles: Sequence[float]
) -> tuple[pl.DataFrame, str]:
    """One row a group, also an empty one, and last one for `all`; and what ITL was taken from, `tokens` or `requests`.

    `table` is of `analysis.requests.request_table`, some or all of its rows. `metrics` are of `PER_REQUEST` and `ITL`;
    columns `<metric>_p<percentile>` are over answered requests, ITL over their tokens, or over requests' mean
    TPOT where the run has no times of chunks, dispatch lag over all that were sent; `<metric>_mean` of TTFT, TPOT and
    E2EL are over answered requests too. `slo_attainment` is the share of all requests that met `slo`, and
    `slo_attainment_<metric>` one of its objectives. A figure without data is null.
    """
    table = table.with_columns(
        groups.code.alias("code"), answered().alias("answered"), (pl.col("status") == "ok").alias("ok")
    )
    longest = "itl" in slo.bounds_ms
    gaps, worst = _gaps(run, table, len(groups.names), each=longest) if longest or ITL in metrics else (None, None)
    if longest:
        table = _with_longest(run, table, worst)
    told = {*_MEANS, *metrics} - {ITL}
    known = (pl.col("energy_j").is_not_null() & pl.col("answered")).alias("known")
    each = {f"met_{metric}": met for metric, met in slo.met_each().items()}
    table = table.with_columns(slo.met().alias("met"), known, **each).select(*_COUNTED, *told, *each)
    if not table["answered"].all():  # a request that failed is not fast
        table = table.with_columns(pl.when("answered").then(m).alias(m) for m in told - {LAG})
    sums = table.group_by("code").agg(_sums(each))
    order = pl.DataFrame({"code": range(len(groups.names)), "group": groups.names}, _ORDER)
    whole = sums.select(pl.lit(ALL).alias("group"), pl.exclude("code").sum())
    rows = order.join(sums, on="code", how="left", maintain_order="left").with_columns(pl.exclude(*_ORDER).fill_null(0))
    frame = pl.concat([rows.drop("code"), whole]).with_columns(_ratios(each)).drop("^_.*$")
    by_token = gaps is not None and gaps.any()
    taken = [(m, m) for m in metrics if m != ITL] + ([(ITL, "tpot_ms")] if ITL in metrics and not by_token else [])
    exprs = [e for name, column in taken for e in _percentiles(column, name, percentiles)]
    marks = order.join(table.group_by("code").agg(exprs), on="code", how="left", maintain_order="left")
    frame = frame.hstack(pl.concat([marks.drop(*_ORDER), table.select(exprs)]))
    if gaps is not None and by_token and ITL in metrics:
        values = gaps.quantiles([p / 100 for p in percentiles])[-frame.height :]  # without groups all are of one
        columns = zip([_name(ITL, p) for p in percentiles], zip(*values, strict=True), strict=True)
        frame = frame.with_columns(pl.Series(name, list(column), pl.Float64) for name, column in columns)
    return frame, "tokens" if by_token else "requests"


def _with_longest(run: Run, table: pl.DataFrame, longest: pl.Series | None) -> pl.DataFrame:
    """`table` with `itl_ms`. Raises `AnalysisError` where the run has no times of chunks."""
    if longest is None:
        raise AnalysisError(
            f"{run.path / 'requests.parquet'}: has no columns chunk_ns and chunk_tokens, so an itl objective cannot be "
            "judged; use tpot, or replay with --save-chunks"
        )
    return table.with_columns(longest)


def _gaps(run: Run, table: pl.DataFrame, groups: int, *, each: bool) -> tuple[GapHistogram | None, pl.Series | None]:
    """The gaps between tokens of the answered requests in `table` by group, and the longest of `each` request.

    None where the run has no times of chunks.
    """
    place = Places(table["request_id"].to_numpy())
    code = np.where(table["answered"].to_numpy(), table["code"].cast(pl.Int64).to_numpy(), -1)
    histogram: GapHistogram | None = None
    longest = np.full(table.height, np.nan)
    for batch in chunk_batches(run):
        histogram = histogram or GapHistogram(max(groups, 1))
        row = place.of(batch["request_id"].to_numpy())
        gaps = token_gaps(batch)
        gap_row = row[gaps.row]
        counted = (gap_row >= 0) & (code[gap_row] >= 0)
        histogram.add(code[gap_row[counted]], gaps.itl_ms[counted], gaps.tokens[counted])
        if each:
            np.fmax.at(longest, gap_row[counted], gaps.itl_ms[counted])
    return (None, None) if histogram is None else (histogram, pl.Series(ITL, longest).fill_nan(None))


class Places:
    """In which row of a table an id stands."""

    def __init__(self, ids: NDArray[np.uint64]) -> None:
        self._order = None if np.all(ids[1:] > ids[:-1]) else np.argsort(ids)
        self._ids = ids if self._order is None else ids[self._order]

    def of(self, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row of each of `ids`; -1 for one that is not there."""
        if not self._ids.size:
            return np.full(ids.size, -1)
        place = np.minimum(np.searchsorted(self._ids, ids), self._ids.size - 1)
        row = place if self._order is None else self._order[place]
        return np.where(self._ids[place] == ids, row, -1)


def _sums(met: Iterable[str]) -> list[pl.Expr]:
    """Counts, tokens and joules of a group, which add up over groups; those that begin with `_` make `_ratios`.

    `met`: columns that say whether a request met one objective.
    """
    known = pl.col("known")

    def joules(part: str, tokens: str) -> list[pl.Expr]:
        counted = known & pl.col(tokens).is_not_null()  # or joules would be counted whose tokens are not
        return [
            pl.col(f"{part}_j").filter(counted).sum().alias(f"_{part}_of_{tokens}_j"),
            pl.col(tokens).filter(counted).cast(pl.Int64).sum().alias(f"_{part}_{tokens}"),
        ]

    return [
        pl.len().cast(pl.Int64).alias("requests"),
        *(pl.col(name).sum().cast(pl.Int64) for name in ("ok", "answered")),
        *(pl.col(name).filter("answered").cast(pl.Int64).sum() for name in ("input_tokens", "output_tokens")),
        *(pl.col(name).sum().alias(f"_{name}") for name in (*_MEANS, *met)),
        *(pl.col(name).count().cast(pl.Int64).alias(f"_{name}_count") for name in _MEANS),
        known.sum().cast(pl.Int64).alias("requests_with_energy"),
        *(pl.col(f"{part}_j").filter(known).sum().alias(f"_{part}_j") for part in ("energy", "prefill", "decode")),
        *(e for part, tokens in _PER_TOKEN for e in joules(part, tokens)),
        pl.col("met").sum().cast(pl.Int64).alias("slo_met"),
    ]


_PER_TOKEN = {
    ("energy", "input_tokens"): "energy_per_input_token_j",
    ("energy", "output_tokens"): "energy_per_output_token_j",
    ("prefill", "input_tokens"): "energy_per_input_token_prefill_j",
    ("decode", "output_tokens"): "energy_per_output_token_decode_j",
}


def _ratios(met: Iterable[str]) -> list[pl.Expr]:
    """Means and shares from `_sums`; null where there is nothing to divide by."""
    return [
        *(_ratio(f"_{name}", f"_{name}_count").alias(f"{name}_mean") for name in _MEANS),
        _ratio("_energy_j", "requests_with_energy").alias("energy_per_request_j"),
        *(_ratio(f"_{p}_of_{t}_j", f"_{p}_{t}").alias(name) for (p, t), name in _PER_TOKEN.items()),
        _ratio("_prefill_j", "_energy_j").alias("prefill_share"),
        _ratio("_decode_j", "_energy_j").alias("decode_share"),
        _ratio("slo_met", "requests").alias("slo_attainment"),
        *(_ratio(f"_{name}", "requests").alias(f"slo_attainment_{name.removeprefix('met_')}") for name in met),
    ]


def _percentiles(column: str, name: str, percentiles: Sequence[float]) -> list[pl.Expr]:
    return [pl.col(column).quantile(p / 100, "linear").alias(_name(name, p)) for p in percentiles]


def _name(metric: str, percentile: float) -> str:
    return f"{metric}_p{percentile:g}"


def _ratio(part: str, whole: str) -> pl.Expr:
    return pl.when(pl.col(whole) > 0).then(pl.col(part) / pl.col(whole))
