"""Write a hardware file as `replay.sim.profile.parse_node` reads it: every constant, with what a fit says of it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from replay.sim.profile import ClockRange, Node
from tracegen.errors import ReplayError

_SECTIONS = ("engine", "memory", "time", "power", "sensor", "thermal")


def node_text(node: Node, calibration: Mapping[str, Any], remarks: Mapping[tuple[str, str], str], heading: str) -> str:
    """The TOML text of `node` with the table `[calibration]`.

    `remarks` by section and key stand as comments behind the constants, `heading` above everything.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    low, high, step = ClockRange(*node.clocks_mhz)
    lines += [
        "",
        *(f"{key} = {_value(getattr(node, key))}" for key in ("gpu_name", "gpus_per_node", "memory_clock_mhz")),
        f"clocks_mhz = {{ min = {low}, max = {high}, step = {step} }}",
        *([f"assumed = {_value(list(node.assumed))}"] if node.assumed else []),
    ]
    tables = {"calibration": dict(calibration)} | {name: asdict(getattr(node, name)) for name in _SECTIONS}
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        for key, value in table.items():
            remark = remarks.get((name, key))
            lines.append(f"{key} = {_value(value)}" + (f"  # {remark}" if remark else ""))
    return "\n".join(lines) + "\n"


def check_new(path: Path) -> None:
    """Raise `ReplayError` unless `path` can become a hardware file: a .toml that is not there yet, in a folder."""
    if path.suffix != ".toml":
        raise ReplayError(f"-o {path}: name a .toml file")
    if path.exists():
        raise ReplayError(f"-o {path}: exists already; a hardware file is never overwritten, give another -o")
    if not path.parent.is_dir():
        raise ReplayError(f"-o {path}: there is no folder {path.parent}")


def write_node(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. Raises `ReplayError` when that cannot be, or `path` is there."""
    check_new(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)  # noqa: PTH105 - a rename that replaces
    except OSError as error:
        raise ReplayError(f"-o {path}: cannot be written ({error.strerror})") from None


def _value(value: Any) -> str:
    """`value` as TOML. A string in JSON is one in TOML too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no place in a hardware file")
        return f"{value:.6g}" if any(c in f"{value:.6g}" for c in ".e") else f"{value:.6g}.0"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(_value(item) for item in value) + "]"
