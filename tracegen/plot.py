"""Pictures of traces, several overlaid: rate over time, lengths, both lengths together, dispersion, buckets.

`panels` counts, `draw` draws. Altair is imported when a picture is made, since it takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tracegen.buckets import BUCKETS
from tracegen.describe import bucket_counts, dispersion
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.schema import read_trace
from tracegen.writer import written_whole

COLOURS = ("#2b6ca3", "#e07a2f", "#3f8f6b", "#8d7aa8", "#b8434e", "#6b7280")
INK, MUTED, GRID = "#1b2733", "#667380", "#e6eaee"
FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif"
SUFFIXES = (".png", ".svg", ".html")
WIDTH = 340  # px of a panel; two stand side by side
TIME_BINS = 120
BINS_A_DOUBLING = 4  # of a histogram of lengths
CELLS_A_DOUBLING = 2  # of a joint density
WINDOWS_S = (1, 2, 5, 10, 20, 60, 120, 300, 600)
# What an axis of time counts, from how many seconds on.
TIME_UNITS = (
    (3 * 86400.0, "days", 86400.0),
    (3 * 3600.0, "hours", 3600.0),
    (600.0, "minutes", 60.0),
    (0.1, "seconds", 1.0),
    (1e-4, "milliseconds", 1e-3),
    (0.0, "microseconds", 1e-6),
)


def plot_traces(paths: Sequence[str | Path], output: str | Path) -> None:
    """Draw the traces at `paths` into one picture, PNG, SVG or HTML by the ending of `output`.

    HTML has all that it needs inside. Raises `TraceError` for a trace that cannot be read, another ending, more traces
    than there are colours, and an output that cannot be written.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise TraceError(f"{output}: a picture ends in {', '.join(SUFFIXES)}")
    if len(paths) > len(COLOURS):
        raise TraceError(f"{len(paths)} traces are too many for one picture; {len(COLOURS)} are the most")
    chart = draw(panels({name: read_trace(path) for name, path in zip(_names(paths), paths, strict=True)}))
    options: dict[str, dict[str, Any]] = {".png": {"scale_factor": 2}, ".html": {"inline": True}}
    with written_whole(output) as partial:
        chart.save(str(partial), **options.get(output.suffix, {}))


def _names(paths: Sequence[str | Path]) -> list[str]:
    """What the traces are called: by their files, with the folder where two files have one name."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def panels(traces: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """What is drawn of checked `traces` by name: a frame for each panel, with the column `trace`.

    `rate`: t_s, end_s, rate_rps, from time 0 or, where all arrive in the later half of the time from there (as with
    dates for times), from the first arrival. `input`, `output`: from, to (tokens), density (share of requests a
    doubling). `joint`: from and to of both, density. `dispersion`: window_s, dispersion. `buckets`: bucket, share.
    """
    first_s = min(int(frame["arrival_ns"][0]) / NS_PER_S for frame in traces.values())
    end_s = max(int(frame["arrival_ns"][-1]) / NS_PER_S for frame in traces.values())
    start_s = first_s if first_s > end_s / 2 else 0.0
    made: dict[str, list[pl.DataFrame]] = {}
    for name, frame in traces.items():
        for panel, part in {
            "rate": _rate(frame, start_s, end_s),
            "input": _histogram(frame["input_tokens"]),
            "output": _histogram(frame["output_tokens"]),
            "joint": _joint(frame),
            "dispersion": _dispersion(frame),
            "buckets": _buckets(frame),
        }.items():
            made.setdefault(panel, []).append(part.with_columns(trace=pl.lit(name)))
    return {panel: pl.concat(parts) for panel, parts in made.items()}


def _rate(frame: pl.DataFrame, start_s: float, end_s: float) -> pl.DataFrame:
    """The rate in each of `TIME_BINS` parts of the time to `end_s`, without the part that a shorter trace ends in."""
    width_s = (end_s - start_s) / TIME_BINS or 1.0
    place = np.minimum((frame["arrival_ns"].to_numpy() / NS_PER_S - start_s) / width_s, TIME_BINS - 1).astype(np.int64)
    counts = np.bincount(place)
    if counts.size > 1 and frame["arrival_ns"][-1] / NS_PER_S - start_s < (counts.size - 0.01) * width_s:
        counts = counts[:-1]
    t_s = start_s + np.arange(counts.size + 1) * width_s
    return pl.DataFrame({"t_s": t_s[:-1], "end_s": t_s[1:], "rate_rps": counts / width_s})


def _edges(most: int, a_doubling: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bounds of ranges of lengths that hold whole tokens, from 1 to beyond `most`."""
    powers = np.arange(0, np.log2(most) * a_doubling + a_doubling + 1) / a_doubling
    return np.unique(np.ceil(2**powers))


