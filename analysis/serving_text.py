"""How a run served, for people: tables and sentences."""

from collections.abc import Mapping
from typing import Any

from analysis.groups import ITL
from analysis.serving import Serving
from tracegen.console import plural

_ROWS = {
    "ttft_ms": "TTFT, ms",
    ITL: "ITL, ms",
    "tpot_ms": "TPOT, ms",
    "e2el_ms": "E2EL, ms",
    "ttft_from_schedule_ms": "TTFT from schedule, ms",
    "e2el_from_schedule_ms": "E2EL from schedule, ms",
    "dispatch_lag_ms": "dispatch lag, ms",
}


def latency_rows(answer: Serving) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: every latency over all requests."""
    percentiles = answer.question.percentiles
    rows = [[text, *(_short(answer.whole[f"{metric}_p{p:g}"]) for p in percentiles)] for metric, text in _ROWS.items()]
    return ["", *(f"p{p:g}" for p in percentiles)], rows


def group_rows(answer: Serving) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one row a group; of the percentiles the first and the last."""
    low, high = answer.question.percentiles[0], answer.question.percentiles[-1]
    marks = f"p{low:g}" if low == high else f"p{low:g} / p{high:g}"
    by_time = answer.question.by == "window"  # a meter knows of time, but not who is who
    headings = ["", "requests", "sent/s", f"TTFT ms\n{marks}", "ITL ms", "TPOT ms", "E2EL s", "goodput/s", "SLO met"]
    headings += ["tokens/s", *(["W"] if by_time else []), "J/out token"]

    def pair(row: Mapping[str, Any], metric: str, unit: float = 1.0) -> str:
        values = [row[f"{metric}_p{p:g}"] for p in dict.fromkeys((low, high))]
        return " / ".join("-" if v is None else _short(v / unit) for v in values)

    rows = [
        [
            row["group"],
            f"{row['requests']:,}",
            _short(row["request_rate"]),
            *(pair(row, metric) for metric in ("ttft_ms", ITL, "tpot_ms")),
            pair(row, "e2el_ms", 1e3),
            _short(row["request_goodput"]),
            "-" if row["slo_attainment"] is None else f"{100 * row['slo_attainment']:.1f} %",
            _short(row["output_throughput"]),
            *([_short(row["power_w"])] if by_time else []),
            _short(row["energy_per_output_token_j"]),
        ]
        for row in answer.figures.iter_rows(named=True)
    ]
    return headings, rows


def sentences(answer: Serving) -> list[str]:
    """Rates, goodput and what a watt bought, in lines."""
    row, question = answer.whole, answer.question
    kind = "steady window" if question.steady else "measured window"
    met = "-" if row["slo_attainment"] is None else f"{100 * row['slo_attainment']:.2f} %"
    rates = f"{_short(row['request_throughput'])} requests/s and {_short(row['output_throughput'])} output tokens/s"
    seconds = f"{row['duration_s']:,.1f} s"
    lines = [
        f"{row['answered']:,} of {plural(row['requests'], 'request')} answered; {rates} over the {kind}, {seconds}",
        f"goodput {_short(row['request_goodput'])} requests/s: {met} of all requests met {question.slo}",
    ]
    if row["power_w"] is None:
        lines.append(f"no power: {answer.why_no_energy}")
    else:
        lines.append(
            f"{_short(row['power_w'])} W (scope {answer.scope}), idle included: "
            f"{_short(row['output_tokens_per_joule'])} output tokens per joule, goodput "
            f"{_short(row['goodput_per_watt'])} requests/s per watt, energy-delay product "
            f"{_short(row['energy_delay_product'])} J s"
        )
    if answer.steady.start_ns is not None:
        span = f"{answer.steady.start_s:,.0f} to {answer.steady.end_s:,.0f} s of {answer.steady.sent_s:,.0f} s"
        lines.append(f"steady from {span} of sending, {_short(answer.steady.in_flight)} requests in flight")
    return [*lines, *(f"note: {remark}" for remark in answer.remarks)]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
