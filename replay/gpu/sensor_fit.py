"""How a power sensor behaves, estimated from polls of it: pure functions on arrays.

The model is that of "Part-time Power Measurements" (Yang et al., SC'24): a sensor updates once a period, and shows the
mean power of a window that ended a lag before the update. The period shows in when values change. Window and lag show
when power is a known square wave whose on and off times are no multiples of the period: an update then shows
low + (high - low) · the share of its window that was on. Power may also follow the load with a time constant.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_CHANGES = 12  # fewer distances between changes have divisors by chance
MIN_SCORE = 0.5  # of folding: a spread of the distances of 19 % of the period
LIKE_THE_BEST = 0.05  # scores so near each other are those of a period and of its halves, thirds...
MIN_FIT = 20  # updates, for five parameters
MIN_PARTIAL = 6  # updates whose window holds a switch: only these tell its length
MIN_R2 = 0.9
LATE = 4.0  # a change that was seen between polls so many times the usual distance apart is dated too badly to use
WINDOW_S = (1e-3, 3.0)  # what is searched; the longest published window is 1 s
LAG_S = (0.0, 1.0)
RISE_S = (1e-3, 1.0)
RISES_S = (0.005, 0.02, 0.08, 0.3)  # where the search for one begins
RISE_GAIN = 0.7  # a time constant must leave so little of the squared residuals to be believed
NS = 1e9


@dataclass(frozen=True)
class Changes:
    """Where a value changed (n,): between the begin of the last poll of the old and the end of the first of the new."""

    low_ns: Ints
    high_ns: Ints
    value: Floats  # the new one

    def __len__(self) -> int:
        """How many."""
        return self.value.size

    @property
    def at_ns(self) -> Floats:
        """When it changed: half-way between the polls."""
        return np.asarray((self.low_ns + self.high_ns) / 2, dtype=np.float64)

    @property
    def gap_ns(self) -> float:
        """The usual distance of the polls around a change."""
        return float(np.median(self.high_ns - self.low_ns))


@dataclass(frozen=True)
class Period:
    """How often a sensor updates, in ns."""

    period_ns: float
    spread_ns: float  # half the central 68 % of updates' distances around multiples of it, polling's own share included


@dataclass(frozen=True)
class Fit:
    """What an update shows: window and lag in s with their standard errors, and how well that explains the readings."""

    window_s: float
    window_se_s: float
    lag_s: float
    lag_se_s: float
    rise_s: float  # time constant of power (or sensor) behind the load; 0: none that could be told
    low: float  # readings at a steady off and on, in the readings' unit
    high: float
    r2: float


def find_changes(begin_ns: Ints, end_ns: Ints, value: Floats) -> Changes:
    """Where polls `[begin_ns, end_ns]` (n,) saw `value` (n,; NaN: not told) change; those seen late are left out."""
    known = np.isfinite(value)
    begin_ns, end_ns, value = begin_ns[known], end_ns[known], value[known]
    new = np.flatnonzero(np.diff(value) != 0) + 1
    low_ns, high_ns = begin_ns[new - 1], end_ns[new]
    gap_ns = high_ns - low_ns
    kept = gap_ns <= LATE * (np.median(gap_ns) if gap_ns.size else 0)
    return Changes(low_ns[kept], high_ns[kept], value[new][kept])


def find_period(changes: Changes) -> Period | str:
    """The longest period of which all distances between changes are multiples; or why there is none to tell.

    A sensor without noise repeats values, so distances are multiples 1, 2, 3... of the period. The score of a candidate
    P is the mean of cos 2πd/P over the distances d: 1 when all are multiples. Divisors of the period score alike, so
    the longest of the good candidates it is.
    """
    if len(changes) < MIN_CHANGES:
        return f"its value changed {len(changes)} times, and {MIN_CHANGES} are needed"
    distance_ns = np.diff(changes.at_ns)
    gap_ns, usual_ns = changes.gap_ns, float(np.median(distance_ns))
    if usual_ns < 1.5 * gap_ns:
        return f"it changes at nearly every poll, {usual_ns / 1e6:.2g} ms apart"
    near_ns = distance_ns[distance_ns <= 8 * usual_ns]
    frequency = np.arange(1 / (1.25 * usual_ns + gap_ns), 1 / (1.5 * gap_ns), 0.05 / near_ns.max())
    score = np.array([np.cos(2 * math.pi * near_ns * f).mean() for f in frequency])
    if not score.size or score.max() < MIN_SCORE:
        return "its value changes at no regular distance"
    peak = (score >= np.append(score[1:], -1)) & (score >= np.append(-1, score[:-1]))
    good = peak & (score >= max(MIN_SCORE, score.max() - LIKE_THE_BEST))
    coarse_ns = 1 / frequency[np.argmax(good)]
    times = np.round(near_ns / coarse_ns)
    fine_ns = float((near_ns * times).sum() / (times**2).sum())
    # Now sharp enough to count periods over the longest distances, and with the count the whole run is one long ruler.
    times = np.round(distance_ns / fine_ns)
    count = np.concatenate([[0.0], np.cumsum(times)])
    period_ns = float(np.polyfit(count, changes.at_ns - changes.at_ns[0], 1)[0])
    low, high = np.quantile(distance_ns - times * period_ns, [0.16, 0.84])
    return Period(period_ns, float(high - low) / 2)


def fit_window(changes: Changes, switches_ns: Ints, rise_s: float | None = None) -> Fit | str:
    """Window and lag of a sensor from its `changes` while load was on in `switches_ns` (m, 2); or why they are unknown.

    Least squares over window, lag and a time constant (low and high follow linearly) on a grid, then refined. Unless
    `rise_s` gives the time constant, it counts only where it explains much more than window and lag alone.
    """
    if len(changes) < MIN_FIT:
        return f"its value changed {len(changes)} times while load went on and off, and {MIN_FIT} are needed"
    origin_ns = int(switches_ns[0, 0])
    data = _Data((switches_ns - origin_ns).ravel() / NS, (changes.at_ns - origin_ns) / NS, changes.value)
    shape, cost = _best(data, (rise_s or 0.0,), free_rise=False)
    if rise_s is None:
        risen = _best(data, RISES_S, free_rise=True)
        shape, cost = risen if risen[1] < RISE_GAIN * cost else (shape, cost)
    r2 = 1 - cost / float(((data.value - data.value.mean()) ** 2).sum())
    if r2 < MIN_R2:
        return f"window and lag explain {max(r2, 0):.0%} of what it showed while load went on and off; 90 % are needed"
    if shape[0] > 0.99 * WINDOW_S[1]:
        return f"it averages over more than the {WINDOW_S[1]:g} s that can be told apart"
    low, swing = _levels(_share_on(data, shape), data.value)
    if swing <= 0:
        return "it fell when load went on"
    share = _share_on(data, (shape[0], shape[1], 0.0))
    partial = int(((share > 0.02) & (share < 0.98)).sum())
    if partial < MIN_PARTIAL:
        return (
            f"load was switched within the window of {partial} updates, and {MIN_PARTIAL} are needed: the window is "
            "short against the period, so watch for longer (--seconds)"
        )
    window_se_s, lag_se_s = _standard_errors(data, shape, free_rise=rise_s is None and shape[2] > 0)
    # Polls date updates to a uniform error, which a fit through few of them takes up without a residual.
    dated_s = changes.gap_ns / NS / math.sqrt(12 * partial)
    errors_s = math.hypot(window_se_s, 2 * dated_s), math.hypot(lag_se_s, dated_s)
    return Fit(shape[0], errors_s[0], shape[1], errors_s[1], shape[2], low, low + swing, r2)


@dataclass(frozen=True)
class _Data:
    """What is fitted, times in s: edges of the load (2m,), on and off in turn; updates and what they showed (n,)."""

    edges_s: Floats
    update_s: Floats
    value: Floats


_Shape = tuple[float, float, float]  # window, lag and time constant in s


def _best(data: _Data, rises_s: tuple[float, ...], *, free_rise: bool) -> tuple[_Shape, float]:
    """The shape with the least squared residuals, and their sum; the time constant one of `rises_s` unless free."""
    lags_s = np.concatenate([[0.0], np.geomspace(0.002, LAG_S[1], 20)])
    grid = [(float(w), float(lag), r) for w in np.geomspace(*WINDOW_S, 26) for lag in lags_s for r in rises_s]
    starts = sorted(grid, key=lambda shape: _cost(data, shape))[:3]
    found = [_refine(data, start, free_rise=free_rise) for start in starts]
    return min(((shape, _cost(data, shape)) for shape in found), key=lambda item: item[1])


def _refine(data: _Data, start: _Shape, *, free_rise: bool) -> _Shape:
    """The best shape near `start`. Derivatives would mislead: the model has a kink wherever a window meets an edge."""

    def bounded(x: Floats) -> _Shape:
        rise_s = float(np.clip(math.exp(x[2]), *RISE_S)) if free_rise else start[2]
        return float(np.clip(math.exp(x[0]), *WINDOW_S)), float(np.clip(x[1], *LAG_S)), rise_s

    def cost(x: Floats) -> float:
        return _cost(data, bounded(x))

    first = np.array([math.log(start[0]), start[1]] + ([math.log(start[2])] if free_rise else []))
    simplex = np.vstack([first, first + np.diag([0.2, 0.01, 0.4][: first.size])])
    best = minimize(
        cost,
        first,
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 1e-5, "fatol": 1e-9 * cost(first), "maxiter": 400},
    )
    return bounded(best.x)


def _cost(data: _Data, shape: _Shape) -> float:
    return float((_residuals(data, shape) ** 2).sum())


def _share_on(data: _Data, shape: _Shape) -> Floats:
    """The share of load in the window of each update (n,)."""
    window_s, lag_s, rise_s = shape
    end_s = data.update_s - lag_s
    return np.asarray((_on_s(data.edges_s, end_s, rise_s) - _on_s(data.edges_s, end_s - window_s, rise_s)) / window_s)


def _on_s(edges_s: Floats, t_s: Floats, rise_s: float) -> Floats:
    """The time integral up to `t_s` (n,) of the load, 0 or 1, followed with a time constant.

    With s' = (load - s) / rise the integral of s is that of the load, less rise · s.
    """
    lengths_s = np.diff(edges_s, prepend=edges_s[0])
    lengths_s[::2] = 0.0
    on_s = np.asarray(np.interp(t_s, edges_s, np.cumsum(lengths_s)), dtype=np.float64)
    if not rise_s:
        return on_s
    level = np.zeros(edges_s.size)  # of s, at the edges
    for i in range(1, edges_s.size):
        target = float(i % 2)  # what the load was before this edge
        level[i] = target + (level[i - 1] - target) * math.exp((edges_s[i - 1] - edges_s[i]) / rise_s)
    edge = np.searchsorted(edges_s, t_s, side="right") - 1
    target_now = np.where(edge % 2 == 0, 1.0, 0.0)
    since_s = t_s - edges_s[edge]
    now = target_now + (level[edge] - target_now) * np.exp(-np.maximum(since_s, 0) / rise_s)
    return on_s - rise_s * np.where(edge < 0, 0.0, now)


def _levels(share: Floats, value: Floats) -> tuple[float, float]:
    """Low, and high less low, by linear regression of `value` on `share`."""
    centred = share - share.mean()
    variance = float((centred**2).sum())
    swing = float((centred * value).sum()) / variance if variance > 0 else 0.0
    return float(value.mean()) - swing * float(share.mean()), swing


def _residuals(data: _Data, shape: _Shape) -> Floats:
    share = _share_on(data, shape)
    low, swing = _levels(share, data.value)
    return data.value - low - swing * share


def _standard_errors(data: _Data, shape: _Shape, *, free_rise: bool) -> tuple[float, float]:
    """Of window and lag, from the residuals' slopes."""
    here = _residuals(data, shape)
    steps = [0.02 * shape[0] + 1e-4, 1e-3] + ([0.02 * shape[2]] if free_rise else [])
    slopes = []
    for i, step in enumerate(steps):
        moved = list(shape)
        moved[i] += step
        slopes.append((_residuals(data, (moved[0], moved[1], moved[2])) - here) / step)
    jacobian = np.stack(slopes, axis=1)
    freedom = max(1, data.value.size - 2 - len(steps))
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * float((here**2).sum()) / freedom
    return float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1]))
