"""A trace's description as text for a terminal."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES
from tracegen.console import format_si, print_table, say
from tracegen.durations import NS_PER_S, format_duration

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"


def print_description(document: Mapping[str, Any]) -> None:
    """Print what `tracegen.describe.describe` returned: figures, buckets, histograms."""
    say(headline(document))
    if origin := _origin(document["metadata"]):
        say(f"made by {origin}")
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


def headline(document: Mapping[str, Any]) -> str:
    """Requests, span, rate and mean lengths in one line."""
    span = format_duration(round(document["span_s"] * NS_PER_S))
    return (
        f"{document['requests']:,} requests over {span} ({format_si(document['rate_rps'])}/s), on average "
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


def _origin(metadata: Mapping[str, Any]) -> str:
    """Who made the trace, with what; empty for a trace that does not say."""
    said = [metadata.get("generator", "")]
    if "seed" in metadata:
        said.append(f"seed {metadata['seed']}")
    if "parameters" in metadata:
        said.append(json.dumps(metadata["parameters"]).strip("{}").replace('"', ""))
    if "source" in metadata:
        said.append(f"from {metadata['source'].get('file')} (sha256 {str(metadata['source'].get('sha256'))[:12]})")
    return ", ".join(part for part in said if part)
