"""Fit arrivals: the model of `tracegen.arrivals.models` whose counts vary as a trace's do.

What is matched is the index of dispersion (variance over mean of the counts in windows of equal length). Parameters
come from its closed form, see `log_ou_dispersion`; the model from a synthetic likelihood (Wood, Nature 466, 2010): each
candidate is simulated as often as `SIMULATIONS`, and the trace's dispersion at 1, 10 and 60 s and its number of long
silences are looked up in the normal distribution of the simulated ones' logarithms, less one for each parameter that
was fitted (Akaike).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegen.arrivals.models import Arrivals, make_arrivals
from tracegen.arrivals.points import CV_RANGE
from tracegen.describe import DISPERSION_WINDOWS_S, MIN_WINDOWS
from tracegen.durations import NS_PER_S
from tracegen.rates import steps_path
from tracegen.streams import random_stream

Floats = NDArray[np.float64]

WINDOWS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
SIMULATIONS = 40
SIMULATED_REQUESTS = 200_000  # at most: of a longer trace, a part as long is simulated
LONG_GAPS = 12.0  # mean gaps that are a silence: a Poisson process has one in 160,000 of its gaps
LEAST_SILENCES = 10  # below, bursts are not a model but an anecdote
# Parameters of each kind that are fitted.
FITTED = {"constant": 0, "poisson": 0, "gamma": 1, "weibull": 1, "mmpp": 2, "log-ou": 3, "on-off": 7}
HOPELESS = 20.0  # of log-likelihood behind the best: no correction makes up for that
LEAST_SIGMA = 0.03  # a rate that wanders less is none: the gaps alone say as much
_TINY = 1e-3  # of a dispersion, where its logarithm is taken


@dataclass(frozen=True)
class Moments:
    """What is fitted to: arrivals per second, how long they were watched, and how their counts vary."""

    rate_rps: float
    span_s: float
    dispersion: dict[float, float]  # by window in s
    gap_cv: float | None = None
    silences: int | None = None  # gaps longer than `LONG_GAPS` mean gaps
    bursts: "Bursts | None" = None


@dataclass(frozen=True)
class Bursts:
    """Stretches of arrivals between silences: mean lengths, and the shapes of gamma distributions with their CVs."""

    on_s: float
    on_shape: float
    off_s: float
    off_shape: float


@dataclass(frozen=True)
class Fitted:
    """A model with its parameters, and how it stands: log-likelihood less parameters, and the simulated dispersion."""

    arrivals: Arrivals
    score: float
    dispersion: dict[float, tuple[float, float, float]]  # by window: 5 %, median, 95 % over the simulations


def measure_moments(arrival_ns: NDArray[np.int64]) -> Moments:
    """The moments of at least two different arrivals in order. Windows shorter than a grid of arrivals are left out."""
    since_ns = arrival_ns - arrival_ns[0]
    span_s = float(since_ns[-1]) / NS_PER_S
    gaps_s = np.diff(since_ns) / NS_PER_S
    grid_s = float(np.gcd.reduce(since_ns)) / NS_PER_S
    found = {w: dispersion(since_ns, w, span_s) for w in WINDOWS_S if w >= grid_s}
    return Moments(
        (arrival_ns.size - 1) / span_s,
        span_s,
        {w: value for w, value in found.items() if value is not None},
        float(gaps_s.std(ddof=1) / gaps_s.mean()) if gaps_s.size > 1 else None,
        int((gaps_s > LONG_GAPS * gaps_s.mean()).sum()),
        _find_bursts(gaps_s),
    )


def dispersion(since_ns: NDArray[np.int64], window_s: float, span_s: float) -> float | None:
    """Index of dispersion of the counts in all full windows; None where there are fewer than `MIN_WINDOWS`."""
    windows = int(span_s / window_s)
    if windows < MIN_WINDOWS:
        return None
    index = since_ns // round(window_s * NS_PER_S)
    index = index[: np.searchsorted(index, windows)]
    last = np.flatnonzero(np.diff(index, append=windows))  # of each window that has any
    counts = np.diff(last, prepend=-1).astype(np.float64)
    mean = counts.sum() / windows
    return float(((counts * counts).sum() / windows - mean**2) * windows / (windows - 1) / mean) if mean else None


def _find_bursts(gaps_s: Floats) -> Bursts | None:
    """What silences of `LONG_GAPS` mean gaps part; None where there are too few."""
    silent = gaps_s > LONG_GAPS * gaps_s.mean()
    if silent.sum() < LEAST_SILENCES:
        return None
    edges = np.concatenate(([-1], np.flatnonzero(silent), [gaps_s.size]))
    ends_s = np.concatenate(([0.0], np.cumsum(gaps_s)))
    on_s = ends_s[edges[1:]] - ends_s[edges[:-1] + 1]
    # A burst goes on for half a gap before and after its arrivals.
    on_s += float(gaps_s[~silent].mean())
    off_s = gaps_s[silent]
    return Bursts(float(on_s.mean()), _gamma_shape(on_s), float(off_s.mean()), _gamma_shape(off_s))


def _gamma_shape(values: Floats) -> float:
    """The shape of the gamma distribution with the values' CV, within what is still told apart."""
    return float(np.clip((values.mean() / values.std(ddof=1)) ** 2 if values.std() else 20.0, 0.2, 20.0))


