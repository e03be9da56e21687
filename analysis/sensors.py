"""Window and lag of a power sensor, estimated from the run itself.

A sensor shows at an update the mean power of a window that ended a lag before ("Part-time Power Measurements", Yang et
al., SC'24). The engine's steps are a load that goes up and down at known times, so the window and lag under which the
steps' work explains best what the sensor showed are its own: least squares over (window, lag), with the price of each
kind of work following linearly.

Where the manifest tells both, this is a cross-check (`disagreement`), which overrules nothing.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from analysis.load import Floats, GpuData
from analysis.samples import SOURCES, Updates, read_updates, window_of
from analysis.steps import Steps
from analysis.timeline import Estimate, GpuTimeline, Windows, dated_readings

# Where the search begins: windows known of NVIDIA's sensors are 10, 25, 100 ms and 1 s (Yang et al., table 2).
WINDOWS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)
LAGS_S = (-0.03, 0.0, 0.015, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)  # below 0: a poll dates an update late
LONGEST_S, LATEST_S = 3.0, 0.5
READINGS = 2500  # are enough, evenly spread
LEAST_READINGS, LEAST_R2 = 200, 0.2
OFF_S, OFF_ERRORS = 0.010, 4.0  # how far the manifest may be off: 10 ms, or so many standard errors
# And how much worse it may explain the readings. On made-up runs at 0.5 to 6 requests/s a right manifest left up to 5 %
# more of the squared residuals than the best window and lag, one that was 25 ms off 6 % on a full engine, else 30 % up.
OFF_REL = 0.1
RIDGE = 1e-9  # of the columns' squares: work that the run never did must not stop the fit
_TINY = 1e-12


def work_integral(steps: Steps) -> tuple[Floats, Floats]:
    """Times (2n,), and up to each the seconds in steps and the work done, (2n, 5): what power follows."""
    edges_s = np.stack([steps.start_s, steps.end_s], axis=1).ravel()
    pieces = np.zeros((edges_s.size, 1 + steps.work.shape[1]))
    pieces[1::2, 0] = steps.end_s - steps.start_s
    pieces[1::2, 1:] = steps.work
    return edges_s, np.cumsum(pieces, axis=0)


def estimate(
    updates: Updates, edges_s: Floats, integral: Floats, told_s: tuple[float, float] | None = None
) -> Estimate | str:
    """Window and lag of the sensor with these `updates`, or why they cannot be told.

    `integral` (m, k) of what power follows, up to each of `edges_s` (m,): `work_integral`, or that of any features.
    A plain reading, with which it is compared, describes the whole time since the update before; `told_s`: window and
    lag to compare it with, too.
    """
    end_s, watts = dated_readings(updates)
    inside = np.flatnonzero((end_s > edges_s[0] + LONGEST_S) & (end_s < edges_s[-1])) if edges_s.size else np.zeros(0)
    if inside.size < LEAST_READINGS:
        return f"{inside.size} readings among the steps are too few to tell, {LEAST_READINGS} are needed"
    rows = inside[:: max(1, -(-inside.size // READINGS))]
    end_s, watts = end_s[rows], watts[rows]

    def cost(window_s: float, lag_s: float) -> float:
        """The squared residuals left, over the readings' variance."""
        features = _means(edges_s, integral, end_s - lag_s - window_s, end_s - lag_s) / window_s
        return _unexplained(features, watts)

    window_s, lag_s, left = _search(cost, updates.period_s)
    plain = cost(updates.period_s, 0.0)
    if 1 - left < LEAST_R2:
        return f"its readings follow the steps' work too little to tell (R² {1 - left:.2f})"
    if window_s > 0.99 * LONGEST_S or abs(lag_s) > 0.99 * LATEST_S:
        return "no window and lag that sensors have explain its readings"
    independent = rows.size * min(1.0, updates.period_s / window_s)  # longer windows overlap
    errors_s = _standard_errors(cost, window_s, lag_s, independent)
    if errors_s is None:
        return "its readings do not tell one window from another"
    return Estimate(
        source=updates.source,
        window_s=window_s,
        window_se_s=errors_s[0],
        lag_s=lag_s,
        lag_se_s=errors_s[1],
        r2=1 - left,
        better_rel=1 - left / max(plain, _TINY),
        readings=rows.size,
        told_worse_rel=None if told_s is None else cost(*told_s) / left - 1,
    )


def with_estimated(gpu: GpuData, line: GpuTimeline, steps: Steps) -> GpuTimeline:
    """`line` with the windows that the run tells of, where the manifest does not and there is no counter.

    A counter's own steps need no window, so they are not given up for an estimated one. Each GPU is asked for itself:
    sensors have phases of their own.
    """
    if line.told or line.curve.source == "counter" or not len(steps):
        return line
    found = estimate_of(gpu, steps)
    if isinstance(found, str):
        return replace(line, estimate=found)
    end_s, watts = dated_readings(_as_read(gpu, found.source))
    end_s = end_s - found.lag_s
    return replace(line, windows=Windows(found.source, end_s - found.window_s, end_s, watts), estimate=found)


def estimate_of(gpu: GpuData, steps: Steps) -> Estimate | str:
    """`estimate` for the first of the sensors that `gpu` has, by the work in `steps`."""
    source = next((source for source in SOURCES if read_updates(gpu, source) is not None), None)
    if source is None:
        return "there are no power samples"
    return estimate(_as_read(gpu, source), *work_integral(steps), told_of(gpu, source))


