"""`sweep.json`: what is known of a sweep and its cells, rewritten whole after each change."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from replay.rundir import read_manifest
from replay.sweep.plan import Block, Cell, Setting
from tracegen.errors import ReplayError, RunError

SCHEMA_VERSION = 1
SWEEP, PLAN, CELLS = "sweep.json", "plan.toml", "cells"
ENDED = frozenset({"complete", "saturated", "failed"})


@dataclass(frozen=True)
class CellState:
    """A cell and how far it is."""

    cell: Cell
    seed: int
    state: str = "planned"  # planned | running | complete | saturated | failed | interrupted
    why: str | None = None
    wall_s: float | None = None  # that it took
    energy_per_request_j: float | None = None  # by the counters of its GPUs, idle between requests included
    ttft_p99_ms: float | None = None
    cool_down: Mapping[str, Any] | None = None  # before it: `waited_s`, `idle_w`, `first_idle_w`, `back`

    @property
    def ended(self) -> bool:
        """Whether it is not to be run any more."""
        return self.state in ENDED

    def entry(self, order: int) -> dict[str, Any]:
        """As `sweep.json` has it."""
        tp, freq_mhz, batch_cap, power_cap_w = self.cell.setting
        return {
            "cell": self.cell.name,
            "tp": tp,
            "freq_mhz": freq_mhz,
            "rate_rps": self.cell.rate_rps,
            "batch_cap": batch_cap,
            "power_cap_w": power_cap_w,
            "repeat": self.cell.repeat,
            "seed": self.seed,
            "order": order,
            "run": f"{CELLS}/{self.cell.name}",
            "state": self.state,
            "why": self.why,
            "wall_s": None if self.wall_s is None else round(self.wall_s, 3),
            "energy_per_request_j": self.energy_per_request_j,
            "ttft_p99_ms": self.ttft_p99_ms,
            "cool_down": self.cool_down,
        }


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    state: str
    why: str | None = None
    wall_s: float | None = None
    energy_per_request_j: float | None = None
    ttft_p99_ms: float | None = None
    cool_down: Mapping[str, Any] | None = None

    def on(self, before: CellState) -> CellState:
        """`before` with this end."""
        return replace(
            before,
            state=self.state,
            why=self.why,
            wall_s=self.wall_s,
            energy_per_request_j=self.energy_per_request_j,
            ttft_p99_ms=self.ttft_p99_ms,
            cool_down=self.cool_down,
        )


def outcome_of(run_dir: Path, wall_s: float | None = None) -> Outcome:
    """How the run in `run_dir` ended, by its manifest; `interrupted` where it was cut off or is not there."""
    from replay.summary import summarize

    try:
        manifest = read_manifest(run_dir)
    except RunError:
        return Outcome("interrupted", "has no run directory")
    state, early = str(manifest.get("state")), manifest.get("stopped_early")
    if state != "complete" and early is None:
        why = manifest.get("failure") or {"failed": "the run failed"}.get(state, "was cut off")
        return Outcome("failed" if state == "failed" else "interrupted", str(why), wall_s)
    try:
        found = summarize(run_dir)
    except RunError as error:
        return Outcome("interrupted", str(error), wall_s)
    energy_j, served, ttft_ms = found["energy_j"], found["requests_ok"], found["ttft_ms"]
    return Outcome(
        "complete" if early is None else "saturated",
        early,
        wall_s,
        energy_j / served if energy_j is not None and served else None,
        None if ttft_ms is None else ttft_ms["p99"],
    )


class SweepFile:
    """`sweep.json` of the sweep in `folder`: `head`, and the cells in the order in which they run."""

    def __init__(self, folder: Path, head: Mapping[str, Any], cells: Iterable[CellState]) -> None:
        """Nothing is written yet."""
        self.folder, self.head = folder, dict(head)
        self.cells = {cell.cell: cell for cell in cells}

    @classmethod
    def read(cls, folder: Path) -> "SweepFile":
        """What `folder` has. Raises `ReplayError` when it cannot be read."""
        path = folder / SWEEP
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            entries = document.pop("cells")
            cells = [_cell(entry) for entry in sorted(entries, key=lambda entry: entry["order"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            again = "remove it, and the same command makes it anew from the cells' runs"
            raise ReplayError(f"{path}: is damaged ({why}); {again}") from None
        if (version := document.get("schema_version")) != SCHEMA_VERSION:
            raise ReplayError(f"{path}: schema_version {version} is not this program's {SCHEMA_VERSION}")
        return cls(folder, document, cells)

    def add(self, cells: Iterable[CellState]) -> None:
        """Take new cells, each behind the others of its block; nothing is written."""
        blocks: dict[Block, list[CellState]] = {}
        for state in [*self.cells.values(), *cells]:
            blocks.setdefault(state.cell.setting.block, []).append(state)
        self.cells = {state.cell: state for states in blocks.values() for state in states}

    def put(self, *cells: CellState) -> None:
        """Take what is new of `cells`, and write all."""
        self.cells |= {cell.cell: cell for cell in cells}
        self.write()

    def document(self) -> dict[str, Any]:
        """What is written."""
        return {**self.head, "cells": [state.entry(order) for order, state in enumerate(self.cells.values())]}

    def write(self) -> None:
        """Write it by rename."""
        path = self.folder / SWEEP
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)


def _cell(entry: Mapping[str, Any]) -> CellState:
    setting = Setting(entry["tp"], entry["freq_mhz"], entry["batch_cap"], entry["power_cap_w"])
    same = ("seed", "state", "why", "wall_s", "energy_per_request_j", "ttft_p99_ms", "cool_down")
    return CellState(Cell(setting, entry["rate_rps"], entry["repeat"]), **{name: entry[name] for name in same})