def fit_arrivals(moments: Moments, seed: int) -> tuple[Fitted, list[Fitted]]:
    """The model that suits `moments` best, and all that were tried, the best first.

    A trace too short for any window of 1, 10 or 60 s gets independent arrivals.
    """
    windows = [float(w) for w in DISPERSION_WINDOWS_S if w in moments.dispersion]
    if not windows:
        only = Fitted(make_arrivals("poisson", {}), 0.0, {})
        return only, [only]
    tried = [_judge(arrivals, moments, windows, seed) for arrivals in candidates(moments)]
    hopeful = max(fitted.score for fitted in tried) - HOPELESS
    for fitted in [fitted for fitted in tried if fitted.arrivals.kind in FITS and fitted.score > hopeful]:
        # Closed forms are means, and a short trace shows less: aim as much higher as the simulated ones lie low.
        aims = {w: moments.dispersion[w] ** 2 / max(mid, _TINY) for w, (_, mid, _) in fitted.dispersion.items()}
        corrected = FITS[fitted.arrivals.kind](replace(moments, dispersion=aims))
        tried.append(_judge(make_arrivals(fitted.arrivals.kind, corrected), moments, windows, seed))
    tried.sort(key=lambda fitted: -fitted.score)
    return tried[0], tried


def simulate_ns(arrivals: Arrivals, rate_rps: float, span_s: float, seed: int) -> NDArray[np.int64]:
    """Arrivals of a model at a mean of `rate_rps` over [0, `span_s`)."""
    rate = steps_path(np.array([rate_rps]), np.array([0.0, span_s]))
    for i, modulation in enumerate(arrivals.modulations):
        path, _ = modulation.path(span_s, random_stream(seed, f"rate {i}"), None)
        rate = rate.times(path)
    arrival_ns: NDArray[np.int64] = arrivals.arrivals_ns(rate, 0.0, seed, 0)[0]
    return arrival_ns


