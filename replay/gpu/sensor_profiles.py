"""How one GPU's power sensors were found to behave: kept as a TOML file, read again before a run.

One file a card, `~/.config/wattrace/gpus/NAME-UUID.toml` (under `$XDG_CONFIG_HOME` where that is set), written whole or
not at all. TOML has no null: what was not measured is missing, and `[reasons]` says why.
"""

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec

from replay.gpu.base import GpuInfo, Sensor
from tracegen.errors import GpuError

_VERSION = 1
_HEAD = "# Written by `replay probe`; times in ns. What is missing was not measured: see [reasons].\n"
_Positive = Annotated[int, msgspec.Meta(gt=0)]
_Natural = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Behaviour:
    """One power sensor: it updates every period with the mean of a window that ended lag ago. None: not known."""

    period_ns: _Positive | None = None
    period_spread_ns: _Natural | None = None  # half the central 68 % of updates' distances; polling's share included
    window_ns: _Positive | None = None
    window_se_ns: _Natural | None = None  # standard error
    lag_ns: _Natural | None = None
    lag_se_ns: _Natural | None = None
    rise_ns: _Natural | None = None  # time constant of power behind the load; 0: none that could be told
    off_w: float | None = None  # between loads, and under load, at rest
    on_w: float | None = None
    r2: float | None = None  # of the square wave's readings, explained


@dataclass(frozen=True)
class CounterBehaviour:
    """The energy counter: how often it counts, and in what."""

    period_ns: _Positive | None = None
    period_spread_ns: _Natural | None = None
    resolution_mj: _Positive | None = None  # of which every increment seen was a multiple
    smallest_step_mj: _Positive | None = None  # the smallest increment seen


@dataclass(frozen=True)
class SensorProfile:
    """What a probe of one GPU found."""

    uuid: str
    name: str
    probed: str  # UTC, ISO 8601
    seconds: float  # how long it was watched
    polls: int
    read_ns: int  # how long one reading of all sensors takes, in the median and at p99
    read_p99_ns: int
    instant: Behaviour = Behaviour()
    average: Behaviour = Behaviour()
    counter: CounterBehaviour = CounterBehaviour()
    idle_power_w: dict[str, float] = field(
        default_factory=dict
    )  # by `instant`, `average` and `counter`, before any load
    counter_over_instant: float | None = None  # energy over the whole probe, ratio to the integral of samples
    counter_over_instant_se: float | None = None  # from sampling: instant power may see a part of the time only
    counter_over_average: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # why something is None
    schema_version: int = _VERSION


