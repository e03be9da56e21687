"""What a run shows while it goes on: a live table in a terminal, plain lines elsewhere, nothing with `--quiet`."""

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from replay.clock import NS_PER_MS, NS_PER_S, now_ns

_PLAIN_PERIOD_NS = 5 * NS_PER_S


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment; None where nothing has been measured yet."""

    elapsed_ns: int
    planned_ns: int
    planned: int
    sent: int
    ended: int
    errors: int
    lag_p50_ns: float | None
    lag_p99_ns: float | None
    ttft_p50_ns: float | None
    ttft_p99_ns: float | None
    output_tokens_per_s: float | None
    watts: float | None
    clock_mhz: int | None


class Progress(Protocol):
    """Where a run's news goes."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""

    def say(self, message: str) -> None:
        """A line that stays."""

    def warn(self, message: str) -> None:
        """A line that must be seen, with `--quiet` too."""

    def status(self, message: str) -> None:
        """A line that the next one replaces."""

    def update(self, snapshot: Snapshot) -> None:
        """The run's state."""


def open_progress(*, quiet: bool) -> Progress:
    """The progress that fits where stderr goes."""
    if quiet:
        return QuietProgress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def _ms(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / NS_PER_MS:,.1f} ms"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}"


def cells(snapshot: Snapshot) -> list[tuple[str, str]]:
    """The figures of `snapshot` as (name, text) pairs."""
    s = snapshot
    waiting = ", waiting for answers" if s.elapsed_ns > s.planned_ns and s.sent == s.planned else ""
    return [
        ("time", f"{min(s.elapsed_ns, s.planned_ns) / NS_PER_S:.0f} / {s.planned_ns / NS_PER_S:.0f} s{waiting}"),
        ("sent", f"{s.sent:,} / {s.planned:,}"),
        ("in flight", f"{s.sent - s.ended:,}"),
        ("errors", f"{s.errors:,}"),
        ("lag p50 / p99", f"{_ms(s.lag_p50_ns)} / {_ms(s.lag_p99_ns)}"),
        ("TTFT p50 / p99", f"{_ms(s.ttft_p50_ns)} / {_ms(s.ttft_p99_ns)}"),
        ("output", _number(s.output_tokens_per_s, "tokens/s")),
        ("power", _number(s.watts, "W")),
        ("SM clock", _number(s.clock_mhz, "MHz")),
    ]


class LiveProgress:
    """A table that redraws in place."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        """Take the terminal's last lines."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._live.stop()

    def say(self, message: str) -> None:
        """Print above the table."""
        self._console.print(message)

    def warn(self, message: str) -> None:
        """Print it above the table."""
        self.say(f"WARNING: {message}")

    def status(self, message: str) -> None:
        """Show `message` in the table's place."""
        self._live.update(message, refresh=True)

    def update(self, snapshot: Snapshot) -> None:
        """Redraw the table."""
        table = Table.grid(padding=(0, 2))
        for name, text in cells(snapshot):
            table.add_row(name, text)
        self._live.update(table, refresh=True)


class PlainProgress:
    """A line every five seconds, for logs."""

    def __init__(self) -> None:
        self._next_ns = 0

    def __enter__(self) -> Self:
        """Nothing to take."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""

    def say(self, message: str) -> None:
        """Print the line."""
        print(message, file=sys.stderr, flush=True)  # noqa: T201 - this is the console

    def warn(self, message: str) -> None:
        """Print the line."""
        self.say(f"WARNING: {message}")

    def status(self, message: str) -> None:
        """A passing state is not worth a line in a log, unless it lasts."""
        if now_ns() >= self._next_ns:
            self._next_ns = now_ns() + _PLAIN_PERIOD_NS
            self.say(message)

    def update(self, snapshot: Snapshot) -> None:
        """Print the figures, not more often than every five seconds."""
        if now_ns() >= self._next_ns:
            self._next_ns = now_ns() + _PLAIN_PERIOD_NS
            self.say("  ".join(f"{name} {text}" for name, text in cells(snapshot)))


class QuietProgress:
    """Nothing but warnings."""

    def __enter__(self) -> Self:
        """Nothing to take."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""

    def say(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Print the line."""
        print(f"WARNING: {message}", file=sys.stderr, flush=True)  # noqa: T201 - this is the console

    def status(self, message: str) -> None:
        """Say nothing."""

    def update(self, snapshot: Snapshot) -> None:
        """Say nothing."""
