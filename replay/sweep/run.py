"""A sweep from beginning to end: plan in, folder of runs out."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from replay.hold import hold
from replay.live import Progress
from replay.plan import RunOptions
from replay.rundir import read_manifest
from replay.sweep.course import Course
from replay.sweep.order import blocks_in_order
from replay.sweep.plan import Cell, SweepPlan, difference
from replay.sweep.planfile import plan_text, presentable, read_plan
from replay.sweep.resolve import Resolved, resolve
from replay.sweep.state import CELLS, PLAN, SCHEMA_VERSION, SWEEP, CellState, Outcome, SweepFile, outcome_of
from replay.sweep.traces import make_trace, source
from replay.sweep.view import SweepView
from tracegen.console import plural
from tracegen.errors import ReplayError, WattraceError


@dataclass(frozen=True)
class Asked:
    """What a command asks beside the plan; it changes no result."""

    jobs: int | None = None  # processes in virtual time; None: one a core
    retry_failed: bool = False


def run_sweep(plan: SweepPlan, folder: Path, progress: Progress, asked: Asked | None = None) -> dict[str, Any]:
    """Run the cells of `plan` that `folder` does not have yet; what its `sweep.json` says in the end.

    Raises a `WattraceError` where nothing can be run or `folder` holds something else, and `KeyboardInterrupt` when it
    is interrupted: the same call goes on.
    """
    asked = asked or Asked()
    found = resolve(plan)
    for line in found.news:
        progress.say(line)
    _check_folder(folder)
    made_of = source(found.plan)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        file = _open(found, folder, made_of, progress)
        _begin_again(file, asked)
        file.head["state"] = "running"
        file.write()
        if found.profile is not None:
            progress.say(f"SIMULATED{' in virtual time' if plan.virtual else ''}: {found.profile.name}")
        else:
            progress.say(f"engine: {found.engine}{f'; {found.model}' if found.model else ''}")
        course = Course(found.plan, file)
        try:
            _Driver(found, course, SweepView(file, progress)).run(asked.jobs or os.cpu_count() or 1)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            _end(file, "interrupted" if stopped else "failed")
            raise
        ran = any(state.state in {"complete", "saturated"} for state in file.cells.values())
        _end(file, "complete" if ran else "failed")
        if course.unmeasured():
            progress.warn("no energy was read, so --until-ci added no repeats: name the server's GPUs with --gpus")
        elif wide := course.wide():
            progress.warn(
                f"at {plural(wide, 'setting')} J/request is not within {plan.until_ci:.3g} of its mean after "
                f"{plan.max_repeats} repeats; see --max-repeats"
            )
    if not ran:
        why = next(state.why for state in file.cells.values() if state.why)
        raise ReplayError(f"{folder}: no cell could be run: {why}")
    return file.document()


def planned(found: Resolved) -> list[CellState]:
    """All cells in the order in which they are to run; those that cannot be have failed already."""
    plan = found.plan
    states = []
    for cells in blocks_in_order(plan.cells(), plan.seed).values():
        for cell in cells:
            why = found.refused.get(cell.setting)
            states.append(CellState(cell, plan.seed + cell.repeat, "failed" if why else "planned", why))
    return states


def stored_plan(folder: Path) -> SweepPlan:
    """The plan of the sweep in `folder`. Raises `ReplayError` where there is none."""
    if not (folder / PLAN).is_file():
        raise ReplayError(f"{folder}: has no {PLAN} to go on with; give a trace, --mix or --plan")
    return read_plan(folder / PLAN)


def _check_folder(folder: Path) -> None:
    """Raise `ReplayError` for a folder that is not a sweep's."""
    if not folder.exists() or (folder / PLAN).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ReplayError(f"{folder}: holds something else than a sweep; give another -o")


