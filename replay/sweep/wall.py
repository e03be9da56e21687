"""Cells in wall time: one server start a block, clocks and caps set for each cell, a rest between two."""

import asyncio
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import uvloop

from replay.engines.kept import KeptServers
from replay.live import Snapshot, line
from replay.plan import RunOptions
from replay.prepare import BOARD, STEP_LOGS
from replay.rundir import read_manifest, write_manifest
from replay.session import run as run_session
from replay.sweep.cooldown import Baseline, cool_down
from replay.sweep.course import Course
from replay.sweep.plan import Block, Cell
from replay.sweep.saturation import Backlog
from replay.sweep.state import Outcome, outcome_of
from replay.sweep.view import SweepView
from replay.sweep.virtual import Begin, End
from tracegen.errors import WattraceError

SERVERS = "servers"
_LOOK_S = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_cells(course: Course, engine: str, begin: Begin, end: End, view: SweepView) -> None:
    """Run all cells of `course` that are left; `engine` is `simulated`, `vllm` or `attached`.

    Raises `KeyboardInterrupt` when a signal ends it, after the cell under way has been written.
    """

    async def run_blocks() -> None:
        for block in list(course.blocks):
            await _Block(course, block, engine, begin, end, view).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_blocks())


class CellProgress:
    """The progress of one cell's run: shown in the sweep's line, and watched for saturation."""

    def __init__(self, view: SweepView) -> None:
        """`view` is open."""
        self._view, self._backlog, self._next_s = view, Backlog(), 0.0
        self.why: str | None = None  # why the run was ended

    def __enter__(self) -> Self:
        """The view is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back: replay ends at once."""
        self._view.close()

    def say(self, message: str) -> None:
        """What a run has to say stands in its manifest; a sweep shows it for a moment."""
        self.status(message)

    def warn(self, message: str) -> None:
        """A line that must be seen."""
        self._view.warn(message)

    def status(self, message: str) -> None:
        """Beside the sweep's own figures."""
        self._view.status(message)

    def update(self, snapshot: Snapshot) -> None:
        """Show the state, and end the run in order where it is clearly saturated."""
        self.status(line(snapshot))
        at_s = snapshot.elapsed_ns / 1e9
        if self.why is not None or at_s < self._next_s:
            return
        self._next_s = at_s + _LOOK_S
        self.why = self._backlog.look(at_s, snapshot.sent, snapshot.planned, snapshot.waiting)
        if self.why is not None:
            signal.raise_signal(signal.SIGINT)  # what is sent is on record, as after Ctrl-C


class _Block:
    """The cells that one server can serve."""

    def __init__(self, course: Course, block: Block, engine: str, begin: Begin, end: End, view: SweepView) -> None:
        self._course, self._block, self._engine = course, block, engine
        self._begin, self._end, self._view = begin, end, view
        self._baseline: Baseline | None = None
        self._cooled: dict[str, Any] | None = None
        cap = "" if block.batch_cap is None else f"-b{block.batch_cap}"
        self._home = course.file.folder / SERVERS / f"tp{block.tp}{cap}"

    async def run(self) -> None:
        """Run all; a server that ended by itself is started again for what is left."""
        cell = self._course.take(self._block)
        while cell is not None:
            async with AsyncExitStack() as stack:
                stack.callback(self._clear)
                servers = None
                if self._engine != "attached":
                    servers = await stack.enter_async_context(KeptServers(self._home))
                self._baseline = None
                while cell is not None and not (servers and servers.lost):
                    await self._one(cell, servers)
                    cell = self._course.take(self._block)
            while cell is not None and servers is not None and servers.broken is not None:  # nor would it start again
                self._end(cell, Outcome("failed", f"the server of its block did not start: {servers.broken}"))
                cell = self._course.take(self._block)

    def _clear(self) -> None:
        """Remove what servers keep beside their logs."""
        (self._home / BOARD).unlink(missing_ok=True)
        shutil.rmtree(self._home / STEP_LOGS, ignore_errors=True)

    async def _one(self, cell: Cell, servers: KeptServers | None) -> None:
        """Run one cell."""
        options = self._begin(cell)
        if options is None:
            return
        if servers is not None and servers.started:
            options = replace(options, num_warmups=0)  # it is warm
        assert options.output is not None
        started_s = time.monotonic()
        progress = CellProgress(self._view)
        try:
            with _interruptible():
                await self._cool_down(options)
            await run_session(options, progress, servers)
        except WattraceError as error:
            self._end(cell, Outcome("failed", str(error), time.monotonic() - started_s))
            return
        manifest = read_manifest(options.output)
        early = {} if progress.why is None else {"stopped_early": progress.why, "failure": progress.why}
        manifest |= {"sweep": {"cell": cell.name, "cool_down": self._cooled}, **early}
        write_manifest(options.output, manifest)
        outcome = outcome_of(options.output, time.monotonic() - started_s)
        if outcome.state == "interrupted":
            raise KeyboardInterrupt
        self._baseline = self._baseline or Baseline.of(options.output, manifest)
        self._end(cell, replace(outcome, cool_down=self._cooled))

    async def _cool_down(self, options: RunOptions) -> None:
        """Wait for the idle power of the block's beginning."""
        self._cooled = None
        if self._baseline is None or not self._course.plan.cool_down_max_ns:
            return
        spec = f"sim:{self._home / BOARD}" if self._engine == "simulated" else "nvml"
        power_spec = spec if options.power == "nvml" else options.power
        self._cooled = await cool_down(
            self._baseline, spec, power_spec, self._home / "cool-down", self._course.plan.cool_down_max_ns,
            self._view.status,
        )  # fmt: skip


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a signal end what goes on between two runs, which have handlers of their own."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
