"""The residuals of a calibration as SVG files. Nothing is computed here."""

import io
import re
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from replay.sim.calibrate import Calibration, Data
from replay.sim.calibration_report import summary
from replay.sim.residuals import add_ratios
from tracegen.errors import ReplayError

_INK, _MUTED, _GRID = "#1b2733", "#667380", "#e6eaee"
_COLOURS = {"fitted": "#2b6ca3", "held out": "#e07a2f"}
_FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif"
_PANEL = 230
_LONG = re.compile(r"(\d\.\d\d)\d+")  # numbers with more digits than a pixel can show
_AXIS = {
    "labelColor": _MUTED,
    "titleColor": _MUTED,
    "titleFontWeight": "normal",
    "labelFontSize": 11,
    "titleFontSize": 11,
    "gridColor": _GRID,
    "domainColor": _GRID,
    "tickColor": _GRID,
}


def check_drawable(data: Data, folder: Path) -> None:
    """Raise `ReplayError` for runs, which have no points to draw, and for a `folder` that is a file."""
    if data.points is None:
        raise ReplayError("--plots: drawn for a CSV file of points only; runs have tables")
    if folder.exists() and not folder.is_dir():
        raise ReplayError(f"--plots {folder}: is a file; name a folder")


def draw(calibration: Calibration, folder: Path) -> list[Path]:
    """Write the figures into `folder`; their paths. Raises `ReplayError` as `check_drawable`."""
    check_drawable(calibration.data, folder)
    assert calibration.points is not None  # data with points are simulated
    ratios = add_ratios(calibration.points).with_columns(
        part=pl.when("held_out").then(pl.lit("held out")).otherwise(pl.lit("fitted"))
    )
    charts = {
        "power-ratio": _ratios(ratios, "power", "mean power"),
        "ttft-ratio": _ratios(ratios, "ttft", "P99 TTFT"),
    }
    steps = pl.DataFrame(summary(calibration)["step_times"])
    if steps.height:
        charts["step-times"] = _steps(steps)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, chart in charts.items():
        path = folder / f"{name}.svg"
        drawing = io.StringIO()
        _dressed(chart).save(drawing, format="svg")
        path.write_text(_LONG.sub(r"\1", drawing.getvalue()), encoding="utf-8")
        paths.append(path)
    return paths


def _ratios(ratios: pl.DataFrame, name: str, what: str) -> Any:
    """Simulated over measured ratio to the highest clock, one panel a TP size, one tick column a clock."""
    data = ratios.select(
        "part",
        (100 * pl.col(f"{name}_error")).round(2).clip(-40, 40).alias("error"),
        pl.format("TP{}", pl.col("tp")).alias("TP"),
        pl.format("{} MHz", pl.col("sm_clock_mhz")).alias("clock"),
        # Points of one clock stand side by side, in order of bucket and rate.
        pl.int_range(pl.len()).over("tp", "sm_clock_mhz").alias("place"),
    )
    clocks = [f"{mhz} MHz" for mhz in sorted(set(ratios["sm_clock_mhz"]))]
    colour = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    marks = (
        alt.Chart(data)
        .mark_square(size=9, opacity=0.8)
        .encode(
            x=alt.X("clock:N", title=None, sort=clocks, axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("place:Q"),
            y=alt.Y("error:Q", title=f"error of the {what} ratio, %"),
            color=alt.Color("part:N", title=None, scale=colour),
        )
        .properties(width=_PANEL, height=200)
    )
    return marks.facet(column=alt.Column("TP:N", title=None), spacing=14)


def _steps(steps: pl.DataFrame) -> Any:
    """Published and simulated step times."""
    data = steps.select(
        "published_ms", "simulated_ms", pl.col("step").str.extract(r"^(\w+)").alias("source"),
        pl.col("step").str.extract(r"(TP\d)").alias("TP"),
    )  # fmt: skip
    low, high = 15.0, 1600.0
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    line = alt.Chart(pl.DataFrame({"at": [low, high]})).mark_line(color=_GRID).encode(x="at:Q", y="at:Q")
    marks = (
        alt.Chart(data)
        .mark_point(size=30, filled=True, opacity=0.85)
        .encode(
            x=alt.X("published_ms:Q", title="published, ms", scale=scale),
            y=alt.Y("simulated_ms:Q", title="simulated, ms", scale=scale),
            color=alt.Color("TP:N", title=None, scale=alt.Scale(range=["#2b6ca3", "#e07a2f", "#3f8f6b"])),
            shape=alt.Shape("source:N", title=None),
        )
    )
    return (line + marks).properties(width=320, height=260)


def _dressed(chart: Any) -> Any:
    return (
        chart.configure(font=_FONT, background="white", padding=6, aria=False)
        .configure_view(stroke=None)
        .configure_axis(**_AXIS)
        .configure_legend(labelColor=_INK, labelFontSize=11, orient="top")
        .configure_header(labelColor=_INK, labelFontWeight="bold", labelFontSize=12)
    )
