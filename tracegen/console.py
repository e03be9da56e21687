"""What the three commands share: how they start, how they fail, how they print."""

import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len

from tracegen.errors import WattraceError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
_NAMES = re.compile(r"\s*(?:\S+\s{2,}){0,2}")
LEAST_TEXT = 24  # columns, in which sentences can still be read
BOLD, ITALIC = "1", "3"  # ECMA-48, Select Graphic Rendition


def make_app(help_text: str) -> typer.Typer:
    """A Typer app with the settings that all three commands share."""
    return typer.Typer(
        help=help_text,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run_app(app: typer.Typer) -> None:
    """Run `app`; a `WattraceError` or a wrong option becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bars and arrows must not stop a command on an ASCII terminal
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except WattraceError as error:
        fail(str(error))
    except typer.TyperException as error:
        fail(f"{error.format_message().rstrip('.')}; see --help")
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)  # noqa: T201 - this is the console
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone; point stdout elsewhere so that Python's exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    if code == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C
        note("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> None:
    """Print `error: message` as one line on stderr and exit with 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - this is the console
    sys.exit(EXIT_BAD_INPUT)


def note(message: str) -> None:
    """Print a remark on stderr, where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - this is the console


def say(message: str = "") -> None:
    """Print a result on stdout."""
    print(message, flush=True)  # noqa: T201 - this is the console


def print_json(document: Any) -> None:
    """Print `document` as indented JSON on stdout; NaN and infinities are refused."""
    say(json.dumps(document, indent=2, allow_nan=False, default=str))


def progress_bar(*more: "ProgressColumn") -> "Progress":
    """A description (as it is, no markup), a bar, `more` columns and the time left: on stderr, in a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *more, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def prose(lines: Sequence[str]) -> None:
    """Print lines of text on stdout; in a terminal each is broken at its words.

    What follows a break stands below the text, behind names that two blanks or more set apart from it.
    """
    width = _columns()
    for line in lines:
        names = _NAMES.match(line)
        indent = " " * (names.end() if names else 0)
        broken = textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) if width else [line]
        say("\n".join(broken))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    left: int | Sequence[bool] = 1,
    wrap: bool = False,
) -> None:
    """Print `rows` under `columns`; the first `left` columns, or those marked, are text, the rest numbers.

    A heading may have several lines. Without a terminal a table is as wide as its cells need. In a terminal that is
    narrower its columns move together; then the last is broken at its words, where `wrap` says that it is text, or
    the columns come in blocks, each with the first column again. No figure is ever cut.
    """
    width = _columns()
    text = [i < left for i in range(len(columns))] if isinstance(left, int) else list(left)
    widths = [
        max(cell_len(line) for cell in cells for line in cell.split("\n")) for cells in zip(columns, *rows, strict=True)
    ]
    gap, blocks = 2, [list(range(len(columns)))]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        rest = width - sum(widths[:-1]) - (len(widths) - 1)
        if rest >= (LEAST_TEXT if wrap else widths[-1]):
            gap, widths[-1] = 1, min(rest, widths[-1])
        else:
            blocks = _blocks(widths, width)
    lines = [] if title is None else [_styled(title, ITALIC)]
    for block in blocks:
        shape = [(widths[k], text[k]) for k in block]
        lines += [] if block is blocks[0] else [""]
        lines += [_styled(line, BOLD) for line in _lines([columns[k] for k in block], shape, gap, heading=True)]
        lines += [line for row in rows for line in _lines([row[k] for k in block], shape, gap)]
    say("\n".join(lines))


def _lines(
    cells: Sequence[str], shape: Sequence[tuple[int, bool]], gap: int, *, heading: bool = False
) -> Iterator[str]:
    """A row of a table, each column so wide and text or not; a cell that is too wide is broken at its words.

    Headings end on one line, other cells begin on one.
    """
    broken = [
        [part for line in cell.split("\n") for part in (textwrap.wrap(line, w) if cell_len(line) > w else [line])]
        for cell, (w, _) in zip(cells, shape, strict=True)
    ]
    height = max(map(len, broken))
    for i in range(height):
        padded = []
        for parts, (w, is_text) in zip(broken, shape, strict=True):
            k = i - height + len(parts) if heading else i
            part = parts[k] if 0 <= k < len(parts) else ""
            space = " " * (w - cell_len(part))
            padded.append(part + space if is_text else space + part)
        yield (" " * gap).join(padded).rstrip()


def _styled(line: str, style: str) -> str:
    """`line` in a style of the terminal; as it is where there is none, or one that knows no styles."""
    if not line or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return line
    return f"\x1b[{style}m{line}\x1b[0m"


def _columns() -> int | None:
    """How wide the terminal is that stdout goes to; None where it goes to none, or to one that does not know."""
    return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of the columns in blocks that fit into `width`, as far as each column does; 0 is in all."""
    blocks: list[list[int]] = [[]]
    for k in range(1, len(widths)):
        if blocks[-1] and sum(widths[i] + 2 for i in (0, *blocks[-1])) + widths[k] > width:
            blocks.append([])
        blocks[-1].append(k)
    return [[0, *block] for block in blocks]


def plural(number: int, noun: str) -> str:
    """`1 request`, `2,000 requests`: a number of what has a regular plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """`value` to `digits` significant digits, thousands apart, with its unit, or `-` where there is none."""
    if value is None or value != value:  # noqa: PLR0124 - NaN is what differs from itself
        return "-"
    text = f"{value:,.{digits}g}"
    return f"{value:,.0f}{unit}" if "e+" in text or abs(value) >= 10**digits else f"{text}{unit}"
