"""How a sweep's figures are drawn; each function takes a small frame, none computes a result."""

from typing import Any

import altair as alt
import polars as pl

from analysis.drawing import INK, MUTED, WIDTH
from analysis.figures import RUN_COLOURS

GAP_PX = 64  # between panels: an axis and its labels
LEAST_PANEL_PX = 160
WIDE = 8.0  # times: of values so far apart the axis is logarithmic
# Nine sizes in three hues, by input; darker with output: what a reader compares stands together.
SIZE_COLOURS = {
    "SS": "#8fc1e3", "SM": "#4a94c9", "SL": "#1f5d91",
    "MS": "#f2b98a", "MM": "#e07a2f", "ML": "#9c4a10",
    "LS": "#9fd0b4", "LM": "#4fa277", "LL": "#20633f",
    "XS": "#cbbddc", "XM": "#8d7aa8", "XL": "#574673",
}  # fmt: skip
MAP_COLOURS = ["#fdf3e7", "#f2b98a", "#e07a2f", "#8f3d0b"]
MAP_STOPS = [1.0, 1.25, 1.75, 3.0]  # times a group's least energy; beyond the last all is as dark
DARK_FROM = 2.1  # where white on the colour is read better than ink
MOST_ACROSS = 4  # panels in a row
MOST_WITH_BARS = 4  # series; bars of more hide each other
NOTHING = "no figures"
HEADROOM = 1.25
NO_VALUE = "#dde2e7"
CELL_PX, ROW_PX = 40, 24


