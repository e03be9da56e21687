"""The report's figures, as SVG text. Each function takes a small frame and draws it; no figure computes a result."""

from typing import Any

import altair as alt
import polars as pl

from analysis.drawing import INK, MUTED, WIDTH, svg
from analysis.series import Series

COLOURS = {"prefill": "#e07a2f", "decode": "#2b6ca3", "idle": "#aab4bd", "other": "#8d7aa8"}
COLOURS |= {"of these shared": "#a9c6dd", "measured": "#4a5763"}
RUN_COLOURS = ["#2b6ca3", "#e07a2f", "#3f8f6b", "#8d7aa8", "#b8434e", "#6b7280"]
STEP_COLOURS = {"prefill": "#e07a2f", "both": "#b96a7c", "decode": "#2b6ca3"}
FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
SINCE = "seconds since the window's start"


def waterfall(frame: pl.DataFrame) -> str:
    """Where the joules went, a panel a run. `frame`: run, part, start, end (J a served request), text; parts top down.

    A part begins where the one before it ended; what is shared of prefill and decode lies below them.
    """
    runs, parts = (frame[name].unique(maintain_order=True).to_list() for name in ("run", "part"))
    room = 1.16  # for the figure behind the longest bar
    scale = alt.Scale(domain=[0, room * max(frame["end"].to_list())], nice=False)
    colour = alt.Scale(domain=parts, range=[COLOURS[part] for part in parts])
    ticks = alt.Axis(tickCount=6)
    rows = alt.Axis(ticks=False, domain=False, labelColor=INK)
    panels = []
    for run in runs:
        base = alt.Chart(frame.filter(pl.col("run") == run)).encode(
            y=alt.Y("part:N", sort=parts, title=None, axis=rows)
        )
        bars = base.mark_bar(cornerRadius=1.5, height=17).encode(
            x=alt.X("start:Q", title="J per served request" if run == runs[-1] else None, scale=scale, axis=ticks),
            x2="end:Q",
            color=alt.Color("part:N", scale=colour, legend=None),
        )
        said = base.mark_text(align="left", dx=6, fontSize=12, color=MUTED).encode(x="end:Q", text="text:N")
        panels.append((bars + said).properties(width=WIDTH - 150, height=25 * len(parts), title=run))
    return svg(alt.vconcat(*panels, spacing=18), least_axis=110)


def power(series: Series) -> str:
    """Power over the window, and under it how many requests were in the engine."""
    bins = series.overview
    scale = alt.Scale(nice=False, domain=[0, bins.bin_s * bins.power_w.size])
    line = {"color": COLOURS["decode"], "strokeWidth": 1.4}
    base = alt.Chart(bins.frame).properties(width=WIDTH - 70)
    top = base.mark_area(line=line, color=COLOURS["decode"], opacity=0.16, interpolate="step").encode(
        x=alt.X("t_s:Q", title=None, scale=scale), y=alt.Y("power_w:Q", title="power, W")
    )
    below = base.mark_area(color=COLOURS["prefill"], opacity=0.55, interpolate="step").encode(
        x=alt.X("t_s:Q", title=SINCE, scale=scale), y=alt.Y("requests:Q", title="requests")
    )
    return svg(alt.vconcat(top.properties(height=190), below.properties(height=80)))


