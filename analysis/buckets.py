"""Requests by size bucket or label: how many, how fast, how many joules, how many within their latency objectives."""

from typing import Any

import polars as pl
import polars.selectors as cs

from analysis.groups import ITL, aggregate, group_by_column
from analysis.requests import CORE, request_table, worker_offset_ns
from analysis.slo import DEFAULT_SLO, Slo
from replay.rundir import Run
from tracegen.errors import AnalysisError

PERCENTILES = (50, 90, 99)
GROUPINGS = ("bucket", "label")
_LATENCIES = {"ttft_ms": "ttft_ms", ITL: "tbt_ms", "e2el_ms": "e2el_ms"}  # TBT is what this table calls ITL


def bucket_table(
    run: Run,
    energy: pl.DataFrame | None,
    by: str = "bucket",
    slo: Slo = DEFAULT_SLO,
    sent_ns: tuple[int, int] | None = None,
) -> pl.DataFrame:
    """One row a group in order of size, then one for `all`; a figure without data is null.

    Latencies and energies are of the requests that were answered (`analysis.latency.answered`); `slo_attainment` is
    the share of all requests, one that failed having missed.
    Percentiles are over requests (TTFT, E2EL) and over tokens (TBT, to 0.1 %), or over requests' mean TPOT where the
    run has no chunk times; `tbt_source` says which. Energies are means over the requests whose energy is known:
    `energy_per_request_j`, and per token the joules of those whose tokens are known over their tokens, also with
    prefill's joules over input tokens and decode's over output tokens. `energy` is `analysis.energy.Energy.requests`.
    `sent_ns`: only the requests sent in `[a, b)` on the replayer's clock, as `analysis.steady` finds it.
    """
    if by not in GROUPINGS:
        raise AnalysisError(
            f"cannot group by '{by}'; use {' or '.join(GROUPINGS)}, or 'analysis latency --by window' for time windows"
        )
    table = request_table(run, energy, CORE)
    if sent_ns is not None:
        at_ns = pl.col("sent_ns") - worker_offset_ns(run)
        table = table.filter(at_ns.is_between(*sent_ns, closed="left"))
    # Of ten million requests each column that is not needed is 80 MB.
    table = table.drop(cs.ends_with("_ns", "_from_schedule_ms", "_wanted"), "worker", "dispatch_lag_ms")
    frame, source = aggregate(run, table, group_by_column(table, by), slo, list(_LATENCIES), PERCENTILES)
    names = {f"{metric}_p{p}": f"{name}_p{p}" for metric, name in _LATENCIES.items() for p in PERCENTILES}
    return frame.rename(names).select(_COLUMNS).with_columns(pl.lit(source).alias("tbt_source"))


_COLUMNS = [
    "group",
    "requests",
    "ok",
    *(f"{name}_p{p}" for name in _LATENCIES.values() for p in PERCENTILES),
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


def remarks_for_people(table: pl.DataFrame, slo: Slo, scope: str | None) -> list[str]:
    """What the columns of `rows_for_people` are; `scope`: whose the joules are, None where there are none."""
    over = "all gaps between tokens" if table["tbt_source"][0] == "tokens" else "the means of requests"
    ttft, tbt = (",".join(f"{bound_ms:g}" for bound_ms in dict.fromkeys(slo.bounds_ms[m])) for m in ("ttft", "tpot"))
    met = f"TTFT within {ttft} ms (short, medium, long input) and a request's mean TBT within {tbt} ms"
    joules = [] if scope is None else [f"joules: attributed, idle energy apart; scope {scope}"]
    return [f"p50 / p90 / p99 of answered requests; TBT over {over}", *joules, f"SLO met: of all requests, {met}"]


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
