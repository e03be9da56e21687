"""Stretches of an energy curve that its own sensor did not measure, filled from another.

A curve is knots `t_s` with joules between them. A stretch to fill is one of its intervals. What is known of its joules
is kept (a counter that was not read for a while has counted on) and only its shape comes from elsewhere; where nothing
is known, the joules are those of the other sensor times the ratio of the two where both are sound; and where there is
no other sensor either, the power is that of the neighbourhood.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

EDGE_S = 1.0  # what a sensor may miss, at an edge or between readings, before it is filled
NEAR_S = 2.0  # either side of a stretch, or as long as it is, is its neighbourhood
SEEN_SHARE = 0.5  # of a stretch that another sensor must have seen to fill it


@dataclass(frozen=True)
class Patch:
    """A stretch filled from elsewhere: seconds from the window's start, its joules, and why in words."""

    start_s: float
    end_s: float
    joules: float
    why: str

    def measured(self, t_s: Floats, e_j: Floats) -> "Patch":
        """The same with its joules read off a curve."""
        start_j, end_j = np.interp([self.start_s, self.end_s], t_s, e_j)
        return replace(self, joules=float(end_j - start_j))


@dataclass(frozen=True)
class Shape:
    """An energy curve to fill from: joules `e_j` and seconds really seen `seen_s`, both running, at times `t_s`."""

    name: str  # as words have it
    t_s: Floats
    e_j: Floats
    seen_s: Floats

    def joules(self, start_s: Floats, end_s: Floats) -> Floats:
        """Joules in each stretch; NaN where it saw less than half of it."""
        span_s = np.maximum(end_s - start_s, 1e-12)
        seen = (np.interp(end_s, self.t_s, self.seen_s) - np.interp(start_s, self.t_s, self.seen_s)) / span_s
        used_j = np.interp(end_s, self.t_s, self.e_j) - np.interp(start_s, self.t_s, self.e_j)
        return np.where(seen >= SEEN_SHARE, used_j, np.nan)


def near_w(t_s: Floats, step_j: Floats, sound: Bools, rows: NDArray[np.int64]) -> Floats:
    """Mean power in W around the intervals `rows` of the knots `t_s`, over `sound` ones; NaN where none is sound."""
    span_s = np.where(sound, np.diff(t_s), 0.0)
    joules = np.concatenate([[0.0], np.cumsum(np.where(sound, step_j, 0.0))])
    seconds = np.concatenate([[0.0], np.cumsum(span_s)])
    start_s, end_s = t_s[rows], t_s[rows + 1]
    near = np.maximum(NEAR_S, end_s - start_s)

    def around(running: Floats) -> Floats:
        before, first, last, after = (
            np.interp(t, t_s, running) for t in (start_s - near, start_s, end_s, end_s + near)
        )
        return np.asarray(first - before + after - last)

    near_s = around(seconds)
    level = joules[-1] / seconds[-1] if seconds[-1] > 0 else np.nan
    return np.where(near_s > 0, around(joules) / np.maximum(near_s, 1e-12), level)


def fill(
    t_s: Floats, step_j: Floats, bad: Bools, total_j: Floats, shape: Shape | None, gain: float
) -> tuple[Floats, Floats, Floats]:
    """Knots and running joules (from 0) with the intervals `bad` filled, and the joules of each of these.

    t_s (m + 1,) ascending; step_j (m,), of which the `bad` are not read; total_j, one a bad interval: its joules, NaN
    where they are not known. A stretch that `shape` saw gets its knots.
    """
    rows = np.flatnonzero(bad)
    start_s, end_s = t_s[rows], t_s[rows + 1]
    shape_j = np.full(rows.size, np.nan) if shape is None else shape.joules(start_s, end_s)
    usual_j = near_w(t_s, step_j, ~bad, rows) * (end_s - start_s)
    filled_j = np.where(np.isnan(total_j), np.where(np.isnan(shape_j), usual_j, gain * shape_j), total_j)
    filled_j = np.nan_to_num(filled_j)
    steps = step_j.copy()
    steps[rows] = filled_j
    e_j = np.concatenate([[0.0], np.cumsum(steps)])
    shaped = shape_j > 0
    if shape is None or not shaped.any():
        return t_s, e_j, filled_j
    at = np.searchsorted(start_s, shape.t_s, side="right") - 1  # the stretch that each knot of the shape may be in
    inside = (at >= 0) & (shape.t_s > start_s[at]) & (shape.t_s < end_s[at]) & shaped[at]
    at, knot_s = at[inside], shape.t_s[inside]
    share = (shape.e_j[inside] - np.interp(start_s[at], shape.t_s, shape.e_j)) / shape_j[at]
    knot_j = e_j[rows[at]] + share * filled_j[at]
    place = np.searchsorted(t_s, knot_s)
    return np.insert(t_s, place, knot_s), np.insert(e_j, place, knot_j), filled_j
