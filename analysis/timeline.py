"""The energy that one GPU had used by time t, from its counter or else from its power samples.

A reading that a sensor showed at an update describes the time since the update before, so values hold *back*.
Integrating by trapezoid across unchanged or dropped samples would be wrong (100 W for 10 s, then 500 W for 0.1 s is
1050 J, not 3030 J).
"""

from dataclasses import dataclass

import numpy as np

from analysis.load import Floats, GpuData
from analysis.steps import Bools, Ints

EDGE_S = 1.0  # a source that misses less than this at the window's edges is extended at its nearest power
STILL_UPDATES = 5  # a counter may miss so many of its own updates, or EDGE_S, before it counts as frozen
DATED_SHARE = 0.5  # of the readings that must be dated for windows to go by dates
SAMPLED = ("instant", "average")


@dataclass(frozen=True)
class Curve:
    """E(t): joules `e_j` at times `t_s`, linear between; `source` is `counter`, `instant` or `average`."""

    source: str
    t_s: Floats
    e_j: Floats

    def at(self, t_s: Floats) -> Floats:
        """Joules used by `t_s`, continued at the last power beyond either end."""
        inside = np.interp(t_s, self.t_s, self.e_j)
        before = np.minimum(t_s - self.t_s[0], 0.0) * self._slope(0)
        after = np.maximum(t_s - self.t_s[-1], 0.0) * self._slope(-2)
        return np.asarray(inside + before + after, dtype=np.float64)

    def between(self, start_s: float, end_s: float) -> float:
        """Joules used between two times."""
        start, end = self.at(np.array([start_s, end_s]))
        return float(end - start)

    def _slope(self, i: int) -> float:
        step = self.t_s[i + 1] - self.t_s[i]
        return float((self.e_j[i + 1] - self.e_j[i]) / step) if step > 0 else 0.0


@dataclass(frozen=True)
class Windows:
    """Mean power over short windows `[start_s, end_s]`, as a sensor reported it."""

    source: str
    start_s: Floats
    end_s: Floats
    watts: Floats


@dataclass(frozen=True)
class GpuTimeline:
    """What the sensors of one GPU say: the curve to account by, the windows to fit by, and their disagreement."""

    name: str  # of the GPU
    curve: Curve
    windows: Windows
    mismatch_rel: float | None  # samples over counter, minus 1, within the window; None without both
    why: str | None  # why the curve is not the counter


def read_timeline(gpu: GpuData, duration_s: float) -> GpuTimeline | str:
    """The timeline of `gpu` over `[0, duration_s]`, or the reason why there is none."""
    counter, why = _counter_curve(gpu, duration_s)
    source = next((s for s in SAMPLED if np.isfinite(_samples_w(gpu, s)).sum() >= 2), None)
    samples = None if source is None else _sample_curve(gpu, source)
    curve = counter or samples
    if curve is None:
        return f"{gpu.name}: the counter {why}, and neither power_instant_mw nor power_average_mw has two readings"
    mismatch = None
    if counter is not None and samples is not None:
        used_j = counter.between(0.0, duration_s)
        mismatch = samples.between(0.0, duration_s) / used_j - 1.0 if used_j > 0 else None
    windows = _instant_windows(gpu) or _increments(curve)
    return GpuTimeline(gpu.name, curve, windows, mismatch, None if counter else why)


def _counter_curve(gpu: GpuData, duration_s: float) -> tuple[Curve | None, str]:
    """The counter's curve through its value changes, or why the counter is not sound.

    Nulls between readings do no harm, since the counter sums; a decrease, a missing end or a value that stands still
    does: a GPU always draws power, so a counter that does not move has stopped counting.
    """
    known = np.isfinite(gpu.counter_j)
    t_s, e_j = gpu.t_s[known], gpu.counter_j[known]
    if e_j.size < 2:
        return None, "has no readings"
    if np.any(np.diff(e_j) < 0):
        return None, "decreases"
    changed = np.flatnonzero(np.diff(e_j) > 0) + 1
    if changed.size < 2:
        return None, "does not move"
    if t_s[0] > EDGE_S or t_s[-1] < duration_s - EDGE_S:
        return None, "does not cover the window"
    # The value changed somewhere between two polls: half-way is right on average when the polls are the finer grid.
    # After a hole in the polls it changed within the last period before the reading, not half-way into the hole.
    poll_s, update_s = float(np.median(np.diff(t_s))), float(np.median(np.diff(t_s[changed])))
    still = _still(t_s, changed, duration_s, max(EDGE_S, STILL_UPDATES * update_s))
    if still:
        return None, still
    seen_s = t_s[changed]
    if update_s > 1.5 * poll_s:
        seen_s = t_s[changed] - np.minimum(t_s[changed] - t_s[changed - 1], update_s) / 2
    return Curve("counter", seen_s, e_j[changed]), ""