def config_dir() -> Path:
    """Where profiles are kept."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "wattrace" / "gpus"


def profile_path(uuid: str, name: str) -> Path:
    """Where the profile of the card `uuid` of model `name` is kept."""
    return config_dir() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{uuid}.toml"


def save_profile(profile: SensorProfile, path: Path | None = None) -> Path:
    """Write `profile` to `path`, or to where `known_sensors` finds it; the path. Raises `GpuError` when it cannot."""
    path = path or profile_path(profile.uuid, profile.name)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_HEAD + _to_toml(msgspec.to_builtins(profile)), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise GpuError(f"{path}: the sensor profile cannot be written there ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def load_profile(uuid: str, name: str) -> SensorProfile | None:
    """The profile of the card `uuid` of model `name`; None where it was never probed.

    Raises `GpuError` for a file that is none.
    """
    path = profile_path(uuid, name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        version = document.get("schema_version")
        if isinstance(version, int) and version > _VERSION:
            raise GpuError(f"{path}: written by a newer wattrace; run 'replay probe' again, or delete the file")
        profile = msgspec.convert(document, SensorProfile)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise GpuError(f"{path}: the sensor profile cannot be read ({error.strerror})") from None
    except (ValueError, msgspec.ValidationError) as error:  # bad UTF-8 and bad TOML are ValueErrors
        raise GpuError(f"{path}: no sensor profile ({error}); run 'replay probe' again, or delete the file") from None
    if (profile.uuid, profile.name) != (uuid, name):
        raise GpuError(f"{path}: the profile of {profile.name} {profile.uuid}; it belongs to another GPU, so delete it")
    return profile


def known_sensors(info: GpuInfo, published: Mapping[str, Sensor]) -> tuple[dict[str, Sensor], str]:
    """How `instant` and `average` power of a GPU behave, and how that is known.

    Each field is the probed one, else the published one; a sensor of which one field is neither is left out. Raises
    `GpuError` for a broken profile.
    """
    profile = load_profile(info.uuid, info.name)
    result: dict[str, Sensor] = {}
    probed, fallen_back = False, []
    for name in ("instant", "average"):
        found = getattr(profile, name, None)
        values: dict[str, int | None] = {}
        for key in (f.name for f in fields(Sensor)):
            here = getattr(found, key, None)
            values[key] = getattr(published.get(name), key, None) if here is None else here
        if all(value is not None for value in values.values()):
            result[name] = Sensor(**{key: value for key, value in values.items() if value is not None})
            missing = [key.removesuffix("_ns") for key in values if getattr(found, key, None) is None]
            probed |= len(missing) < len(values)
            fallen_back += [f"{name} {' and '.join(missing)}"] if missing else []
    if not result:
        return {}, "unknown"
    if profile is None or not probed:
        return result, f"published for {info.name}"
    rest = f"; {', '.join(fallen_back)} published for {info.name}" if fallen_back else ""
    return result, f"probed {profile.probed[:10]} on this GPU{rest}"


def lines(profile: SensorProfile) -> list[str]:
    """What a probe found, for people."""
    text = [f"{profile.name} ({profile.uuid}), probed {profile.probed[:10]}"]
    text.append(
        f"  polls    {profile.polls} in {profile.seconds:.1f} s, one takes {_ms(profile.read_ns)} "
        f"(p99 {_ms(profile.read_p99_ns)})"
    )
    for name, sensor in (("instant", profile.instant), ("average", profile.average)):
        if found := _behaviour(sensor):
            text.append(f"  {name:8} {found}")
    counter = profile.counter
    if counter.resolution_mj is not None:
        every = "" if counter.period_ns is None else f"every {_ms(counter.period_ns)}, "
        text.append(
            f"  counter  {every}in multiples of {counter.resolution_mj} mJ, at least {counter.smallest_step_mj} mJ"
        )
    if profile.idle_power_w:
        idle = ", ".join(f"{watts:,.1f} W by {source}" for source, watts in profile.idle_power_w.items())
        text.append(f"  idle     {idle}")
    if profile.counter_over_instant is not None:
        error = "" if profile.counter_over_instant_se is None else f" ± {profile.counter_over_instant_se:.3f}"
        text.append(f"  energy   counter over instant {profile.counter_over_instant:.3f}{error}")
    if profile.counter_over_average is not None:
        text.append(f"  energy   counter over average {profile.counter_over_average:.3f}")
    return text + [f"  {what}: {why}" for what, why in profile.reasons.items()]


def _behaviour(sensor: Behaviour) -> str:
    """One sensor in words; empty where nothing is known."""
    parts = []
    if sensor.period_ns is not None:
        parts.append(f"updates every {_ms(sensor.period_ns)} (± {_ms(sensor.period_spread_ns or 0)})")
    if sensor.window_ns is not None and sensor.lag_ns is not None:
        parts.append(f"mean of {_ms(sensor.window_ns)} (± {_ms(sensor.window_se_ns or 0)})")
        parts.append(f"{_ms(sensor.lag_ns)} ago (± {_ms(sensor.lag_se_ns or 0)})")
        if sensor.period_ns is not None and sensor.window_ns < sensor.period_ns:
            parts.append(f"sees {sensor.window_ns / sensor.period_ns:.0%} of the time")
        if sensor.rise_ns:
            parts.append(f"power follows load in {_ms(sensor.rise_ns)}")
        parts.append(f"{sensor.off_w:,.0f} to {sensor.on_w:,.0f} W, R² {sensor.r2:.3f}")
    return ", ".join(parts)


def _ms(ns: int) -> str:
    return f"{round(ns / 1e6, 2):g} ms"


def _to_toml(document: Mapping[str, Any]) -> str:
    """`document` of text, numbers, None (left out) and tables of these, as TOML."""

    def text(value: Any) -> str:
        # A JSON string is a TOML string, but for the one control character that JSON lets through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    def name(key: str) -> str:
        return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else text(key)

    rows = [f"{name(key)} = {text(v)}\n" for key, v in document.items() if v is not None and not isinstance(v, dict)]
    tables = [f"\n[{name(key)}]\n{_to_toml(v)}" for key, v in document.items() if isinstance(v, dict)]
    return "".join(rows + tables)
