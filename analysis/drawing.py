"""How figures are dressed, and the formats that they leave in: SVG, PNG, Vega."""

import io
import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert as vlc

from tracegen.errors import AnalysisError

INK, MUTED, GRID = "#1b2733", "#667380", "#e6eaee"
WARN = "#a03f06"
WIDTH = 760
SCALE = 2.0  # of PNG, pixels a point: sharp in print at half the size
# As wide here, where texts are placed, as with the reader.
FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif"
AXIS = {
    "labelColor": MUTED,
    "titleColor": MUTED,
    "titleFontWeight": "normal",
    "labelFontSize": 12,
    "titleFontSize": 12,
    "gridColor": GRID,
    "domainColor": GRID,
    "tickColor": GRID,
    "labelLimit": 260,
}
LEGEND = {
    "labelColor": INK,
    "labelFontSize": 12,
    "title": None,
    "orient": "top",
    "symbolType": "square",
    "columnPadding": 18,
    "labelLimit": 320,
}


def dressed(chart: Any, least_axis: int = 44, background: str = "transparent", *, aria: bool = True) -> Any:
    """`chart` in the report's dress; y axes take at least `least_axis` px, so that panels align.

    `aria`: with a description of each mark, which is for pictures that stand alone.
    """
    return (
        chart.configure(font=FONT, background=background, padding=4, aria=aria)
        .configure_view(stroke=None)
        .configure_axis(**AXIS)
        .configure_axisY(minExtent=least_axis)
        .configure_legend(**LEGEND)
        .configure_title(
            color=INK, fontSize=13, fontWeight=600, anchor="start", subtitleColor=WARN, subtitleFontSize=12
        )
    )


def svg(chart: Any, least_axis: int = 44) -> str:
    """`chart` in the report's dress, as an SVG element of a page that describes it."""
    text = io.StringIO()
    dressed(chart, least_axis, aria=False).save(text, format="svg")
    return text.getvalue()


def draw_to(chart: Any, folder: Path, name: str, kind: str, title: str, subtitle: str | None) -> Path:
    """Write `chart` as `folder/name` in format `kind` (png, svg, vega), on white and under its title.

    Raises `AnalysisError` where the file system refuses.
    """
    titled = chart.properties(title=alt.TitleParams(title, subtitle=subtitle or alt.Undefined, offset=14))
    shown = dressed(titled, background="white")
    path = folder / f"{name}.{'vega.json' if kind == 'vega' else kind}"
    try:
        if kind == "vega":
            document = vlc.vegalite_to_vega(shown.to_dict())
            path.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
        else:
            shown.save(str(path), format=kind, **({"scale_factor": SCALE} if kind == "png" else {}))
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path