def told_of(gpu: GpuData, source: str) -> tuple[float, float] | None:
    """Window and lag of a sensor as the manifest gives them, s; None where it gives no window."""
    window_s = window_of(gpu, source)
    return None if window_s is None else (window_s, float(gpu.sensors[source].get("lag_ns") or 0) / 1e9)


def disagreement(gpu: GpuData, found: Estimate | str) -> str | None:
    """What to say where the manifest's window or lag of a sensor is not what the run shows; None where they agree.

    A difference that the readings hardly tell is none.
    """
    told_s = None if isinstance(found, str) else told_of(gpu, found.source)
    if isinstance(found, str) or told_s is None or (found.told_worse_rel or 0.0) < OFF_REL:
        return None
    said = [
        f"{name} {told * 1e3:.0f} ms where the run shows {here * 1e3:.0f} ± {error * 1e3:.0f} ms"
        for name, told, here, error in (
            ("window", told_s[0], found.window_s, found.window_se_s),
            ("lag", told_s[1], found.lag_s, found.lag_se_s),
        )
        if abs(told - here) > max(OFF_S, OFF_ERRORS * error)
    ]
    return f"{gpu.name}: the manifest gives the {found.source} sensor a {' and a '.join(said)}" if said else None


def _as_read(gpu: GpuData, source: str) -> Updates:
    """The updates of a sensor that has some, without the manifest's lag."""
    sensors = {**gpu.sensors, source: {**gpu.sensors.get(source, {}), "lag_ns": 0.0}}
    updates = read_updates(replace(gpu, sensors=sensors), source)
    assert updates is not None
    return updates


def _means(edges_s: Floats, integral: Floats, start_s: Floats, end_s: Floats) -> Floats:
    """The gain of each column of `integral` over each window."""
    return np.asarray(_at(edges_s, integral, end_s) - _at(edges_s, integral, start_s))


def _at(edges_s: Floats, integral: Floats, t_s: Floats) -> Floats:
    """All columns at `t_s`, linear between edges."""
    right = np.clip(np.searchsorted(edges_s, t_s, side="right"), 1, edges_s.size - 1)
    span_s = edges_s[right] - edges_s[right - 1]
    share = np.divide(t_s - edges_s[right - 1], span_s, out=np.zeros_like(t_s), where=span_s > 0)
    share = np.clip(share, 0.0, 1.0)[:, None]
    return np.asarray(integral[right - 1] * (1 - share) + integral[right] * share)


def _unexplained(features: Floats, watts: Floats) -> float:
    """The part of the variance of `watts` (n,) that `features` (n, k) and a constant leave."""
    centred = features - features.mean(axis=0)
    target = watts - watts.mean()
    size = np.maximum(np.sqrt((centred**2).sum(axis=0)), _TINY)
    centred = centred / size
    gram = centred.T @ centred + RIDGE * np.eye(centred.shape[1])
    moment = centred.T @ target
    whole = max(float(target @ target), _TINY)
    return max(1 - float(moment @ np.linalg.solve(gram, moment)) / whole, _TINY)


def _search(cost: Callable[[float, float], float], period_s: float) -> tuple[float, float, float]:
    """The window and lag of least cost, and the cost: a grid, then refined from its two best windows."""
    windows_s = sorted({*WINDOWS_S, period_s})
    grid = {w: min((cost(w, lag), lag) for lag in LAGS_S) for w in windows_s if w < LONGEST_S}
    best: tuple[float, float, float] | None = None
    for window_s in sorted(grid, key=lambda w: grid[w][0])[:2]:
        start = [math.log(window_s), grid[window_s][1]]
        simplex = np.array(start) + np.array([[0.0, 0.0], [0.2, 0.0], [0.0, 0.01]])
        # Derivatives would mislead: there is a kink wherever a window meets a step's edge.
        options: Any = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-6, "maxiter": 80}
        found: Any = minimize(  # type: ignore[call-overload]  # the stubs know no list of floats
            lambda x: cost(*_bounded(x)), start, method="Nelder-Mead", options=options
        )
        if best is None or found.fun < best[2]:
            best = (*_bounded(found.x), float(found.fun))
    assert best is not None
    return best


def _bounded(x: Floats) -> tuple[float, float]:
    """Window and lag of a point of the search."""
    return float(np.clip(math.exp(x[0]), 1e-3, LONGEST_S)), float(np.clip(x[1], -LATEST_S, LATEST_S))


def _standard_errors(
    cost: Callable[[float, float], float], window_s: float, lag_s: float, readings: float
) -> tuple[float, float] | None:
    """Of window and lag, from how fast log-likelihood, -n/2 · log cost, falls; None where it does not.

    The curvature is taken over a tenth of the window: nearer the kinks of single steps show.
    """
    step_w, step_l = max(0.1 * window_s, 2e-3), max(0.1 * window_s, 2e-3)

    def loss(w: float, lag: float) -> float:
        return readings / 2 * math.log(cost(window_s + w * step_w, lag_s + lag * step_l))

    here = loss(0, 0)
    ww = loss(1, 0) + loss(-1, 0) - 2 * here
    ll = loss(0, 1) + loss(0, -1) - 2 * here
    wl = (loss(1, 1) + loss(-1, -1) - loss(1, -1) - loss(-1, 1)) / 4
    determinant = ww * ll - wl * wl
    if ww <= 0 or ll <= 0 or determinant <= 0:
        return None
    return step_w * math.sqrt(ll / determinant), step_l * math.sqrt(ww / determinant)
