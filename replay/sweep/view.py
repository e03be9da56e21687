"""What a sweep shows while it goes on: how far it is, what runs, when it will end, what the last cell came to."""

import time

from replay.clock import NS_PER_S
from replay.live import Progress
from replay.sweep.plan import Cell
from replay.sweep.state import CellState, Outcome, SweepFile
from tracegen.console import format_si
from tracegen.durations import format_duration


class SweepView:
    """The one line of a sweep, written to a `Progress`."""

    def __init__(self, file: SweepFile, progress: Progress) -> None:
        """`progress` is open."""
        self._file, self._progress = file, progress
        self._started_s = self._ended_s = time.monotonic()
        self._ended = 0
        self._last: CellState | None = None
        self._current: Cell | None = None

    def say(self, message: str) -> None:
        """A line that stays."""
        self._progress.say(message)

    def warn(self, message: str) -> None:
        """A line that must be seen."""
        where = "" if self._current is None else f"{self._current.name}: "
        self._progress.warn(f"{where}{message}")

    def status(self, message: str) -> None:
        """What the cell under way does now, beside the sweep's own figures."""
        self._progress.status(f"{self.line()}  |  {message}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.__exit__(None, None, None)

    def begin(self, cell: Cell) -> None:
        """`cell` begins."""
        self._current = cell
        self._progress.status(self.line())

    def end(self, cell: Cell, outcome: Outcome) -> None:
        """`cell` has ended."""
        self._ended, self._ended_s = self._ended + 1, time.monotonic()
        self._last = self._file.cells[cell]
        if outcome.state == "failed":
            self._progress.say(f"{cell.name}: failed: {outcome.why}")
        self._progress.status(self.line())

    def line(self) -> str:
        """The sweep in one line."""
        states = self._file.cells.values()
        left = sum(not state.ended for state in states)
        parts = [f"{len(states) - left} of {len(states)} cells done"]
        if self._ended and left:
            each_s = (self._ended_s - self._started_s) / self._ended
            eta_s = max(0.0, each_s * left - (time.monotonic() - self._ended_s))
            parts.append(f"{format_duration(round(eta_s * NS_PER_S))} left")
        if self._current is not None and left:
            parts.append(f"now {self._current.name}")
        if self._last is not None:
            parts.append(f"last {self._last.cell.name}: {figures(self._last)}")
        return "  ".join(parts)


def figures(state: CellState) -> str:
    """What a cell came to, in short."""
    if state.energy_per_request_j is None and state.ttft_p99_ms is None:
        return state.state
    energy, ttft = format_si(state.energy_per_request_j), format_si(state.ttft_p99_ms)
    mark = "" if state.state == "complete" else f", {state.state}"
    return f"{energy} J/request, TTFT p99 {ttft} ms{mark}"
