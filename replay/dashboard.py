"""The picture of a run in a terminal: how far it is, its figures, and how rate and power went over the last minutes."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from replay.clock import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from replay.live import Snapshot

WIDTH = 80  # columns; a wider terminal is left empty, a narrower one cuts
_CELL_NS = 3 * NS_PER_S  # what one cell of a sparkline stands for
_CELLS = 40  # two minutes
_BLOCKS = "▁▂▃▄▅▆▇█"


class History:
    """The means of some figures over each of the last `_CELLS` spans of time."""

    def __init__(self) -> None:
        self.rate_rps: deque[float | None] = deque(maxlen=_CELLS)
        self.power_w: deque[float | None] = deque(maxlen=_CELLS)
        self._cell = -1
        self._seen: dict[str, list[float]] = {}

    def add(self, snapshot: "Snapshot") -> None:
        """Take another moment of the run."""
        cell = snapshot.elapsed_ns // _CELL_NS
        if cell != self._cell:
            self._cell, self._seen = cell, {"rate": [], "power": []}
            self.rate_rps.append(None)
            self.power_w.append(None)
        figures = ("rate", snapshot.sent_rps, self.rate_rps), ("power", snapshot.watts, self.power_w)
        for name, value, course in figures:
            if value is not None:
                self._seen[name].append(value)
                course[-1] = sum(self._seen[name]) / len(self._seen[name])


def sparkline(course: Sequence[float | None]) -> str:
    """One character a value, from zero to the greatest; a blank where there was none."""
    top = max((value for value in course if value is not None), default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(
        " " if value is None else _BLOCKS[round(steps * max(0.0, value) / top) if top > 0 else 0] for value in course
    )


def render(snapshot: "Snapshot", history: History) -> RenderableType:
    """The picture, `WIDTH` columns wide."""
    s = snapshot
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(ProgressBar(total=max(1, s.planned), completed=s.ended), f"{s.ended:,} of {s.planned:,} ended")
    figures = Table.grid(padding=(0, 1))
    for width in (9, 30, 6, 28):
        figures.add_column(width=width, no_wrap=True)
    for left, right in zip(_sending(s), _serving(s), strict=True):
        figures.add_row(Text(left[0], "dim"), left[1], Text(right[0], "dim"), right[1])
    body = Group(head, figures, *_courses(history))
    title = f"{'SIMULATED  ' if s.simulated else ''}{_time(s)}"
    return Panel(body, box=box.ROUNDED, width=WIDTH, title=title, title_align="left", border_style="dim")


def _time(s: "Snapshot") -> str:
    """How long the run goes on already, of how long."""
    if s.elapsed_ns > s.planned_ns and s.sent == s.planned:
        return f"all sent, waiting for {s.sent - s.ended:,} answers"
    return f"{min(s.elapsed_ns, s.planned_ns) / NS_PER_S:,.0f} of {s.planned_ns / NS_PER_S:,.0f} s"


def _sending(s: "Snapshot") -> list[tuple[str, RenderableType]]:
    """What the client does."""
    rate = f"{number(s.sent_rps, 1)} of {number(s.target_rps, 1)} requests/s"
    errors = Text(f"{s.errors:,}", "bold red" if s.errors else "")
    return [
        ("rate", rate),
        ("in flight", f"{s.sent - s.ended:,}"),
        ("lag", pair(s.lag_p50_ns, s.lag_p99_ns)),
        ("errors", errors),
        ("clock", f"{number(s.clock_mhz)} MHz"),
    ]


def _serving(s: "Snapshot") -> list[tuple[str, RenderableType]]:
    """What the server and its GPUs do."""
    return [
        ("TTFT", pair(s.ttft_p50_ns, s.ttft_p99_ns)),
        ("TBT", pair(s.tbt_p50_ns, s.tbt_p99_ns)),
        ("output", f"{number(s.output_tokens_per_s)} tokens/s"),
        ("power", f"{number(s.watts)} W"),
        ("energy", f"{number(s.joules_per_token, 2)} J/token"),
    ]


def _courses(history: History) -> Iterator[Table]:
    """A sparkline each of rate and power, where there is one."""
    for name, course, unit, style in (
        ("rate", history.rate_rps, "requests/s", "cyan"), ("power", history.power_w, "W", "yellow")
    ):  # fmt: skip
        known = [value for value in course if value is not None]
        if known:
            line = Table.grid(padding=(0, 1))
            for width in (9, _CELLS, 25):
                line.add_column(width=width, no_wrap=True)
            top = f"up to {max(known):,.{0 if max(known) >= 100 else 1}f} {unit}"
            line.add_row(Text(name, "dim"), Text(sparkline(course), style), Text(top, "dim"))
            yield line


def number(value: float | None, digits: int = 0) -> str:
    """`value` with so many digits, a dash where nothing was measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def pair(p50_ns: float | None, p99_ns: float | None) -> str:
    """Two percentiles in ms, or dashes."""
    if p50_ns is None or p99_ns is None:
        return "-"
    return f"p50 {p50_ns / NS_PER_MS:,.1f}  p99 {p99_ns / NS_PER_MS:,.1f} ms"
