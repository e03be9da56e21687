"""What a page is made of, and the page itself: one file that asks nothing of a network.

Texts from a run are escaped by the template, figures are inlined SVG, and a Content-Security-Policy forbids every
request and every script but the page's own, by its hash.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis.drawing import WIDTH
from tracegen.errors import AnalysisError

NONE = "-"  # a cell without a value
SIMULATED = "SIMULATED: no GPU was measured; the engine and its power are a model"


class Cell(NamedTuple):
    """What a cell says; `value` is what its column sorts by, where that is a number; `ok`: passed or failed."""

    text: str
    value: float | None = None
    ok: bool | None = None


@dataclass(frozen=True)
class Column:
    """A column of a page's table: where it comes from, its heading, and how a value is said."""

    name: str
    heading: str
    said: Callable[[Any], str] | None = None  # None: text


@dataclass(frozen=True)
class Table:
    """Rows under headings; `text`: which columns are no numbers; `total`: a row that stays last when sorted.

    `folded`: it is long, and opened by who wants it.
    """

    name: str
    headings: Sequence[str]
    text: Sequence[bool]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] | None = None
    sorts: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with what it says in words and the numbers behind it; `zoom`: the data of one that can be zoomed."""

    title: str
    says: str
    svg: Markup
    table: Table
    simulated: bool
    zoom: Mapping[str, Any] | None = None

    @property
    def width_px(self) -> float:
        """As wide as it was drawn: much larger or smaller, its texts would not read well."""
        natural = re.match(r'<svg[^>]* width="([\d.]+)"', self.svg)
        return float(natural[1]) if natural else WIDTH


@dataclass(frozen=True)
class Card:
    """A run's settings and verdicts."""

    name: str
    simulated: bool
    says: Sequence[str]
    settings: Mapping[str, str]
    verdicts: Table | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    title: str
    says: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()
    commands: Sequence[str] = ()


class Said(NamedTuple):
    """What was found, in a sentence, and what there is to say of it."""

    text: str
    more: str = ""


@dataclass(frozen=True)
class Page:
    """The whole report: the answer stands first."""

    title: str
    simulated: str | None  # what of it is, said at the top
    answer: Sequence[Said]
    sections: Sequence[Section]
    cautions: Sequence[str] = ()
    footer: str = field(
        default="Energy per request: each engine step's measured energy, shared by what each request's work adds to it "
        "(Aumann-Shapley prices) and, for what is there at no work, equally. Requests, idle time and other work add up "
        "to what the meters measured."
    )


def write_page(page: Page, path: Path) -> None:
    """Write `page` to `path`, by rename. Raises `AnalysisError` when it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(render_page(page), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def render_page(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = environment.get_template("report.html.j2").render(
        page=page,
        style=Markup(style),  # noqa: S704 - this package's own
        script=Markup(script),  # noqa: S704 - the same
        script_sha256=Markup(digest),  # noqa: S704 - the same
    )
    return shown.lstrip()


def _asset(name: str) -> str:
    return (files("analysis") / "templates" / name).read_text(encoding="utf-8").strip()


def table_of(
    name: str, columns: Sequence[Column], frame: pl.DataFrame, *, total: pl.DataFrame | None = None, sorts: bool = False
) -> Table:
    """A table of `frame`'s rows, and of the first of `total` where there is one."""

    def cells(row: dict[str, Any]) -> list[Cell]:
        return [_cell(column, row[column.name]) for column in columns]

    last = None if total is None or total.is_empty() else cells(total.row(0, named=True))
    text = [column.said is None for column in columns]
    rows = [cells(row) for row in frame.iter_rows(named=True)]
    return Table(name, [column.heading for column in columns], text, rows, last, sorts)


def plain_table(name: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> Table:
    """A table of texts, the first `text` columns of which are no numbers."""
    kinds = [i < text for i in range(len(headings))]
    return Table(name, headings, kinds, [[Cell(cell) for cell in row] for row in rows])


def _cell(column: Column, value: Any) -> Cell:
    if value is None:
        return Cell(NONE)
    if column.said is None:
        return Cell(str(value))
    return Cell(column.said(value), float(value))


def short(value: float) -> str:
    """A figure for people: three digits, more where it is a hundred or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.1f} %"


def whole(count: float) -> str:
    """A count."""
    return f"{count:,.0f}"