def _histogram(tokens: pl.Series) -> pl.DataFrame:
    """Shares of requests a doubling of length."""
    edges = _edges(int(tokens.max()), BINS_A_DOUBLING)  # type: ignore[arg-type]
    share = np.histogram(tokens.to_numpy(), edges)[0] / tokens.len()
    return pl.DataFrame({"from": edges[:-1], "to": edges[1:], "density": share / np.log2(edges[1:] / edges[:-1])})


def _joint(frame: pl.DataFrame) -> pl.DataFrame:
    """Shares of requests a doubling of both lengths, where there are any."""
    sides = [frame[f"{side}_tokens"].to_numpy().astype(np.float64) for side in ("input", "output")]
    edges = [_edges(int(side.max()), CELLS_A_DOUBLING) for side in sides]
    counts = np.histogram2d(sides[0], sides[1], bins=(edges[0], edges[1]))[0]
    i, j = np.nonzero(counts)
    area = np.log2(edges[0][i + 1] / edges[0][i]) * np.log2(edges[1][j + 1] / edges[1][j])
    return pl.DataFrame(
        {
            "from": edges[0][i],
            "to": edges[0][i + 1],
            "output_from": edges[1][j],
            "output_to": edges[1][j + 1],
            "density": counts[i, j] / frame.height / area,
        }
    )


def _dispersion(frame: pl.DataFrame) -> pl.DataFrame:
    """Variance over mean of the counts, for windows of which there are enough."""
    found = [(w, dispersion(frame["arrival_ns"], w)) for w in WINDOWS_S]
    known = [(float(w), value) for w, value in found if value]
    return pl.DataFrame(known, schema={"window_s": pl.Float64, "dispersion": pl.Float64}, orient="row")


def _buckets(frame: pl.DataFrame) -> pl.DataFrame:
    """Shares of the buckets, all of them."""
    counts = bucket_counts(frame)
    return pl.DataFrame({"bucket": list(counts), "share": [count / frame.height for count in counts.values()]})


def draw(parts: Mapping[str, pl.DataFrame]) -> Any:
    """The picture of what `panels` counted, as an Altair chart."""
    import altair as alt

    names = parts["rate"]["trace"].unique(maintain_order=True).to_list()
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=3, labelColor=INK)
    scale = alt.Scale(domain=names, range=list(COLOURS[: len(names)]))
    colour = alt.Color("trace:N", scale=scale, sort=names, legend=None)
    named = alt.Color("trace:N", scale=scale, sort=names, legend=legend if len(names) > 1 else None)
    lengths = [
        alt.Chart(_outline(parts[side], "from", "to", "density", closed=True))
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=_tokens("from", f"{side} tokens", "X", [1, parts[side]["to"].max()]),
            y=_y("density", "share a doubling", "%"),
            color=colour,
        )
        .properties(width=WIDTH, height=170, title=f"{side.capitalize()} lengths")
        for side in ("input", "output")
    ]
    cells = parts["joint"]
    domains = [[cells[low].min(), cells[high].max()] for low, high in (("from", "to"), ("output_from", "output_to"))]
    joint = [_density(cells.filter(pl.col("trace") == name), name, domains) for name in names]
    rows = [alt.hconcat(*joint[i : i + 2]) for i in range(0, len(joint), 2)]
    bursts = alt.vconcat(alt.hconcat(_bursts(parts["dispersion"], colour), _bars(parts["buckets"], names, scale)))
    return (
        alt.vconcat(_course(parts["rate"], named), alt.hconcat(*lengths), *rows, bursts, spacing=24)
        .configure(font=FONT, background="white", padding=12)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=MUTED,
            titleColor=MUTED,
            titleFontWeight="normal",
            gridColor=GRID,
            domainColor=GRID,
            tickColor=GRID,
        )
        .configure_axisY(minExtent=44)
        .configure_title(color=INK, fontSize=13, fontWeight=600, anchor="start")
    )


