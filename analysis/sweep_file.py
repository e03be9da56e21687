"""What a sweep says of itself: `sweep.json` in its directory (docs/tables.md), as `replay sweep` writes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.manifest import check_keys
from replay.rundir import MANIFEST
from tracegen.errors import AnalysisError, RunError

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 1
SETTING = ("tp", "freq_mhz", "rate_rps", "batch_cap", "power_cap_w")  # what tells cells apart, repeats aside
COMPLETE = "complete"  # the state of cells whose run went to its end; what was cut off tells how long it ran
_NUMBER = (int, float)
_SHAPES: dict[str, Any] = {
    "state": str,
    "simulated": bool,
    "clock": str,
    "model": str,
    "engine": str,
    "cells": [
        {
            "cell": str,
            "tp": int,
            "freq_mhz": _NUMBER,
            "rate_rps": _NUMBER,
            "batch_cap": int,
            "power_cap_w": _NUMBER,
            "repeat": int,
            "run": str,
            "state": str,
            "why": str,
        }
    ],
}


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: a setting, one of its repeats, and how it ended; None: the driver's own, or not given."""

    cell: str
    tp: int
    freq_mhz: float | None
    rate_rps: float | None
    batch_cap: int | None
    power_cap_w: float | None
    repeat: int
    state: str
    why: str | None
    run: str  # its directory, from the sweep's


@dataclass(frozen=True)
class SweepFile:
    """A sweep's directory and what its file says."""

    path: Path
    state: str | None
    simulated: bool
    clock: str | None
    model: str | None
    engine: str | None
    cells: tuple[Cell, ...]


def read_sweep(path: str | Path) -> SweepFile:
    """The sweep in the directory at `path`, ended or not.

    Raises `AnalysisError` where it is none, `RunError` naming the key where its file is wrong.
    """
    folder = Path(path)
    source = folder / SWEEP_FILE
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError:
        raise AnalysisError(_no_sweep(folder)) from None
    except ValueError as error:
        raise RunError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("schema_version"), int):
        raise RunError(f"{source}: has no schema_version, so it is not a sweep's; a sweep's says {SCHEMA_VERSION}")
    if document["schema_version"] > SCHEMA_VERSION:
        raise RunError(
            f"{source}: schema_version {document['schema_version']} is newer than this program's {SCHEMA_VERSION}; "
            "update wattrace"
        )
    check_keys(document, _SHAPES, str(source))
    cells = tuple(_cell(entry, i, str(source)) for i, entry in enumerate(document.get("cells") or []))
    if not cells:
        raise AnalysisError(f"{source}: the sweep has no cells, so there is nothing to analyse")
    _check_once(cells, str(source))
    return SweepFile(
        folder,
        document.get("state"),
        bool(document.get("simulated")),
        document.get("clock"),
        document.get("model"),
        document.get("engine"),
        cells,
    )


def _no_sweep(folder: Path) -> str:
    """Why `folder` is no sweep, and what to do with what it is."""
    make = "'replay sweep TRACE --tp 2,4 --freq 1200,1980 -o DIR' writes one"
    if not folder.is_dir():
        return f"{folder}: no such sweep directory; {make}"
    if (folder / MANIFEST).is_file():
        return (
            f"{folder}: is a single run, and this takes a sweep; of a run ask 'analysis energy', 'analysis buckets' or "
            f"'analysis latency'; {make}"
        )
    if any(folder.glob(f"*/{MANIFEST}")):
        return (
            f"{folder}: holds runs but no {SWEEP_FILE}, so it is no sweep; compare them with "
            f"'analysis compare {folder}/* --by freq_mhz'; {make}"
        )
    return f"{folder}: has no {SWEEP_FILE}, so it is not a sweep's directory; {make}"


def _cell(entry: dict[str, Any], number: int, source: str) -> Cell:
    key = f"{source}: key 'cells[{number}]"
    for name in ("cell", "tp", "repeat", "state", "run"):
        if entry.get(name) is None:
            raise RunError(f"{key}' has no '{name}'")
    run = Path(entry["run"])
    if run.is_absolute() or ".." in run.parts:
        raise RunError(f"{key}.run' is '{entry['run']}', which is not inside the sweep's directory")
    values: dict[str, Any] = {name: entry.get(name) for name in Cell.__dataclass_fields__}
    return Cell(**values)


def _check_once(cells: tuple[Cell, ...], source: str) -> None:
    """Raise where two cells are the same repeat of the same setting: which of them holds is not known."""
    first: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        setting = (*(getattr(cell, name) for name in SETTING), cell.repeat)
        if setting in first:
            named = f"'{first[setting]}' and '{cell.cell}'"
            raise RunError(f"{source}: cells {named} are the same repeat of one setting; keep one")
        first[setting] = cell.cell
