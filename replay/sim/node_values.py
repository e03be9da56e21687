"""Which values the constants of a hardware file can have: finite, of the right sign, within their range."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from tracegen.errors import ReplayError

if TYPE_CHECKING:
    from replay.sim.profile import Node

_SECTIONS = ("engine", "memory", "time", "power", "sensor", "thermal")


class _Rule(NamedTuple):
    """What a number must be, in words, and whether one is."""

    words: str
    holds: Callable[[float], bool]


_ABOVE_0 = _Rule("above 0", lambda value: value > 0)
_FROM_0 = _Rule("0 or above", lambda value: value >= 0)
_SHARE = _Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
_PART = _Rule("from 0 to 1", lambda value: 0 <= value <= 1)
_ERROR = _Rule("0 or above, and below 1", lambda value: 0 <= value < 1)
_FINITE = _Rule("a finite number", lambda _value: True)
# With the shipped nodes' thermal resistances and caps, 40 C at most, each watt of leakage then warms the GPU by less
# than what causes another.
_LEAKAGE = _Rule("from 0 to 0.02", lambda value: 0 <= value <= 0.02)

# All others must be above 0.
_RULES = {
    "memory": {"utilization": _SHARE, "reserve_bytes": _FROM_0},
    "time": {
        "compute_efficiency": _SHARE,
        "memory_efficiency": _SHARE,
        "sync_layer_s": _FROM_0,
        "sync_reduce_share": _PART,
        "launch_s": _FROM_0,
        "sequence_s": _FROM_0,
    },
    "power": {
        "idle_exponent": _FROM_0,
        "memory_exponent": _FROM_0,
        "compute_exponent": _FROM_0,
        "voltage_rise": _FROM_0,
    },
    "sensor": {"lag_ns": _FROM_0, "noise_rel": _ERROR, "gain_error_rel": _ERROR},
    "thermal": {
        "ambient_c": _FINITE,
        "reference_c": _FINITE,
        "resistance_c_per_w": _FROM_0,
        "leakage_per_c": _LEAKAGE,
    },
}


def check_values(node: "Node") -> None:
    """Raise `ReplayError` that names section and key for a number of `node` that makes no sense."""
    _check_clocks(node)
    for key in ("gpus_per_node", "memory_clock_mhz"):
        if getattr(node, key) < 1:
            raise ReplayError(f"{key} = {getattr(node, key)}: must be at least 1")
    for section in _SECTIONS:
        rules = _RULES.get(section, {})
        for key, value in asdict(getattr(node, section)).items():
            if isinstance(value, int | float):
                _check_number(f"[{section}] {key}", value, rules.get(key, _ABOVE_0))
    low, high, step = node.clocks_mhz
    for key in ("boost_mhz", "sustained_mhz"):
        mhz = getattr(node.time, key)
        if not low <= mhz <= high or (mhz - low) % step:
            raise ReplayError(f"[time] {key} = {mhz:g}: must be one of clocks_mhz, {low} to {high} in steps of {step}")
    lowest_w, cap_w = node.power.caps_w
    if cap_w <= lowest_w:
        raise ReplayError(
            f"[power] cap_w = {cap_w:g}: must be above {lowest_w:g} W, what idle_unloaded_w, idle_loaded_w and awake_w "
            "add up to"
        )
    phases_ns, period_ns = node.sensor.phases_ns, node.sensor.period_ns
    if len(phases_ns) != node.gpus_per_node or not all(0 <= phase < period_ns for phase in phases_ns):
        raise ReplayError(f"[sensor] phases_ns: give {node.gpus_per_node} times within period_ns, one for each GPU")


def _check_clocks(node: "Node") -> None:
    """Raise `ReplayError` unless `clocks_mhz` is a range of clocks."""
    low, high, step = node.clocks_mhz
    if step < 1 or low < 1 or high < low or (high - low) % step:
        raise ReplayError(f"clocks_mhz {low}-{high} in steps of {step}: not a range of clocks")


def _check_number(where: str, value: float, rule: _Rule) -> None:
    """Raise `ReplayError` unless `value` is finite and keeps to `rule`."""
    if not math.isfinite(value):
        raise ReplayError(f"{where} = {value}: must be a finite number")
    if not rule.holds(value):
        raise ReplayError(f"{where} = {value}: must be {rule.words}")