def _course(frame: pl.DataFrame, colour: Any) -> Any:
    """The rate over time."""
    import altair as alt

    steps = _outline(frame, "t_s", "end_s", "rate_rps", closed=False)
    first_s, last_s, highest_rps = steps.select(pl.min("t_s"), pl.max("t_s").alias("end"), pl.max("rate_rps")).row(0)
    unit, unit_s = next((name, size) for least_s, name, size in TIME_UNITS if last_s - first_s >= least_s)
    return (
        alt.Chart(steps.with_columns(t=pl.col("t_s") / unit_s))
        .mark_line(interpolate="step-after", strokeWidth=1.4)
        .encode(
            x=alt.X("t:Q", title=unit, scale=alt.Scale(nice=False, zero=False)),
            y=_y("rate_rps", "requests/s", "~s" if highest_rps >= 1000 else alt.Undefined),
            color=colour,
        )
        .properties(width=2 * WIDTH + 60, height=150, title="Arrival rate")
    )


def _outline(frame: pl.DataFrame, start: str, end: str, value: str, *, closed: bool) -> pl.DataFrame:
    """The steps of each trace with one point more where its last bin ends: at its height or, `closed`, at zero."""
    last = pl.lit(0.0) if closed else pl.col(value).last()
    ends = frame.group_by("trace", maintain_order=True).agg(pl.col(end).last().alias(start), last.alias(value))
    return pl.concat([frame.select("trace", start, value), ends])


def _y(name: str, title: str, format_: Any) -> Any:
    import altair as alt

    return alt.Y(f"{name}:Q", title=title, axis=alt.Axis(format=format_, tickCount=4))


def _tokens(name: str, title: str, channel: str, domain: list[Any]) -> Any:
    """A logarithmic axis of lengths over `domain`, with labels at powers of four, or at its ends."""
    import altair as alt

    powers = [4**k for k in range(17) if domain[0] <= 4**k <= domain[1]]
    marks = powers if len(powers) > 1 else domain
    axis = alt.Axis(format=",", values=marks, grid=False, labelOverlap="greedy")
    scale = alt.Scale(type="log", base=2, nice=False, domain=domain)
    return getattr(alt, channel)(f"{name}:Q", title=title, axis=axis, scale=scale)


def _density(frame: pl.DataFrame, name: str, domains: list[list[Any]]) -> Any:
    """How often which lengths come together in one trace."""
    import altair as alt

    shade = alt.Color("density:Q", scale=alt.Scale(scheme="blues", type="sqrt"), legend=None)
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=_tokens("from", "input tokens", "X", domains[0]),
            x2="to:Q",
            y=_tokens("output_from", "output tokens", "Y", domains[1]),
            y2="output_to:Q",
            color=shade,
        )
        .properties(width=WIDTH, height=220, title=f"Both lengths, {name}")
    )


def _bursts(frame: pl.DataFrame, colour: Any) -> Any:
    """Dispersion by window; a Poisson process has 1."""
    import altair as alt

    log = alt.Scale(type="log", nice=False)
    lines = (
        alt.Chart(frame)
        .mark_line(point=True, strokeWidth=1.8)
        .encode(
            x=alt.X(
                "window_s:Q", title="window, seconds", scale=log, axis=alt.Axis(grid=False, values=[1, 10, 60, 600])
            ),
            y=alt.Y(
                "dispersion:Q",
                title="variance / mean of counts",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(tickCount=4),
            ),
            color=colour,
        )
    )
    poisson = alt.Chart(pl.DataFrame({"one": [1.0]})).mark_rule(strokeDash=[4, 4], color=MUTED).encode(y="one:Q")
    title = "Index of dispersion " + ("(dashed: Poisson)" if frame.height else "(too few full windows)")
    return (lines + poisson).properties(width=WIDTH, height=200, title=title)


def _bars(frame: pl.DataFrame, names: list[str], scale: Any) -> Any:
    """Shares of the buckets, traces side by side."""
    import altair as alt

    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X("bucket:N", title="bucket: input, output", sort=list(BUCKETS), axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("trace:N", sort=names),
            y=_y("share", "share of requests", "%"),
            color=alt.Color("trace:N", scale=scale, sort=names, legend=None),
        )
        .properties(width=WIDTH, height=200, title="Buckets")
    )
