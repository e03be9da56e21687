"""What a run shows while it goes on: a live picture in a terminal, plain lines elsewhere, nothing with `--quiet`."""

import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live

from replay.clock import NS_PER_MS, NS_PER_S, now_ns
from replay.dashboard import History, number, render

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN_PERIOD_NS = 5 * NS_PER_S
_LIVE_PERIOD_NS = NS_PER_S // 2
LINE = 160  # columns of a line of a log
_LEAVE_S = 2.0  # how long a terminal that stands still is waited for at the end


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
    target_rps: float | None = None  # requests that came due over the last seconds
    sent_rps: float | None = None  # requests that were sent over the same seconds
    tbt_p50_ns: float | None = None  # time between tokens
    tbt_p99_ns: float | None = None
    joules_per_token: float | None = None  # power by output rate, both over the last seconds
    waiting: int = 0  # requests that were sent and wait for their first token
    simulated: bool = False  # of a simulated engine: what is shown says so


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


def line(snapshot: Snapshot) -> str:
    """The figures of `snapshot` as one line of a log, at most `LINE` columns."""
    s = snapshot
    at_s, of_s = min(s.elapsed_ns, s.planned_ns) / NS_PER_S, s.planned_ns / NS_PER_S
    waiting = s.elapsed_ns > s.planned_ns and s.sent == s.planned
    figures = [
        "all sent" if waiting else f"{at_s:.0f}/{of_s:.0f} s",
        f"{s.sent:,}/{s.planned:,} sent",
        f"{s.sent - s.ended:,} in flight",
        f"{s.errors:,} errors",
        f"{number(s.sent_rps, 1)}/s",
        f"p99 lag {_ms(s.lag_p99_ns)}, TTFT {_ms(s.ttft_p99_ns)}, TBT {_ms(s.tbt_p99_ns)} ms",
        f"{number(s.output_tokens_per_s)} tokens/s",
        f"{number(s.watts)} W",
    ]
    return "  ".join(figures)


def _ms(ns: float | None) -> str:
    """A time in ms, without a decimal from 100 on; a dash where nothing was measured."""
    return number(None if ns is None else ns / NS_PER_MS, 0 if ns is not None and ns >= 100 * NS_PER_MS else 1)


class LiveProgress:
    """A picture that redraws in place.

    A thread of its own writes, for a terminal can stand still (Ctrl-S) and a run must not. What cannot be written in
    time is left out, but for what is said.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._history = History()
        self._next_ns = 0
        self._picture: RenderableType | None = None  # the latest that was not drawn yet
        self._lock = Lock()
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._writer = Thread(target=self._write, name="terminal", daemon=True)

    def __enter__(self) -> Self:
        """Take the terminal's last lines."""
        self._actions.put(partial(self._live.start, refresh=False))
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back, unless the terminal stands still."""
        self._actions.put(self._live.stop)
        self._actions.put(None)
        self._writer.join(_LEAVE_S)

    def say(self, message: str) -> None:
        """Print above the picture."""
        self._actions.put(partial(self._console.print, message))

    def warn(self, message: str) -> None:
        """Print it above the picture."""
        self.say(f"WARNING: {message}")

    def status(self, message: str) -> None:
        """Show `message` in the picture's place."""
        self._draw(message)

    def update(self, snapshot: Snapshot) -> None:
        """Redraw the picture, not more than twice a second."""
        self._history.add(snapshot)
        if now_ns() >= self._next_ns:
            self._next_ns = now_ns() + _LIVE_PERIOD_NS
            self._draw(render(snapshot, self._history))

    def _draw(self, picture: RenderableType) -> None:
        """Have `picture` drawn, in place of one that has not been drawn yet."""
        waiting = self._exchange(picture)
        if waiting is None:
            self._actions.put(self._draw_latest)

    def _draw_latest(self) -> None:
        picture = self._exchange(None)
        assert picture is not None
        self._live.update(picture, refresh=True)

    def _exchange(self, picture: RenderableType | None) -> RenderableType | None:
        """Put `picture` in the place of the latest, which is given back."""
        with self._lock:
            before, self._picture = self._picture, picture
        return before

    def _write(self) -> None:
        """Do what is asked, until told to end or the terminal is gone: then nobody is left to be told."""
        with contextlib.suppress(OSError):
            while (action := self._actions.get()) is not None:
                action()


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
            self.say(line(snapshot))


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
