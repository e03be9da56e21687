"""What the three commands share: how they start, how they fail, how they print."""

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tracegen.errors import WattraceError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


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


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int | Sequence[bool] = 1
) -> None:
    """Print `rows` under `columns`; the first `left` columns, or those marked, are text, the rest numbers."""
    text = [i < left for i in range(len(columns))] if isinstance(left, int) else left
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if text[i] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # As wide as the cells need, whatever the terminal: a wrapped line is better than a figure cut to an ellipsis.
    widths = [max(len(line[i]) for line in [columns, *rows]) + 2 for i in range(len(columns))]
    console = Console(width=max(80, sum(widths), len(title or "")), highlight=False, markup=False)
    if title:
        console.print(title, style="italic")
    console.print(table)


def format_si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """`value` to `digits` significant digits with its unit, or `-` where there is none."""
    if value is None or value != value:  # noqa: PLR0124 - NaN is what differs from itself
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}{unit}" if "e+" in text or abs(value) >= 10**digits else f"{text}{unit}"
