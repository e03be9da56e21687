"""Lasting changes of the GPUs' clock within a run: steps follow another law after each, so each has its own fit.

Short dips and the jitter of a power cap or of thermal throttling are part of one law: they last tens of milliseconds to
seconds and come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.ndimage import median_filter

from analysis.load import Floats, GpuData
from analysis.steps import Ints

CHANGE_REL = 0.03  # two steps of the clocks' grid of 15 MHz, and more than a locked clock's jitter
LASTING_S = 20  # shorter than that is a dip; some hundred steps of the usual 20 to 50 ms, enough for a fit of their own
_IDLE_BIT = 0x1  # nvmlClocksEventReasonGpuIdle: nothing runs, so no step has this clock


@dataclass(frozen=True)
class Regime:
    """A stretch of the window under one law, s, and the GPUs' mean clock in it; None: not read."""

    start_s: float
    end_s: float
    clock_mhz: float | None


def regime_changes(gpus: Sequence[GpuData], start_s: float, end_s: float) -> Floats:
    """When in `[start_s, end_s]` the clock of `gpus`, which work together, changed for long; s, to about one second.

    A change is more than `CHANGE_REL` of the mean clock of the GPUs that lasts `LASTING_S` or more. Readings of an idle
    GPU do not count; without a clock there is no change.
    """
    clocks = [clock for gpu in gpus if (clock := _by_second(gpu, start_s, end_s)) is not None]
    if not clocks or clocks[0].size < 2 * LASTING_S:
        return np.zeros(0)
    # A median over this many seconds drops what is shorter than LASTING_S and leaves longer changes where they are.
    clock_mhz = median_filter(np.mean(clocks, axis=0), size=2 * LASTING_S - 1, mode="reflect")
    changes: list[int] = []
    at = 0
    while True:
        level = float(np.median(clock_mhz[at : at + LASTING_S]))
        off = np.flatnonzero(np.abs(clock_mhz[at:] / level - 1) > CHANGE_REL)
        if not off.size or at + off[0] + LASTING_S > clock_mhz.size:
            return start_s + _without_wander(clock_mhz, changes)
        at += max(int(off[0]), 1)
        changes.append(at)


def _without_wander(clock_mhz: Floats, changes: list[int]) -> Floats:
    """`changes`, seconds, but for those between stretches of much the same clock on the whole.

    A clock that a power cap holds follows the load up and down for minutes: that is one law too.
    """
    while changes:
        levels = [float(np.mean(part)) for part in np.split(clock_mhz, changes)]
        steps = [abs(after / before - 1) for before, after in pairwise(levels)]
        least = int(np.argmin(steps))
        if steps[least] > CHANGE_REL:
            break
        del changes[least]
    return np.array(changes, dtype=np.float64)


def regime_of(t_s: Floats, changes: Floats) -> Ints:
    """The number of the regime, from 0, that each of `t_s` lies in."""
    return np.searchsorted(changes, t_s, side="right").astype(np.int64)


def with_enough(changes: Floats, t_s: Floats, least: int) -> Floats:
    """`changes` but for those that leave fewer than `least` of the ascending `t_s` to a regime."""
    kept: list[float] = []
    start = 0
    for change in changes:
        here = int(np.searchsorted(t_s, change))
        if here - start >= least and t_s.size - here >= least:
            kept.append(float(change))
            start = here
    return np.array(kept)


def regimes_of(gpus: Sequence[GpuData], changes: Floats, end_s: float) -> tuple[Regime, ...]:
    """The regimes of `[0, end_s]` between `changes`."""
    edges_s = [0.0, *changes.tolist(), end_s]
    return tuple(Regime(a, b, mean_clock_mhz(gpus, a, b)) for a, b in pairwise(edges_s))


def mean_clock_mhz(gpus: Sequence[GpuData], start_s: float, end_s: float) -> float | None:
    """Mean clock of `gpus` in `[start_s, end_s)`, but for idle ones; None where none was read."""
    clocks = [clock[(t_s >= start_s) & (t_s < end_s)] for t_s, clock in map(_readings, gpus)]
    known = np.concatenate([*clocks, np.zeros(0)])
    return float(known.mean()) if known.size else None


def _readings(gpu: GpuData) -> tuple[Floats, Floats]:
    """Times and clocks (MHz) of the readings that have one and are of a working GPU."""
    if not gpu.sm_clock_mhz.size:
        return np.zeros(0), np.zeros(0)
    working = gpu.sm_clock_mhz > 0  # False where it was not read
    if gpu.throttle_reasons.size:
        working &= np.nan_to_num(gpu.throttle_reasons) % 2 != _IDLE_BIT  # no cast: bit 63, unknown, fits no int64
    return gpu.t_s[working], gpu.sm_clock_mhz[working]


def _by_second(gpu: GpuData, start_s: float, end_s: float) -> Floats | None:
    """The mean clock of each whole second, MHz; of one without any the last before it, or the first. None: no clock."""
    t_s, clock_mhz = _readings(gpu)
    seconds = int(end_s - start_s)
    second = np.floor(t_s - start_s)
    inside = (second >= 0) & (second < seconds)
    if not inside.any():
        return None
    rows = second[inside].astype(np.int64)
    count = np.bincount(rows, minlength=seconds)
    mean_mhz = np.bincount(rows, weights=clock_mhz[inside], minlength=seconds) / np.maximum(count, 1)
    seen = np.maximum.accumulate(np.where(count > 0, np.arange(seconds), -1))
    return np.asarray(mean_mhz[np.where(seen < 0, int(np.argmax(count > 0)), seen)])
