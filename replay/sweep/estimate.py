"""What a sweep would do, and how long it would take: what can be known before it runs, and why the rest is not."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from replay.clock import NS_PER_S
from replay.plan import RunOptions
from replay.sweep.plan import Cell, SweepPlan
from replay.sweep.resolve import Resolved, resolve
from replay.sweep.run import planned
from replay.sweep.state import CellState, Outcome
from replay.sweep.traces import make_trace, source, span_s
from tracegen.console import format_si, plural, print_table, prose
from tracegen.durations import format_duration

_SETTLE_S = 1.0  # half a second before and after each measurement of idle power (`replay.prepare`)
_SIM_START_S = 5.0  # the simulated server imports and loads compiled code; measured, on two cores


def estimate(plan: SweepPlan) -> dict[str, Any]:
    """The cells of `plan` in their order, how long each and all take, s, and what they cost.

    What is simulated is tried with one cell, in virtual time: how long that took, and its energy. Nothing is kept.
    Raises a `WattraceError` where no cell could run.
    """
    found = resolve(plan)
    made_of, plan = source(found.plan), found.plan
    states = planned(found)
    runs = [state for state in states if not state.ended]
    tried = _try(found, runs[0].cell) if found.profile is not None else None
    each_s = tried.wall_s if plan.virtual and tried else span_s(plan) + 2 * plan.run.idle_ns / NS_PER_S + _SETTLE_S
    blocks = len({state.cell.setting.block for state in runs})
    notes = list(found.news)
    if plan.until_ci is not None:
        notes.append(f"--until-ci adds up to {plan.max_repeats - plan.repeats} repeats of each setting")
    if plan.virtual:
        assert tried is not None
        assert each_s is not None
        total_s, gpu_hours = each_s * len(runs), None
        notes.append(f"each cell as long as {runs[0].cell.name} took; on one core (this machine has {os.cpu_count()})")
    else:
        total_s = (each_s or 0.0) * len(runs) + (_SIM_START_S * blocks if found.engine == "simulated" else 0.0)
        tp_s = sum(state.cell.setting.tp for state in runs) * plan.run.replicas * (each_s or 0.0)
        gpu_hours = tp_s / 3600 if found.engine != "simulated" else None
        notes += _unknown(found, blocks)
    return {
        "simulated": found.engine == "simulated",
        "clock": "virtual" if plan.virtual else "wall",
        "engine": found.engine,
        "model": found.model,
        "trace": made_of,
        "blocks": blocks,
        "seconds": total_s,
        "gpu_hours": gpu_hours,
        "energy": _energy(tried, runs[0]),
        "notes": notes,
        "cells": [
            {**_cell(state, order), "seconds": None if state.ended else each_s} for order, state in enumerate(states)
        ],
    }


def _try(found: Resolved, cell: Cell) -> Outcome:
    """How one cell goes in virtual time."""
    from replay.sweep.virtual import run_cell

    with tempfile.TemporaryDirectory() as folder:
        trace = make_trace(found.plan, cell, Path(folder), lambda _: None)
        options = found.plan.options(cell, trace, Path(folder) / cell.name)
        run_cell(_virtual(options, Path(folder) / "first"))  # loads what is compiled
        return run_cell(_virtual(options, Path(folder) / cell.name))


def _virtual(options: RunOptions, output: Path) -> RunOptions:
    """`options` for virtual time, without what means nothing there."""
    return replace(
        options, virtual=True, engine="sim", output=output, warmup_ns=0, idle_ns=max(options.idle_ns, NS_PER_S)
    )


def _energy(tried: Outcome | None, first: CellState) -> dict[str, Any]:
    if tried is None:
        return {"joules_per_request": None, "why": "not known before it is measured; --virtual simulates the sweep"}
    if tried.energy_per_request_j is None:
        return {"joules_per_request": None, "why": f"{first.cell.name} could not be simulated: {tried.why}"}
    return {"joules_per_request": tried.energy_per_request_j, "why": f"SIMULATED, of {first.cell.name} alone"}


def _unknown(found: Resolved, blocks: int) -> list[str]:
    """What a sweep in wall time takes beside its cells' traces and idle power."""
    notes = [
        "the answers of each cell's last requests take longer",
        f"up to {format_duration(found.plan.cool_down_max_ns)} before each cell until idle power is back",
    ]
    if found.engine == "vllm":
        notes.append(f"{plural(blocks, 'start')} of the server, whose time is not known before")
    return notes


def _cell(state: CellState, order: int) -> dict[str, Any]:
    kept = ("cell", "tp", "freq_mhz", "rate_rps", "batch_cap", "power_cap_w", "repeat", "seed", "order", "state", "why")
    entry = state.entry(order)
    return {name: entry[name] for name in kept}


def print_estimate(found: Mapping[str, Any]) -> None:
    """`estimate` for people."""
    cells = found["cells"]
    rows = [[str(c["order"]), c["cell"], str(c["seed"]), _seconds(c["seconds"]), c["why"] or ""] for c in cells]
    print_table(["order", "cell", "seed", "takes", ""], rows, left=[False, True, False, False, True], wrap=True)
    runs = [cell for cell in cells if cell["state"] == "planned"]
    mark = "SIMULATED  " if found["simulated"] else ""
    starts = "" if found["clock"] == "virtual" else f", {plural(found['blocks'], 'server start')}"
    energy = found["energy"]
    prose(
        [
            f"{mark}{plural(len(runs), 'cell')} to run{starts}, about {_seconds(found['seconds'])}",
            *([] if found["gpu_hours"] is None else [f"cost    {found['gpu_hours']:.3g} GPU hours"]),
            f"energy  {format_si(energy['joules_per_request'], ' J/request')}: {energy['why']}",
            *(f"note    {note}" for note in found["notes"]),
        ]
    )


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(round(seconds * NS_PER_S))
