"""Cells in virtual time: one after the other, or several at a time in processes of their own."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial

from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.sweep.course import Course
from replay.sweep.plan import Cell
from replay.sweep.saturation import Backlog
from replay.sweep.state import Outcome, outcome_of
from tracegen.errors import WattraceError

# A process takes 4 s to import and load what is compiled (measured); beside several of those a pool costs nothing.
_POOL_PAYS_S = 20.0
_PR_SET_PDEATHSIG = 1
_EXIT_INTERRUPTED = 130

# Makes the cell's trace, and says what its run is asked; None where there is no such trace, and the cell has failed.
Begin = Callable[[Cell], RunOptions | None]
End = Callable[[Cell, Outcome], None]


def run_cell(options: RunOptions) -> Outcome:
    """Run one cell; what cannot be run is its outcome, and no error."""
    from replay.virtual.run import run_virtual

    started_s = time.monotonic()
    assert options.output is not None
    try:
        run_virtual(options, QuietProgress(), Backlog().look)
    except WattraceError as error:
        return Outcome("failed", str(error), time.monotonic() - started_s)
    return outcome_of(options.output, time.monotonic() - started_s)


def run_cells(course: Course, jobs: int, begin: Begin, end: End) -> None:
    """Run all cells of `course` that are left, with up to `jobs` processes, where that is quicker."""
    while (cell := course.take()) is not None:
        if (options := begin(cell)) is None:
            continue
        outcome = run_cell(options)
        end(cell, outcome)
        if jobs > 1 and course.left() * (outcome.wall_s or 0.0) > _POOL_PAYS_S:
            _in_pool(course, min(jobs, course.left()), begin, end)


def _in_pool(course: Course, jobs: int, begin: Begin, end: End) -> None:
    """Run what is left, `jobs` cells at a time."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of what computes
    prepare = partial(_prepare_process, os.getpid())
    running: dict[Future[Outcome], Cell] = {}
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare) as pool:
        try:
            while True:
                while len(running) < jobs and (cell := course.take()) is not None:
                    if (options := begin(cell)) is not None:
                        running[pool.submit(run_cell_in_process, options)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    end(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # each removes its unfinished run
            raise


def run_cell_in_process(options: RunOptions) -> Outcome:
    """`run_cell` in a process that does not outlive an interruption."""
    try:
        return run_cell(options)
    except KeyboardInterrupt:
        os._exit(_EXIT_INTERRUPTED)


def _prepare_process(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(_EXIT_INTERRUPTED)