def close_up(series: Series) -> str:
    """A few seconds: every sensor reading, and every engine step with how many requests were in it."""
    domain = alt.Scale(domain=list(series.close_up_s), nice=False, zero=False)
    panels = []
    if series.readings is not None:
        panels.append(
            alt.Chart(series.readings)
            .mark_line(point={"size": 16, "filled": True}, strokeWidth=1, opacity=0.7, interpolate="step-before")
            .encode(
                x=alt.X("t_s:Q", title=None, scale=domain),
                y=alt.Y("watts:Q", title="W per GPU", scale=alt.Scale(zero=False)),
                color=alt.Color("gpu:N", scale=alt.Scale(range=["#2b6ca3"]), legend=None),
            )
            .properties(width=WIDTH - 70, height=150)
        )
    if series.steps is not None and series.steps.height:
        kinds = [kind for kind in STEP_COLOURS if kind in series.steps["kind"].unique()]
        panels.append(
            alt.Chart(series.steps)
            .mark_rect(stroke="white", strokeWidth=0.4, clip=True)
            .encode(
                x=alt.X("start_s:Q", title=SINCE, scale=domain),
                x2="end_s:Q",
                y=alt.Y("zero:Q", title="requests in step"),
                y2="requests:Q",
                color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=[STEP_COLOURS[k] for k in kinds])),
            )
            .transform_calculate(zero="0")
            .properties(width=WIDTH - 70, height=110)
        )
    return svg(alt.vconcat(*panels).resolve_scale(color="independent"))


def buckets(frame: pl.DataFrame, title: str = "") -> str:
    """Energy per request by size. `frame`: run, group, part (prefill, decode), rank, joules."""
    groups, runs = (frame[name].unique(maintain_order=True).to_list() for name in ("group", "run"))
    axis = alt.Axis(labelAngle=0, ticks=False, labelColor=INK, labelFontSize=13)
    inner = alt.Scale(paddingInner=0.08)
    encodings: dict[str, Any] = {
        "x": alt.X("group:N", title=None, sort=groups, axis=axis, scale=alt.Scale(paddingInner=0.28, paddingOuter=0.1))
    }
    if len(runs) > 1:
        encodings["xOffset"] = alt.XOffset("run:N", sort=runs, scale=inner)
    parts = ["prefill", "decode"]
    colour = alt.Color("part:N", scale=alt.Scale(domain=parts, range=[COLOURS[p] for p in parts]), sort=parts)
    height = alt.Y("joules:Q", title="J per request", stack="zero")
    bars = alt.Chart(frame).mark_bar().encode(y=height, color=colour, order=alt.Order("rank:Q"), **encodings)
    if len(runs) > 1:
        shade = alt.Scale(domain=runs, range=[1 - 0.45 * i / (len(runs) - 1) for i in range(len(runs))])
        bars = bars.encode(
            opacity=alt.Opacity("run:N", sort=runs, scale=shade, legend=alt.Legend(symbolFillColor=COLOURS["decode"]))
        )
    totals = frame.group_by("run", "group", maintain_order=True).agg(pl.col("joules").sum())
    labels = alt.Chart(totals.with_columns(text=pl.col("joules").map_elements(_short, pl.String)))
    text = labels.mark_text(dy=-6, fontSize=10 if len(runs) > 1 else 12, color=MUTED).encode(
        y="joules:Q", text="text:N", **encodings
    )
    return svg((bars + text).properties(width=WIDTH, autosize=FIT, height=300, title=title))


def _short(joules: float) -> str:
    return f"{joules:,.0f}" if joules >= 10 else f"{joules:.2g}"


def latency(frame: pl.DataFrame) -> str:
    """Cumulative shares of requests. `frame`: run, metric, ms, share."""
    runs = frame["run"].unique(maintain_order=True).to_list()
    legend = alt.Legend(symbolType="stroke", symbolStrokeWidth=3) if len(runs) > 1 else None
    colour = alt.Color("run:N", sort=None, scale=alt.Scale(domain=runs, range=RUN_COLOURS), legend=legend)
    ticks, log = alt.Axis(tickCount=4, format="~s", grid=False), alt.Scale(type="log", nice=False)
    panels = [
        alt.Chart(frame.filter(pl.col("metric") == metric))
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=alt.X("ms:Q", title="ms", scale=log, axis=ticks),
            y=alt.Y("share:Q", title="share of requests" if i == 0 else None, axis=alt.Axis(format=".0%")),
            color=colour,
        )
        .properties(width=(WIDTH - 170) / 3, height=170, title=metric)
        for i, metric in enumerate(frame["metric"].unique(maintain_order=True))
    ]
    return svg(alt.hconcat(*panels, spacing=22))