def _judge(arrivals: Arrivals, moments: Moments, windows: list[float], seed: int) -> Fitted:
    """How likely the trace's dispersion at `windows` is with `arrivals`."""
    knots_s = [modulation.knot_s for modulation in arrivals.modulations]
    # Three thousand correlation times are enough.
    span_s = min([moments.span_s, SIMULATED_REQUESTS / moments.rate_rps, *(3e5 * knot_s for knot_s in knots_s)])
    span_s = max(span_s, min(moments.span_s, max(windows) * (MIN_WINDOWS + 1)))
    every = [w for w in moments.dispersion if span_s / w >= MIN_WINDOWS]
    rows = []
    for k in range(SIMULATIONS):
        since_ns = simulate_ns(arrivals, moments.rate_rps, span_s, seed * SIMULATIONS + k)
        silences = (np.diff(since_ns) > LONG_GAPS * NS_PER_S / moments.rate_rps).sum() * moments.span_s / span_s
        rows.append([*(dispersion(since_ns, w, span_s) or 0.0 for w in every), 1 + silences])
    logs = np.log(np.array(rows) + _TINY)
    found = logs[:, [every.index(w) for w in windows]]
    real = np.log([moments.dispersion[w] + _TINY for w in windows])
    # On the diagonal what a trace does not settle: 1 % of dispersion, a quarter of the silences.
    unsettled = np.full(len(windows), 0.01)
    if moments.silences is not None:
        found = np.column_stack((found, logs[:, -1]))
        real, unsettled = np.append(real, math.log1p(moments.silences)), np.append(unsettled, 0.25)
    spread = np.atleast_2d(np.cov(found, rowvar=False)) + np.diag(unsettled**2)
    off = real - found.mean(axis=0)
    likelihood = -0.5 * float(off @ np.linalg.solve(spread, off)) - 0.5 * float(np.linalg.slogdet(spread)[1])
    quantiles = np.exp(np.quantile(logs, [0.05, 0.5, 0.95], axis=0)) - _TINY
    bands = {w: tuple(float(q) for q in quantiles[:, i]) for i, w in enumerate(every)}
    return Fitted(arrivals, likelihood - FITTED[arrivals.kind], bands)  # type: ignore[arg-type]


def candidates(moments: Moments) -> Iterator[Arrivals]:
    """Each kind of model with the parameters that suit `moments`."""
    longest = moments.dispersion[max(moments.dispersion)]
    cv = float(np.clip(moments.gap_cv if moments.gap_cv is not None else math.sqrt(longest), *CV_RANGE))
    if moments.gap_cv is not None and moments.gap_cv < CV_RANGE[0]:
        yield make_arrivals("constant", {})
    yield make_arrivals("poisson", {})
    if abs(cv - 1) > 2 / math.sqrt(moments.rate_rps * moments.span_s):  # two standard errors of a Poisson process's CV
        yield make_arrivals("gamma", {"cv": _round(cv)})
        yield make_arrivals("weibull", {"cv": _round(cv)})
    for kind, fit in FITS.items():
        if kind != "on-off" or moments.bursts is not None:
            found = fit(moments)
            if found.get("sigma", 1.0) > LEAST_SIGMA:
                yield make_arrivals(kind, found)


def _round(value: float) -> float:
    """Four digits, more than a trace settles."""
    return float(f"{value:.4g}")


def _fit_log_ou(moments: Moments) -> dict[str, float]:
    """sigma, tau and the CV of gaps on the wandering clock."""
    at = _least_squares(moments, log_ou_dispersion, [(0.02, 0.3, 2.5), _times_s(moments), (0.3, 1.0, 8.0)])
    return dict(zip(("sigma", "tau", "cv"), map(_round, at), strict=True))


def _times_s(moments: Moments) -> tuple[float, float, float]:
    """What times of change may be: below a mean gap nothing is seen of them."""
    return 1 / moments.rate_rps, 60.0, max(moments.span_s, 60.0)


def _fit_mmpp(moments: Moments) -> dict[str, Any]:
    """Two levels, 1 apart by a factor, with equal stays."""
    at = _least_squares(moments, mmpp_dispersion, [(0.02, 0.4, 0.98), _times_s(moments)])
    level, hold_s = at
    return {"levels": [_round((1 - level) / (1 + level)), 1.0], "holds": [_round(hold_s)] * 2}


def _fit_on_off(moments: Moments) -> dict[str, Any]:
    """Stays within a factor of two of the bursts and silences found, and sigma, tau and batches, for the dispersion.

    The covariance is that of exponential stays; what their shapes change is left to the correction by simulation.
    """
    bursts = moments.bursts
    assert bursts is not None

    def model(moments: Moments, windows_s: Floats, at: Floats) -> Floats:
        sigma, tau_s, batch, on_s, off_s = at

        def covariance(t: Floats) -> Floats:
            switched = 1 + off_s / on_s * np.exp(-t * (1 / on_s + 1 / off_s))
            both: Floats = switched * np.exp(sigma**2 * np.exp(-t / tau_s)) - 1
            return both

        total: Floats = 2 * batch - 1 + cox_excess(moments.rate_rps, windows_s, covariance)
        return total

    ranges = [(0.02, 0.5, 2.5), (1 / moments.rate_rps, 3.0, bursts.on_s), (1.0, 1.5, 20.0)]
    ranges += [(stay_s / 2, stay_s, stay_s * 2) for stay_s in (bursts.on_s, bursts.off_s)]
    at = _least_squares(moments, model, ranges)
    return {
        **dict(zip(("sigma", "tau", "batch", "on", "off"), map(_round, at), strict=True)),
        "on-shape": _round(bursts.on_shape),
        "off-shape": _round(bursts.off_shape),
        "floor": 0.01,  # as in the preset: silence is not quite silent
        "spacing": _round(min(0.002, 0.1 / moments.rate_rps)),
    }