def lines(frame: pl.DataFrame, title: str, across: int) -> Any:
    """A metric against the clock, `across` panels in a row. `frame`: clock, series and its rank, panel, value, half.

    What has no value leaves a gap; a panel without any says so.
    """
    clocks = _clocks(frame)
    series = frame.drop_nulls("series").group_by("series").agg(pl.col("rank").min()).sort("rank")["series"].to_list()
    panels = frame["panel"].unique(maintain_order=True).to_list()
    columns = across if 1 < across <= MOST_ACROSS else min(len(panels), 3)
    width = max(LEAST_PANEL_PX, (WIDTH - 60) // columns - GAP_PX)
    colour = alt.Color(
        "series:N", sort=None, scale=alt.Scale(domain=series, range=_colours(series)), legend=alt.Legend(columns=9)
    )
    axis = alt.Axis(labelAngle=0 if width / len(clocks) > 40 else -45, grid=False, labelOverlap=False)
    drawn = []
    for i, panel in enumerate(panels):
        mine = frame.filter(pl.col("panel") == panel)
        # Of a few repeats an interval can be wider than all that is shown: the panel ends a little above the means.
        top = HEADROOM * float(mine["value"].fill_null(0.0).to_numpy().max()) or 1.0
        if mine["value"].null_count() == mine.height:
            nothing = alt.Chart(pl.DataFrame({"text": [NOTHING]})).mark_text(color=MUTED, fontSize=12)
            drawn.append(nothing.encode(text="text:N").properties(width=width, height=190, title=panel))
            continue
        ends = {
            "low": (pl.col("value") - pl.col("half")).clip(0.0),
            "high": (pl.col("value") + pl.col("half")).clip(None, top),
        }
        base = alt.Chart(mine.select("clock", "series", "value", **ends).drop_nulls("series")).encode(
            x=alt.X("clock:O", sort=clocks, title="SM clock, MHz", axis=axis, scale=alt.Scale(domain=clocks)),
            color=colour,
        )
        line = base.mark_line(strokeWidth=1.8, point={"size": 34, "filled": True}).encode(
            y=alt.Y("value:Q", title=title if i % columns == 0 else None, scale=alt.Scale(domain=[0, top], nice=False))
        )
        bars = base.mark_rule(strokeWidth=1.2, opacity=0.75).encode(y="low:Q", y2="high:Q")
        shown = line + bars if len(series) <= MOST_WITH_BARS else line
        drawn.append(shown.properties(width=width, height=190, title=panel))
    return alt.concat(*drawn, columns=columns, spacing=20)


def map_of(frame: pl.DataFrame) -> Any:
    """Joules by group (down) and clock (across). `frame`: clock, group, panel, over_least, text.

    What has no value is grey and says why.
    """
    clocks, groups = _clocks(frame), frame["group"].unique(maintain_order=True).to_list()
    panels = frame["panel"].unique(maintain_order=True).to_list()
    columns = max(1, min(len(panels), WIDTH // (CELL_PX * len(clocks) + GAP_PX)))
    known = alt.Scale(domain=MAP_STOPS, range=MAP_COLOURS, clamp=True)
    legend = alt.Legend(
        title="times the row's least", orient="top", gradientLength=220, titleColor=MUTED, titleFontWeight="normal",
        format=".2~f",
    )  # fmt: skip
    ink = alt.when("datum.over_least > " + str(DARK_FROM)).then(alt.value("white")).otherwise(alt.value(INK))
    drawn = []
    for panel in panels:
        mine = frame.filter(pl.col("panel") == panel).select("clock", "group", "over_least", "text")
        base = alt.Chart(mine).encode(
            x=alt.X("clock:O", sort=clocks, title="SM clock, MHz", axis=alt.Axis(labelAngle=0, ticks=False)),
            y=alt.Y("group:O", sort=groups, title=None, axis=alt.Axis(ticks=False, labelColor=INK)),
        )
        colour = alt.Color("over_least:Q", scale=known, legend=legend)
        tiles = base.transform_filter("isValid(datum.over_least)").mark_rect(stroke="white").encode(color=colour)
        holes = base.transform_filter("!isValid(datum.over_least)").mark_rect(stroke="white", color=NO_VALUE)
        words = base.mark_text(fontSize=11).encode(text="text:N", color=ink)
        width = max(CELL_PX * len(clocks), 120)
        drawn.append((tiles + holes + words).properties(width=width, height=ROW_PX * len(groups), title=panel))
    return alt.concat(*drawn, columns=columns, spacing=20)


def fronts(frame: pl.DataFrame) -> Any:
    """Energy against latency. `frame`: latency (a panel each), latency_ms, energy_j, series, on_front, clock."""
    series = frame["series"].unique(maintain_order=True).to_list()
    panels = frame["latency"].unique(maintain_order=True).to_list()
    width = (WIDTH - 60) // len(panels) - GAP_PX
    colour = alt.Color("series:N", sort=None, scale=alt.Scale(domain=series, range=_colours(series)))
    ticks = alt.Axis(tickCount=6, format="~r")
    drawn = []
    for i, panel in enumerate(panels):
        mine = frame.filter(pl.col("latency") == panel).select(
            "latency_ms", "energy_j", "series", "clock", front="on_front"
        )
        base = alt.Chart(mine).encode(
            x=alt.X("latency_ms:Q", title=panel, scale=_scale(mine["latency_ms"]), axis=ticks),
            y=alt.Y("energy_j:Q", title="J/request" if i == 0 else None, scale=_scale(mine["energy_j"]), axis=ticks),
        )
        best = base.transform_filter("datum.front")
        line = best.mark_line(color=MUTED, strokeWidth=1.2, strokeDash=[4, 3]).encode(order="latency_ms:Q")
        points = base.mark_point(filled=True, size=70).encode(
            color=colour,
            opacity=alt.when("datum.front").then(alt.value(1.0)).otherwise(alt.value(0.35)),
        )
        named = best.mark_text(align="left", dx=7, dy=-5, fontSize=11, color=INK).encode(text="clock:N")
        drawn.append((line + points + named).properties(width=width, height=260))
    return alt.concat(*drawn, columns=len(panels), spacing=20)


def _scale(values: pl.Series) -> alt.Scale:
    """An axis of what `values` span, a little wider; without a zero, which a front is far from."""
    low, high = (float(v) for v in values.to_numpy()[[values.arg_min() or 0, values.arg_max() or 0]])
    if low > 0 and high / low > WIDE:
        return alt.Scale(type="log", domain=[low / 1.15, high * 1.4], nice=False)
    room = 0.08 * (high - low) or 0.08 * high
    return alt.Scale(domain=[max(0.0, low - room), high + 1.5 * room], nice=False, zero=False)


def _clocks(frame: pl.DataFrame) -> list[str]:
    """Clocks from low to high, the driver's own last."""
    order = frame.select("freq_mhz", "clock").unique().sort("freq_mhz", nulls_last=True)
    return order["clock"].to_list()


def _colours(series: list[str]) -> list[str]:
    """One for each of `series`, known sizes by theirs."""
    if all(name in SIZE_COLOURS for name in series):
        return [SIZE_COLOURS[name] for name in series]
    return [RUN_COLOURS[i % len(RUN_COLOURS)] for i in range(len(series))]