def _still(t_s: Floats, changed: Ints, duration_s: float, longest_s: float) -> str:
    """Where in the window the counter was read for more than `longest_s` without a change; empty where nowhere."""
    seen_s = t_s[changed]
    if seen_s[0] > longest_s:
        return f"first moves {seen_s[0]:.0f} s into the window of {duration_s:.0f} s"
    if seen_s[-1] < duration_s - longest_s:
        return f"stands still from {max(seen_s[-1], 0.0):.0f} s on, in a window of {duration_s:.0f} s"
    held_s = t_s[changed[1:] - 1] - seen_s[:-1]  # up to the last reading that showed the same
    held_s[(seen_s[1:] < 0) | (seen_s[:-1] > duration_s)] = 0.0
    i = int(np.argmax(held_s))
    return f"stands still for {held_s[i]:.0f} s at {seen_s[i]:.0f} s" if held_s[i] > longest_s else ""


def _samples_w(gpu: GpuData, source: str) -> Floats:
    return gpu.instant_w if source == "instant" else gpu.average_w


def _updates(gpu: GpuData, source: str) -> tuple[Floats, Floats, Floats, Bools]:
    """Per update of the sensor: when it ended, since when its value holds, the value in W, and whether it is dated.

    A new sensor time is an update. A reading without one (the first polls, before the sampler has seen the value
    change; every average) counts as an update at its poll.
    """
    known = np.isfinite(_samples_w(gpu, source))
    poll_s, watts = gpu.t_s[known], _samples_w(gpu, source)[known]
    dated = np.isfinite(gpu.sensor_s[known]) & (source == "instant")
    lag_s = float(gpu.sensors.get(source, {}).get("lag_ns") or 0) / 1e9
    end_s = np.maximum.accumulate(np.where(dated, gpu.sensor_s[known], poll_s))
    new = np.concatenate([[True], np.diff(end_s) > 0])
    last_old_poll_s = np.concatenate([[-np.inf], poll_s[:-1]])[new]
    end_s, watts = end_s[new], watts[new]
    since_s = np.concatenate([[end_s[0]], end_s[:-1]])
    period_s = _period_s(gpu, source, end_s)
    # Polls that went on showing the old value tell that the sensor repeated it, so the new one is not that old.
    repeated_s = np.minimum(end_s - period_s, last_old_poll_s)
    since_s = np.where(end_s - since_s > 1.5 * period_s, np.maximum(since_s, repeated_s), since_s)
    return end_s - lag_s, since_s - lag_s, watts, dated[new]


def _period_s(gpu: GpuData, source: str, end_s: Floats) -> float:
    """The sensor's period: as the manifest says, else the usual distance of its updates."""
    told = gpu.sensors.get(source, {}).get("period_ns")
    return float(told) / 1e9 if told else float(np.median(np.diff(end_s))) if end_s.size > 1 else 0.1


def _sample_curve(gpu: GpuData, source: str) -> Curve | None:
    """The integral of held-back samples; a value that holds for part of a gap leaves the rest to the one before."""
    end_s, since_s, watts, _ = _updates(gpu, source)
    if end_s.size < 2:
        return None
    before_w = np.concatenate([[watts[0]], watts[:-1]])
    previous_s = np.concatenate([[end_s[0]], end_s[:-1]])
    times = np.stack([since_s, end_s], axis=1).ravel()
    joules = np.stack([(since_s - previous_s) * before_w, (end_s - since_s) * watts], axis=1).ravel()
    new = np.concatenate([[True], np.diff(times) > 0])
    return Curve(source, times[new], np.cumsum(joules)[new])


def _instant_windows(gpu: GpuData) -> Windows | None:
    """The windows that the instant sensor averaged over; None where their length is not known."""
    window_s = float(gpu.sensors.get("instant", {}).get("window_ns") or 0) / 1e9
    if not window_s or np.isfinite(gpu.instant_w).sum() < 2:
        return None
    end_s, _, watts, dated = _updates(gpu, "instant")
    if dated.sum() >= DATED_SHARE * dated.size:
        end_s, watts = end_s[dated], watts[dated]
    else:
        # Undated readings: keep those where the value is new, dated half-way back to the poll before.
        new = np.flatnonzero(np.diff(watts) != 0) + 1
        end_s, watts = (end_s[new] + end_s[new - 1]) / 2, watts[new]
    return Windows("instant", end_s - window_s, end_s, watts) if end_s.size else None


def _increments(curve: Curve) -> Windows:
    """The curve's own steps as windows."""
    wide = np.diff(curve.t_s) > 0
    span_s = np.diff(curve.t_s)[wide]
    return Windows(curve.source, curve.t_s[:-1][wide], curve.t_s[1:][wide], np.diff(curve.e_j)[wide] / span_s)
