"""A trace's description as text for a terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES
from tracegen.console import format_si, plural, print_table, say
from tracegen.durations import NS_PER_S, format_duration

if TYPE_CHECKING:
    from tracegen.fit.run import Fit

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"


def print_description(document: Mapping[str, Any]) -> None:
    """Print what `tracegen.describe.describe` returned: figures, buckets, histograms."""
    say(headline(document))
    for i, step in enumerate(_steps(document["metadata"])):
        say(f"{'then' if i else 'made'} by {step}")
    say()
    for name, text in _arrival_figures(document).items():
        say(f"{name:<20} {text}")
    say()
    columns = ("mean", "cv", "p10", "p50", "p90", "p99", "max")
    print_table(
        ["tokens", *columns],
        [
            [side, *(format_si(document[f"{side}_tokens"][c], digits=4) for c in columns)]
            for side in ("input", "output")
        ],
    )
    say()
    _print_buckets(document["buckets"])
    for side in ("input", "output"):
        say(f"\n{side} tokens")
        for line in bars(document["histograms"][f"{side}_tokens"]):
            say(line)
    if arrivals := document["histograms"]["arrivals"]:
        rates = [part["rate_rps"] for part in arrivals]
        say(f"\narrivals over {format_duration(round(document['span_s'] * NS_PER_S))}, requests/s")
        say(f"{sparkline(rates)}  0 to {format_si(max(rates))}")


def print_comparison(document: Mapping[str, Any]) -> None:
    """Print what `tracegen.twin.compare_traces` returned."""
    a, b, apart = document["a"], document["b"], document["differences"]
    names = {
        "requests": "requests",
        "requests/s": "rate_rps",
        "CV of gaps": "gap_cv",
        "mean input tokens": "mean_input_tokens",
        "mean output tokens": "mean_output_tokens",
        "Spearman in/out": "spearman",
        "prefix hit rate": "hit_rate",
    }
    rows = [[name, *(format_si(side[key], digits=4) for side in (a, b))] for name, key in names.items()]
    rows += [
        [f"dispersion {w}", *(format_si(side["index_of_dispersion"][w], digits=4) for side in (a, b))]
        for w in a["index_of_dispersion"]
    ]
    print_table(["", *(Path(document["files"][key]).name for key in ("a", "b"))], rows)
    say()
    ks = {"input tokens": "input_tokens", "output tokens": "output_tokens", "gaps": "gaps_s"}
    print_table(["Kolmogorov-Smirnov distance", ""], [[n, format_si(apart["ks"][k], digits=3)] for n, k in ks.items()])
    say()
    shares = [
        [name, f"{a['buckets'][name]:.1%}", f"{b['buckets'][name]:.1%}", f"{100 * apart['bucket_shares'][name]:+.2f}"]
        for name in a["buckets"]
    ]
    print_table(["bucket", "a", "b", "points"], shares)


def print_fit(fit: "Fit", output: Path) -> None:
    """Print what a fit chose and how well its twins match."""
    say(f"wrote {output}: how {fit.goodness['seeds']} synthetic twins of the trace match it")
    if fit.arrivals:
        best = fit.arrivals[0]
        others = dict.fromkeys(f.arrivals.kind for f in fit.arrivals if f.arrivals.kind != best.arrivals.kind)
        say(f"  arrivals: {best.arrivals} (also tried: {', '.join(others)})")
    for remark in fit.remarks:
        say(f"  {remark}")
    found = fit.goodness
    errors = [name.removesuffix("_median") for name in found if name.endswith("_median")]
    say()
    print_table(
        ["twins' distance to the trace", "median", "worst"],
        [[n.replace("_", " "), *(f"{found[f'{n}_{end}']:.4f}" for end in ("median", "max"))] for n in errors],
    )
    say()
    print_table(
        ["", "trace", "twins: 5 %", "median", "95 %"],
        [[n.replace("_", " "), *(format_si(x, digits=4) for x in v)] for n, v in found.items() if isinstance(v, list)],
    )


def headline(document: Mapping[str, Any]) -> str:
    """Requests, span, rate and mean lengths in one line."""
    span = format_duration(round(document["span_s"] * NS_PER_S))
    return (
        f"{plural(document['requests'], 'request')} over {span} ({format_si(document['rate_rps'])}/s), on average "
        f"{format_si(document['input_tokens']['mean'], digits=4)} tokens in and "
        f"{format_si(document['output_tokens']['mean'], digits=4)} out"
    )


def bars(bins: Sequence[Mapping[str, int]]) -> list[str]:
    """One line a bin: its bounds, its count, and a bar in proportion to the fullest bin."""
    top = max(b["requests"] for b in bins)
    lines = []
    for b in bins:
        eighths = round(b["requests"] / top * BAR_WIDTH * 8)
        if b["requests"]:
            eighths = max(eighths, 1)  # what is there is seen
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{b['from']:>8} - {b['to']:<8} {b['requests']:>8}  {bar}".rstrip())
    return lines


def sparkline(values: Sequence[float]) -> str:
    """One character a value, its height in proportion to the largest."""
    top = max(values)
    return "".join(_LEVELS[max(round(v / top * 8), 1) if v else 0] for v in values)


def _arrival_figures(document: Mapping[str, Any]) -> dict[str, str]:
    """What is said about arrivals and dependence; a figure that is missing gives its reason."""
    reasons = document["reasons"]
    gaps = document["interarrival_s"]
    figures = {
        "mean gap": (gaps["mean"], " s", "interarrival_s.mean"),
        "CV of gaps": (gaps["cv"], " (Poisson: 1)", "interarrival_s.cv"),
    }
    for window, value in document["index_of_dispersion"].items():
        figures[f"dispersion {window}"] = (value, " (Poisson: 1)", f"index_of_dispersion.{window}")
    figures["Spearman in/out"] = (document["spearman"], "", "spearman")
    return {
        name: f"- ({reasons[key]})" if value is None else format_si(value, unit)
        for name, (value, unit, key) in figures.items()
    }


def _print_buckets(buckets: Mapping[str, Mapping[str, float]]) -> None:
    """The shares as a grid: inputs down, outputs across."""
    small, medium, large = INPUT_EDGES
    rows = {"S": f"S < {small}", "M": f"M < {medium}", "L": f"L <= {large}", "X": f"X > {large}"}
    columns = {"S": f"S < {OUTPUT_EDGES[0]}", "M": f"M < {OUTPUT_EDGES[1]}", "L": f"L >= {OUTPUT_EDGES[1]}"}
    print_table(
        ["buckets: input \\ output", *columns.values()],
        [[label, *(f"{buckets[i + o]['share']:.1%}" for o in columns)] for i, label in rows.items()],
    )


def _steps(metadata: Mapping[str, Any]) -> list[str]:
    """How the trace was made, from its origin to the last transform."""
    before = (metadata.get("source") or {}).get("metadata") or {}
    origin = _origin(metadata)
    return [*(_steps(before) if before else []), *([origin] if origin else [])]


def _origin(metadata: Mapping[str, Any]) -> str:
    """Who made the trace, with what; empty for a trace that does not say."""
    said = [metadata.get("generator", "")]
    if "seed" in metadata:
        said.append(f"seed {metadata['seed']}")
    if "parameters" in metadata:
        said.append(json.dumps(metadata["parameters"])[1:-1].replace('"', ""))
    if "source" in metadata:
        said.append(f"from {metadata['source'].get('file')} (sha256 {str(metadata['source'].get('sha256'))[:12]})")
    return ", ".join(part for part in said if part)