def _open(found: Resolved, folder: Path, made_of: dict[str, Any], progress: Progress) -> SweepFile:
    """The sweep in `folder`, begun now or before. Raises `ReplayError` where it is another one."""
    if not (folder / PLAN).is_file():
        for name in (SWEEP, CELLS):
            assert not (folder / name).exists(), "checked before"
        _write_plan(folder, found.plan)
    else:
        asked, was = presentable(found.plan), stored_plan(folder)
        if (other := difference(asked, _as_often(was, asked))) is not None:
            raise ReplayError(f"{folder}: has a sweep of another plan: {other}; give the same, or another -o")
        if difference(asked, was) is not None:
            _write_plan(folder, found.plan)
    if not (folder / SWEEP).is_file():
        return SweepFile(folder, _head(found, made_of), planned(found))
    file = SweepFile.read(folder)
    if file.head["trace"] != made_of:
        raise ReplayError(f"{folder}: was begun with another trace of that name (its sha256 differs); give another -o")
    file.add(state for state in planned(found) if state.cell not in file.cells)  # of repeats asked for since
    done = sum(state.ended for state in file.cells.values())
    progress.say(f"{folder}: {done} of {plural(len(file.cells), 'cell')} done before")
    return file


def _write_plan(folder: Path, plan: SweepPlan) -> None:
    partial = folder / f".{PLAN}.partial"
    partial.write_text(plan_text(plan), encoding="utf-8")
    partial.replace(folder / PLAN)


def _as_often(was: SweepPlan, asked: SweepPlan) -> SweepPlan:
    """`was` with as many repeats as `asked`, where that is no fewer: a sweep that does not tell enough may go on."""
    if asked.repeats < was.repeats:
        return was
    return replace(was, repeats=asked.repeats, until_ci=asked.until_ci, max_repeats=asked.max_repeats)


def _head(found: Resolved, made_of: dict[str, Any]) -> dict[str, Any]:
    plan = found.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "state": "running",
        "simulated": found.engine == "simulated",
        "clock": "virtual" if plan.virtual else "wall",
        "model": found.model,
        "engine": found.engine,
        "seed": plan.seed,
        "trace": made_of,
    }


def _begin_again(file: SweepFile, asked: Asked) -> None:
    """Make ready what was cut off: whole runs are taken, half ones removed."""
    for cell, state in file.cells.items():
        again = state.state == "failed" and asked.retry_failed
        if state.ended and not again:
            continue
        run_dir = file.folder / CELLS / cell.name
        outcome = outcome_of(run_dir)
        if outcome.state in {"complete", "saturated"}:  # it ended, and then the sweep was killed
            file.cells[cell] = outcome.on(state)
            continue
        shutil.rmtree(run_dir, ignore_errors=True)
        file.cells[cell] = CellState(cell, state.seed)


def _end(file: SweepFile, state: str) -> None:
    """Say how the sweep ended; nothing runs any more."""
    running = [one for one in file.cells.values() if one.state == "running"]
    file.cells |= {one.cell: replace(one, state="interrupted", why="the sweep ended") for one in running}
    file.head["state"] = state
    file.write()


class _Driver:
    """Runs the cells of a course."""

    def __init__(self, found: Resolved, course: Course, view: SweepView) -> None:
        """Nothing runs yet."""
        self._found, self._course, self._view = found, course, view

    def run(self, jobs: int) -> None:
        """Run all that is left."""
        if self._found.plan.virtual:
            from replay.sweep.virtual import run_cells
            from replay.virtual.run import signals_as_interrupt

            with signals_as_interrupt():
                run_cells(self._course, jobs, self._begin, self._finish)
        else:
            from replay.sweep import wall

            wall.run_cells(self._course, self._found.engine, self._begin, self._finish, self._view)

    def _begin(self, cell: Cell) -> RunOptions | None:
        """What the run of `cell` is asked; its trace is there then. None where that cannot be made."""
        self._view.begin(cell)
        plan, folder = self._found.plan, self._course.file.folder
        try:
            trace = make_trace(plan, cell, folder, self._view.say)
        except WattraceError as error:
            self._finish(cell, Outcome("failed", str(error)))
            return None
        return plan.options(cell, trace, folder / CELLS / cell.name)

    def _finish(self, cell: Cell, outcome: Outcome) -> None:
        """Take down how `cell` ended."""
        file = self._course.file
        if self._found.engine == "attached" and outcome.state in {"complete", "saturated"}:  # it says what it is
            manifest = read_manifest(file.folder / CELLS / cell.name)
            simulated = manifest["engine"] == "simulated"
            file.head |= {"engine": manifest["engine"], "simulated": simulated}
            file.head["model"] = manifest["instances"][0]["model"]
        file.put(outcome.on(file.cells[cell]))
        self._view.end(cell, outcome)
