"""The pictures of docs/paper.md."""

from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
from paper_plans import TOP_MHZ, Extent

from analysis.drawing import draw_to
from analysis.sweep import INVALID, SOUND, SweepTable

MEASURES = {
    "power_w": "power",
    "energy_per_request_j": "joules a request",
    "ttft_p50_ms": "median TTFT",
    "tbt_mean_ms": "mean TBT",
}


def draw(tables: dict[str, SweepTable], extent: Extent, folder: Path) -> None:
    """Write `paper-clock.svg` and `paper-energy.svg` into `folder`; `tables` are those of the sizes, by size."""
    folder.mkdir(parents=True, exist_ok=True)
    low = {size: _low(table, extent.low_rps(size)) for size, table in tables.items()}
    size = "MM" if "MM" in low else next(iter(low))
    draw_to(_clock(low[size]), folder, "paper-clock", "svg", f"{size} requests at the low load, by clock", "SIMULATED")
    title = "J a request of the GPUs that serve, low load; no tile: saturated"
    draw_to(_energy(low), folder, "paper-energy", "svg", title, "SIMULATED; colour: times the size's least")


def _low(table: SweepTable, rate_rps: float) -> pl.DataFrame:
    """Mean figures by TP and clock at the low load."""
    kept = table.cells.filter(pl.col("standing").is_in([SOUND, INVALID]), pl.col("rate_rps") == rate_rps)
    return kept.group_by("tp", "freq_mhz", maintain_order=True).agg(pl.col(list(MEASURES)).mean())


def _clock(cells: pl.DataFrame) -> Any:
    top = cells.filter(pl.col("freq_mhz") == TOP_MHZ).drop("freq_mhz")
    ratios = cells.join(top, on="tp", suffix="_top").select(
        pl.format("TP{}", "tp").alias("TP"),
        "freq_mhz",
        *((pl.col(name) / pl.col(f"{name}_top")).alias(text) for name, text in MEASURES.items()),
    )
    frame = ratios.unpivot(on=list(MEASURES.values()), index=["TP", "freq_mhz"], variable_name="of")
    lines = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=alt.X("freq_mhz:Q", title="clock, MHz", scale=alt.Scale(zero=False)),
            y=alt.Y("value:Q", title=f"relative to {TOP_MHZ} MHz", scale=alt.Scale(zero=False)),
            color=alt.Color("TP:N", title=None),
        )
        .properties(width=170, height=150)
    )
    facets = lines.facet(alt.Facet("of:N", title=None, sort=list(MEASURES.values())), columns=2)
    return facets.resolve_scale(y="independent")


def _energy(low: dict[str, pl.DataFrame]) -> Any:
    sizes = list(low)
    parts = [
        cells.select(
            pl.lit(size).alias("size"),
            pl.format("TP{}", "tp").alias("TP"),
            pl.col("freq_mhz").cast(pl.Int64),
            pl.col("energy_per_request_j").alias("J"),
            (pl.col("energy_per_request_j") / pl.col("energy_per_request_j").min()).alias("relative"),
        )
        for size, cells in low.items()
    ]
    base = alt.Chart(pl.concat(parts)).encode(
        x=alt.X("freq_mhz:O", title="clock, MHz"), y=alt.Y("size:N", sort=sizes, title=None)
    )
    tiles = base.mark_rect().encode(
        color=alt.Color("relative:Q", scale=alt.Scale(scheme="viridis", reverse=True, type="log"), legend=None)
    )
    texts = base.mark_text(fontSize=10).encode(
        text=alt.Text("J:Q", format=",.0f"),
        color=alt.condition("datum.relative > 2", alt.value("white"), alt.value("black")),
    )
    panels = alt.layer(tiles, texts).properties(width=250, height=190)
    return panels.facet(alt.Facet("TP:N", title=None), columns=3)
