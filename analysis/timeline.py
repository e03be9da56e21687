"""The energy that one GPU had used by time t, from its counter or else from its power samples, and windows to fit by.

A long run is read slab by slab: what is decided of a moment rests on the readings around it and on what a `Survey` of
the slabs before brings along, so joules between two times do not depend on where slabs are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.counter import Counted, Survey, read_counter
from analysis.load import Floats, GpuData
from analysis.patches import EDGE_S as MISSED_S
from analysis.patches import Patch, Shape
from analysis.samples import COLUMNS, SOURCES, Updates, read_updates, shape_of, window_of, with_holes_filled

EDGE_S = MISSED_S  # a source that misses less than this at the window's edges is extended at its nearest power
DATED_SHARE = 0.5  # of the readings that must be dated for windows to go by dates
NOTHING_KNOWN = Survey()


@dataclass(frozen=True)
class Curve:
    """E(t): joules `e_j` at times `t_s`, linear between; `source` is `counter`, `instant` or `average`.

    A counter's joules are its own, those of samples count from the first reading: only differences have a meaning.
    """

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
class Estimate:
    """What a run tells of a sensor's window and lag, s, with standard errors."""

    source: str
    window_s: float
    window_se_s: float
    lag_s: float
    lag_se_s: float
    r2: float  # of the readings, explained by the work in their windows
    better_rel: float  # of the squared residuals, which window and lag take away from plain readings
    readings: int
    told_worse_rel: float | None = None  # how much more of the squared residuals the manifest's window and lag leave


@dataclass(frozen=True)
class GpuTimeline:
    """What the sensors of one GPU say: the curve to account by, the windows to fit by, and their disagreement."""

    name: str  # of the GPU
    curve: Curve
    windows: Windows
    mismatch_rel: float | None  # samples over counter, minus 1, within the window; None without both
    why: str | None  # why the curve is not the counter
    patches: tuple[Patch, ...] = ()  # stretches of the curve that its own sensor did not measure
    said: tuple[str, ...] = ()  # readings that cannot be true, and what was done about them
    told: bool = True  # whether windows are as the manifest says; else each reading's is the time since the one before
    survey: Survey = NOTHING_KNOWN  # of this slab alone
    estimate: Estimate | str | None = None  # of the sensor, or why there is none; None: there was no need of one


def read_timeline(
    gpu: GpuData,
    end_s: float,
    start_s: float = 0.0,
    *,
    known: Survey = NOTHING_KNOWN,
    peers: Sequence[GpuData] = (),
) -> GpuTimeline | str:
    """The timeline of `gpu` over `[start_s, end_s]`, or the reason why there is none.

    For a slab of a long run `gpu` holds readings from 3 s before to 3 s after it, and `known` the sum of the `survey`
    of the slabs before. `peers` are the other GPUs of its group, which do the same work: where this one has not two
    kinds of samples, the first peer's give the course of power through stretches that were missed, never the level.
    """
    gpu = _in_order(gpu)
    window_s = (start_s, end_s)
    found = [updates for source in SOURCES if (updates := read_updates(gpu, source)) is not None]
    seen = [shape_of(gpu, updates) for updates in found]
    if len(found) < len(SOURCES):
        seen += next(([shape] for peer in peers if (shape := _shape(peer, f" of {peer.name}")) is not None), [])
    counted = read_counter(gpu.t_s, gpu.counter_j, window_s, seen[0] if seen else None, known)
    samples, patches = _sampled(found, seen, window_s)
    said = tuple(text for updates in found for text in updates.said)
    if counted.why is None:
        curve, patches = Curve("counter", counted.t_s, counted.e_j), counted.patches
    elif samples is not None:
        curve = samples
    else:
        neither = " nor ".join(COLUMNS.values())
        return f"{gpu.name}: the counter {counted.why}, and neither {neither} has two readings"
    windows = _sensor_windows(gpu, found[0]) if found else None
    return GpuTimeline(
        name=gpu.name,
        curve=curve,
        windows=windows or _increments(curve),
        mismatch_rel=_mismatch(counted, curve, samples, window_s),
        why=counted.why,
        patches=patches,
        said=counted.said + said,
        told=windows is not None,
        survey=counted.survey,
    )


def _in_order(gpu: GpuData) -> GpuData:
    """`gpu` with its readings in order of time, the first of several at one time."""
    if bool(np.all(gpu.t_s[1:] > gpu.t_s[:-1])):
        return gpu
    _, rows = np.unique(gpu.t_s, return_index=True)
    columns: dict[str, Any] = {
        name: values[rows]
        for name, values in vars(gpu).items()
        if isinstance(values, np.ndarray) and values.size == gpu.t_s.size
    }
    return replace(gpu, **columns)


def _shape(gpu: GpuData, of: str) -> Shape | None:
    """The power samples of `gpu` as a shape to fill from."""
    gpu = _in_order(gpu)
    updates = next((u for source in SOURCES if (u := read_updates(gpu, source)) is not None), None)
    return None if updates is None else shape_of(gpu, updates, COLUMNS[updates.source] + of)


def _sampled(
    found: Sequence[Updates], shapes: Sequence[Shape], window_s: tuple[float, float]
) -> tuple[Curve | None, tuple[Patch, ...]]:
    """The curve by the best samples, its holes filled by the next best; None without any."""
    if not found:
        return None, ()
    other = shapes[1] if len(shapes) > 1 else None
    t_s, e_j, patches = with_holes_filled(shapes[0], found[0].hole_s, window_s, other)
    return (Curve(found[0].source, t_s, e_j), patches) if t_s.size > 1 else (None, ())


def _mismatch(counted: Counted, curve: Curve, samples: Curve | None, window_s: tuple[float, float]) -> float | None:
    """Samples over counter, minus 1; where the counter was filled in, over what is left."""
    if counted.why is not None or samples is None:
        return None
    if counted.patches:
        return counted.survey.samples_j / counted.survey.counter_j - 1.0 if counted.survey.counter_j > 0 else None
    used_j = curve.between(*window_s)
    return samples.between(*window_s) / used_j - 1.0 if used_j > 0 else None


def _sensor_windows(gpu: GpuData, updates: Updates) -> Windows | None:
    """The windows that the sensor averaged over; None where the manifest does not tell their length."""
    window_s = window_of(gpu, updates.source)
    if not window_s:
        return None
    end_s, watts = dated_readings(updates)
    return Windows(updates.source, end_s - window_s, end_s, watts) if end_s.size else None


def dated_readings(updates: Updates) -> tuple[Floats, Floats]:
    """When readings ended their windows, as well as can be known, and their values in W."""
    end_s, watts, dated = updates.end_s, updates.watts, updates.dated
    if np.count_nonzero(dated) >= DATED_SHARE * dated.size:
        return (end_s, watts) if dated.all() else (end_s[dated], watts[dated])
    # Undated readings: keep those where the value is new, dated half-way back to the poll before.
    new = np.flatnonzero(watts[1:] != watts[:-1]) + 1
    return (end_s[new] + end_s[new - 1]) / 2, watts[new]


def _increments(curve: Curve) -> Windows:
    """The curve's own steps as windows."""
    span_s = np.diff(curve.t_s)
    wide = span_s > 0
    return Windows(curve.source, curve.t_s[:-1][wide], curve.t_s[1:][wide], np.diff(curve.e_j)[wide] / span_s[wide])
