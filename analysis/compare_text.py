"""What a comparison says, for people: three sentences, tables, and what would tell more."""

from analysis.compare import FEWEST_PAIRS, MEASURED, MEASURED_TEXT, METRICS, TOLD, Comparison, Difference
from analysis.groups import ALL
from tracegen.console import format_si

SMALL_PERCENT = 0.5  # differences below it are of no use to anybody who chooses a setting
TEXTS = {MEASURED: MEASURED_TEXT, **METRICS}


def findings(comparison: Comparison) -> list[str]:
    """The comparison in three sentences: energy, latency, sizes. What the data does not tell is said to be so."""
    of = {(d.group, d.metric): d for d in comparison.differences}
    mark = "SIMULATED: " if comparison.simulated else ""
    energy = of[ALL, "energy_j"]
    if energy.mean_a is None or energy.difference_percent is None:
        first = f"{mark}the energy of {comparison.run_a} and {comparison.run_b} cannot be compared: no data"
    else:
        # The sign of a difference that may be chance would be read as an answer.
        change = f"{energy.difference_percent:+z.1f} %" if energy.verdict in TOLD else energy.verdict
        span = (
            ""
            if energy.low_percent is None
            else f"; 95 % interval {energy.low_percent:+z.1f} to {energy.high_percent:+z.1f} %"
        )
        first = (
            f"{mark}a request costs {_short(energy.mean_b)} J in {comparison.run_b} and {_short(energy.mean_a)} J in "
            f"{comparison.run_a}: {change} ({energy.pairs:,} {_counted(comparison)}{span}{_once(comparison)})"
        )
    latencies = [f"{METRICS[m].split()[0]} {_bracketed(of[ALL, m])}" for m in METRICS if m != "energy_j"]
    second = f"{mark}latency in {comparison.run_b} against {comparison.run_a}: {', '.join(latencies)}"
    sizes = [d for d in comparison.differences if d.metric == "energy_j" and d.verdict in TOLD]
    sizes = sorted((d for d in sizes if d.group != ALL), key=lambda d: d.difference_percent or 0.0)
    if not sizes:
        return [first, second, f"{mark}no size of request has enough {_counted(comparison)} to tell its energy apart"]
    dearest = max(sizes, key=lambda d: d.mean_b or 0.0)
    low, high = (f"{d.difference_percent:+z.1f} % ({d.group})" for d in (sizes[0], sizes[-1]))
    most = f"dearest is {dearest.group} with {_short(dearest.mean_b)} J"
    third = f"{mark}by size the change goes from {low} to {high}; {most}"
    return [first, second, third]


def _once(comparison: Comparison) -> str:
    """That the interval is of one run each, where it is."""
    return "" if comparison.repeats else "; one run each, so nothing is known of how runs vary"


def limits(comparison: Comparison) -> list[str]:
    """What the intervals do not speak of, and how much more data would tell what they leave open."""
    lines = []
    if not comparison.repeats:
        lines.append(
            "one run of a setting: the intervals do not speak of how much a repeated run would vary;\n"
            "repeat both settings to know (analysis compare A1 A2 A3 vs B1 B2 B3)"
        )
    open_still = [d for d in comparison.differences if d.group == ALL and d.verdict == "not distinguishable"]
    return [*lines, *(f"{TEXTS[d.metric]}: {_needed(d, comparison)}" for d in open_still)]


def _needed(difference: Difference, comparison: Comparison) -> str:
    """That there is not enough data to tell, and what would be."""
    if not difference.difference_percent and not difference.smallest_percent:
        return "the same, figure for figure"
    least = f"this much data finds a difference of {difference.smallest_percent:.2g} % in 4 of 5 cases"
    found = abs(difference.difference_percent or 0.0)
    if difference.smallest_percent is not None and difference.smallest_percent < SMALL_PERCENT:
        return f"no difference to speak of: {least}"
    if difference.needed is None:
        return f"not enough data to tell; {least}"
    if comparison.repeats:
        have = min(len(comparison.runs_a), len(comparison.runs_b))
        more = f"{max(difference.needed - have, 1):,} more repeats of each setting"
    else:
        more = f"{max(difference.needed - difference.pairs, 1):,} more {_counted(comparison)}"
    return f"not enough data to tell; {least}, one of {found:.2g} % would take about {more}"


def _counted(comparison: Comparison) -> str:
    """What the groups are counted in."""
    return "pairs" if comparison.paired else "requests"


def total_lines(comparison: Comparison) -> list[str]:
    """What each run came to, a line each."""
    letters = ["A"] * len(comparison.runs_a) + ["B"] * len(comparison.runs_b)
    mark = "SIMULATED  " if comparison.simulated else ""
    lines = []
    for letter, total in zip(letters, comparison.totals, strict=True):
        each = format_si(total[MEASURED], " J", 4)
        of = "" if total["scope"] is None else f", scope {total['scope']}"
        lines.append(f"{mark}{letter}: {total['run']}: {total['served']:,} served, {each} each with idle power{of}")
    return lines


def overall_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: every metric over all requests."""
    rows = [
        [
            TEXTS[d.metric],
            _short(d.mean_a),
            _short(d.mean_b),
            "-" if d.difference_percent is None else f"{d.difference_percent:+z.1f} %",
            "-" if d.low_percent is None else f"{d.low_percent:+z.1f} to {d.high_percent:+z.1f} %",
            "-" if d.effect_size is None else f"{d.effect_size:+,.{0 if abs(d.effect_size) >= 100 else 2}f}",
            d.verdict,
        ]
        for d in comparison.differences
        if d.group == ALL
    ]
    effect = "Hedges' g" if comparison.repeats else "Cohen's d"
    return ["mean", "A", "B", "B against A", "95 % interval", effect, "B is"], rows


def bucket_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: J/request in full and the other metrics' differences, one row a bucket.

    A difference that is not distinguishable from none stands in brackets, so does one of too few pairs.
    """
    groups: dict[str, dict[str, Difference]] = {}
    for difference in comparison.differences:
        if difference.group != ALL:
            groups.setdefault(difference.group, {})[difference.metric] = difference
    rows = []
    for group, by_metric in groups.items():
        joules = by_metric["energy_j"]
        rows.append(
            [
                group,
                f"{max(d.pairs for d in by_metric.values()):,}",
                _short(joules.mean_a),
                _short(joules.mean_b),
                *(_bracketed(by_metric[metric]) for metric in METRICS),
            ]
        )
    return ["", _counted(comparison), "J/request A", "B", "J/request", "TTFT", "TBT", "E2E"], rows


def bracket_note() -> str:
    """What brackets in `bucket_rows` mean."""
    return (
        f"(in brackets: not distinguishable from no difference, or fewer than {FEWEST_PAIRS} pairs;\n"
        "sizes are as many questions at once, so each is judged after Holm's correction)"
    )


def _bracketed(difference: Difference) -> str:
    if difference.difference_percent is None:
        return "-"
    text = f"{difference.difference_percent:+z.1f} %"
    return text if difference.verdict in TOLD else f"({text})"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