def log_ou_dispersion(moments: Moments, windows_s: Floats, at: Floats) -> Floats:
    """Index of dispersion with a log-Ornstein-Uhlenbeck rate and gamma gaps on its clock; `at`: sigma, tau, CV.

    The rate's relative covariance at lag t is exp(sigma² exp(-t/tau)) - 1. Gaps of their own CV give, in windows of
    many requests, CV² (Cox, Renewal Theory, 1962), in short ones 1; between it is the share of gaps inside.
    """
    sigma, tau_s, cv = at
    inside = windows_s * moments.rate_rps
    own = 1 + (cv**2 - 1) * inside / (inside + 1)
    decayed = cox_excess(moments.rate_rps, windows_s, lambda t: np.expm1(sigma**2 * np.exp(-t / tau_s)))
    total: Floats = own + decayed
    return total


def mmpp_dispersion(moments: Moments, windows_s: Floats, at: Floats) -> Floats:
    """Index of dispersion of a Poisson process that switches between 1 - c and 1 + c; `at`: c, mean stay in s."""
    level, hold_s = at
    total: Floats = 1 + cox_excess(moments.rate_rps, windows_s, lambda t: level**2 * np.exp(-2 * t / hold_s))
    return total


def cox_excess(rate_rps: float, windows_s: Floats, covariance: Callable[[Floats], Floats]) -> Floats:
    """What a random rate with relative `covariance` (of a lag in s) adds to the index of dispersion.

    2 rate/w times the integral of (w - t) covariance(t) over t from 0 to w: Cox and Isham, Point Processes, 1980,
    section 3.3. By the trapezoid rule on lags that grow by a tenth.
    """
    excess = np.empty(windows_s.size)
    for i, w in enumerate(windows_s):
        lags = np.concatenate(([0.0], np.geomspace(w * 1e-4, w, 100)))
        excess[i] = 2 * rate_rps / w * np.trapezoid((w - lags) * covariance(lags), lags)
    return excess


def _least_squares(
    moments: Moments,
    model: Callable[[Moments, Floats, Floats], Floats],
    ranges: list[tuple[float, float, float]],
) -> Floats:
    """Parameters within `ranges` (lowest, start, highest) for which `model` has the trace's dispersion.

    In logarithms, weighted by the error of a variance from so many windows. What the whole span adds to each window's
    count is the same for all of them, so no trace shows it: that is taken off the model.
    """
    from scipy.optimize import least_squares

    windows_s = np.array(sorted(moments.dispersion))
    real = np.log([moments.dispersion[w] + _TINY for w in windows_s])
    error = np.sqrt(2 / (moments.span_s / windows_s) + 0.02**2)
    every = np.append(windows_s, moments.span_s)

    def residuals(free: Floats) -> Floats:
        whole = model(moments, every, np.exp(free))
        shown = np.maximum(whole[:-1] - whole[-1] * windows_s / moments.span_s, _TINY)
        missed: Floats = (np.log(shown + _TINY) - real) / error
        return missed

    low, start, high = (np.log([r[k] for r in ranges]) for k in range(3))
    high = np.maximum(high, low + 0.1)
    found = least_squares(residuals, np.clip(start, low + 1e-3, high - 1e-3), bounds=(low, high))
    best: Floats = np.exp(found.x)
    return best


FITS: dict[str, Callable[[Moments], dict[str, Any]]] = {
    "mmpp": _fit_mmpp,
    "log-ou": _fit_log_ou,
    "on-off": _fit_on_off,
}
