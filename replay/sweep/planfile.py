"""A plan as a TOML file: what `plan.toml` of a sweep says, and what users write for what flags cannot say.

```toml
mix = "chat"                # or trace = "FILE", from here or from the plan's folder
duration = "5m"
repeats = 3

[[grid]]                    # every combination of its values; there can be several
tp = [2, 4]
freq = "800:1980:200,unlocked"
rate = [0.5, 1]

[[grid]]
tp = 8
freq = [1200, 1980]
rate = [4, 8]

[run]                       # options of `replay run` for every cell
virtual = true
idle = "5s"
```
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from replay.again import OPTIONS
from replay.engines.vllm import take_secrets
from replay.gpu.cli import parse_gpus
from replay.plan import RunOptions
from replay.sweep.plan import Grid, SweepPlan
from replay.sweep.ranges import UNLOCKED, parse_clocks, parse_numbers, parse_whole
from tracegen.durations import exact_duration, parse_duration_ns
from tracegen.errors import ReplayError, WattraceError

_GRID: dict[str, tuple[str, Callable[[str, str], tuple[Any, ...]]]] = {
    "tp": ("tp", parse_whole),
    "freq": ("freq_mhz", parse_clocks),
    "rate": ("rate_rps", parse_numbers),
    "batch-cap": ("batch_cap", parse_whole),
    "power-cap": ("power_cap_w", parse_numbers),
}
_TOP = {
    "trace": "trace",
    "mix": "mix",
    "arrivals": "arrivals",
    "duration": "duration_ns",
    "seed": "seed",
    "repeats": "repeats",
    "until-ci": "until_ci",
    "max-repeats": "max_repeats",
    "all-rates": "all_rates",
    "cool-down-max": "cool_down_max_ns",
}
_MINE = {"tp", "freq_mhz", "power_cap_w", "duration_ns", "seed"}  # of a run, which the sweep itself sets
_PASSWORD = re.compile(r"//[^/@]*@")


def _key(option: str | tuple[str | None, str | None]) -> str:
    """What an option of `replay run` is called in the table `run`."""
    name = option if isinstance(option, str) else option[0]
    assert name is not None
    return name.removeprefix("--")


_RUN = {_key(option): name for name, option in OPTIONS.items() if name not in _MINE}


def percent(option: str, text: str) -> float:
    """`5%` or `0.05` as a share. Raises `ReplayError` that names `option` for anything else."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise ReplayError(f"{option} {text}: is no share; give one such as 5%") from None


def read_plan(path: Path) -> SweepPlan:
    """The plan in the file at `path`. Raises `ReplayError` that names the key for what is wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ReplayError(f"{path}: cannot be read ({why}); give a sweep's plan in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise ReplayError(f"{path}: is not valid TOML ({error})") from None
    try:
        return _plan(document, path.parent)
    except WattraceError as error:
        raise ReplayError(f"{path}: {error}") from None


def _plan(document: dict[str, Any], folder: Path) -> SweepPlan:
    grids, run = document.pop("grid", []), document.pop("run", {})
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ReplayError("grid: must be a table [[grid]], or several")
    _refuse_unknown(document, _TOP, "the plan")
    asked = {_TOP[key]: _top(key, value) for key, value in document.items()}
    if (trace := asked.get("trace")) is not None and not trace.exists() and (folder / trace).exists():
        asked["trace"] = folder / trace
    return SweepPlan(
        **_convert(
            SweepPlan, asked | {"grids": tuple(_grid(grid, i) for i, grid in enumerate(grids, 1)), "run": _run(run)}
        )
    )


def _top(key: str, value: Any) -> Any:
    """One value of the plan itself."""
    if key == "until-ci":
        return percent(key, str(value))
    if key == "cool-down-max":
        return _duration(key, value, zero_ok=True)
    return _duration(key, value) if key == "duration" else Path(str(value)) if key == "trace" else value


def _duration(key: str, value: Any, *, zero_ok: bool = False) -> int:
    try:
        return parse_duration_ns(str(value), zero_ok=zero_ok)
    except WattraceError as error:
        raise ReplayError(f"{key} {error}") from None


def _grid(table: Mapping[str, Any], number: int) -> Grid:
    where = f"grid {number}"
    _refuse_unknown(table, _GRID, where)
    found = {}
    for key, value in table.items():
        name, parse = _GRID[key]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        found[name] = parse(f"{where}, {key}", text)
    return Grid(**found)


def _run(table: Mapping[str, Any]) -> RunOptions:
    _refuse_unknown(table, _RUN, "table run")
    given: dict[str, Any] = {"trace": Path()}
    for key, value in table.items():
        name = _RUN[key]
        if name.endswith("_ns"):
            given[name] = _duration(f"run, {key}", value, zero_ok=True)
        else:
            given[name] = parse_gpus(str(value)) if name == "gpus" else value
    return RunOptions(**_convert(RunOptions, given))


def _convert(kind: type[SweepPlan] | type[RunOptions], values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a file as the fields of `kind` have them. Raises `ReplayError` for one of another type."""
    types = {of.name: of.type for of in fields(kind)}
    for name, value in values.items():
        if name in {"grids", "run", "trace"}:
            continue
        try:
            values[name] = msgspec.convert(value, types[name], dec_hook=lambda kind, value: kind(value))
        except msgspec.ValidationError as error:
            raise ReplayError(f"{name}: {error}") from None
    return values


def _refuse_unknown(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise ReplayError(f"{where} has the unknown key '{unknown[0]}'; it knows {', '.join(sorted(known))}")


def presentable(plan: SweepPlan) -> SweepPlan:
    """`plan` without keys and passwords: as it is written down and compared."""
    run = replace(
        plan.run,
        engine=_PASSWORD.sub("//***@", plan.run.engine),
        vllm_args=tuple(take_secrets(plan.run.vllm_args)[0]),
        api_key=None,
    )
    return replace(plan, run=run)


def plan_text(plan: SweepPlan) -> str:
    """`plan` as `read_plan` reads it, expanded: no ranges; what has its default is left out."""
    plan = presentable(plan)
    defaults = {of.name: of.default for of in fields(SweepPlan) if of.default is not MISSING}
    lines = ["# What this sweep was asked. The same again: replay sweep --plan plan.toml -o ANOTHER"]
    for key, name in _TOP.items():
        if (value := getattr(plan, name)) != defaults[name] or name in {"seed", "repeats"}:
            lines.append(f"{key} = {_shown(name, value)}")
    for grid in plan.grids:
        lines += ["", "[[grid]]"]
        lines += [
            f"{key} = {_shown(name, getattr(grid, name))}"
            for key, (name, _) in _GRID.items()
            if getattr(grid, name) not in {(), (None,)} or key == "freq"
        ]
    asked = {key: name for key, name in _RUN.items() if getattr(plan.run, name) != getattr(RunOptions(Path()), name)}
    if asked:
        lines += ["", "[run]", *(f"{key} = {_shown(name, getattr(plan.run, name))}" for key, name in asked.items())]
    return "\n".join(lines) + "\n"


def _shown(name: str, value: Any) -> str:
    """`value` in TOML: strings, numbers and lists, which JSON writes the same way."""
    if name.endswith("_ns"):
        value = exact_duration(value)
    elif name == "gpus":
        value = ",".join(map(str, value))
    elif isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()) + " }"
        )
    elif isinstance(value, tuple):
        value = [UNLOCKED if one is None else str(one) if isinstance(one, Path) else one for one in value]
    elif isinstance(value, Path):
        value = str(value)
    return json.dumps(value, ensure_ascii=False)
