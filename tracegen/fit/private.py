"""What a private fit knows of a trace: counts with noise, and nothing else.

The promise is differential privacy (Dwork, McSherry, Nissim, Smith, TCC 2006): whether any one request is in the trace
changes the chance of any mix file by a factor of exp(epsilon) at most. It holds because the file is computed from noisy
counts alone:

- how many inputs, and how many outputs, lie in each of 288 ranges that are the same for all traces, and how many
  requests in each of 24 x 24 pairs of wider ranges: a request is in one range of each;
- how many requests there are, and for windows of 1, 10 and 60 s how far their counts are from the mean: the sum of
  that, which a request moves by 1, and of its squares, cut at a bound that follows from the former.

Inputs, outputs, pairs, and the last seven together are spent a quarter of epsilon each. The noise is the two-sided
geometric distribution (Ghosh, Roughgarden, Sundararajan, STOC 2009): whole numbers, so that no digits of a
floating-point number give it away (Mironov, CCS 2012). It comes from PCG64 with 128 bits of the operating system, which
are kept nowhere. In which minutes the trace begins and ends is taken to be known.

What the promise does not cover: somebody who sent k requests has k times epsilon, and so has each request of a trace of
which k fits are shared; a fit that was chosen among several because it matches best has no promise, for the choice saw
the trace; and what all requests have in common (their rate, their typical lengths) is what the file is for.
"""

import math
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES
from tracegen.describe import DISPERSION_WINDOWS_S, MIN_WINDOWS
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.fit.arrivals import Moments

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LONGEST = 2**21  # tokens; longer ones are counted there
EPSILON = 1.0
COARSE = np.unique([*(2**k for k in range(22)), INPUT_EDGES[2] + 1, *OUTPUT_EDGES])
FINE = np.union1d(np.unique(np.floor(2 ** np.arange(0, 21, 1 / 16))), COARSE).astype(np.int64)
DEVIATIONS = 8  # mean deviations from the mean, where counts are cut: bursty Azure code stays below
MINUTE_NS = 60 * NS_PER_S
_TINY = 1e-12
LEAST_REQUESTS = 1000  # over epsilon; below, noise is more than a few per cent of each curve


@dataclass(frozen=True)
class Released:
    """All that a private fit sees."""

    inputs: Ints  # tokens, drawn in accordance with the noisy counts
    outputs: Ints
    moments: Moments | None


def release(inputs: Ints, outputs: Ints, arrival_ns: Ints, epsilon: float) -> Released:
    """The noisy counts of a trace, and lengths drawn from them.

    Raises `TraceError` for an epsilon that is no promise, and for a trace too small to say anything with it.
    """
    if not 0 < epsilon <= 10:
        raise TraceError(f"epsilon {epsilon:g} is not a number above 0 up to 10; 1 is usual, smaller is more private")
    part = epsilon / 4
    stream = np.random.default_rng(secrets.randbits(128))
    sides = [np.minimum(side, LONGEST - 1) for side in (inputs, outputs)]
    fine = [_noisy(np.histogram(side, FINE)[0], 1, part, stream) for side in sides]
    cells = np.zeros((COARSE.size - 1, COARSE.size - 1), np.int64)
    np.add.at(cells, tuple(np.searchsorted(COARSE, side, side="right") - 1 for side in sides), 1)
    joint = _noisy(cells, 1, part, stream)
    counted = part / (1 + 2 * len(DISPERSION_WINDOWS_S))
    since_ns = arrival_ns - arrival_ns[0] // MINUTE_NS * MINUTE_NS  # not from the first arrival: windows would show it
    span_s = int(since_ns[-1]) // MINUTE_NS * 60
    inside = since_ns[since_ns < span_s * NS_PER_S] if span_s else since_ns
    total = float(_noisy(np.array([inside.size]), 1, counted, stream)[0])
    if total < LEAST_REQUESTS / epsilon:
        raise TraceError(
            f"about {max(total, 0):.0f} requests are too few for a private fit with epsilon {epsilon:g}: "
            f"use {LEAST_REQUESTS / epsilon:.0f} or more, or a larger --epsilon"
        )
    drawn = _draw([_monotone(_trimmed(counts, part)) for counts in fine], joint, part, round(total), stream)
    return Released(*drawn, moments=_moments(inside, span_s, total, counted, stream))


def _noisy(counts: Ints, sensitivity: float, epsilon: float, stream: np.random.Generator) -> Floats:
    """Whole `counts`, of which a request changes the sum by `sensitivity`, with noise that hides it."""
    stop = -math.expm1(-epsilon / sensitivity)
    noise = stream.geometric(stop, counts.shape) - stream.geometric(stop, counts.shape)
    return (counts + noise).astype(np.float64)


def _trimmed(counts: Floats, epsilon: float) -> Floats:
    """`counts` of the ranges `FINE` with none outside of the wider ranges that certainly have some.

    That is, more than four standard deviations of their noise, sqrt(2)/epsilon for each range inside; the shortest and
    the longest lengths of all would else be the noise's.
    """
    cell = np.searchsorted(COARSE, FINE[:-1], side="right") - 1
    sure = np.flatnonzero(np.bincount(cell, counts) > 4 * np.sqrt(2 * np.bincount(cell)) / epsilon)
    if not sure.size:
        return counts
    return np.where((cell >= sure[0]) & (cell <= sure[-1]), counts, 0.0)


def _monotone(counts: Floats) -> Floats:
    """Counts from 0 on with the running sum nearest to that of `counts`: noise cancels (Hay et al., VLDB 2010)."""
    from scipy.optimize import isotonic_regression

    return np.maximum(np.diff(isotonic_regression(np.cumsum(counts)).x, prepend=0.0), 0.0)


def _draw(
    fine: list[Floats], joint: Floats, epsilon: float, count: int, stream: np.random.Generator
) -> tuple[Ints, Ints]:
    """`count` pairs of lengths: a cell of `joint` raked to both `fine` marginals, then a length inside by those."""
    places = [np.searchsorted(COARSE, FINE[:-1], side="right") - 1 for _ in fine]
    wide = [np.bincount(place, side, COARSE.size - 1) for place, side in zip(places, fine, strict=True)]
    # What noise alone would hardly ever reach in any cell; a little everywhere else, so that raking can go on.
    cells = np.where(joint > math.log(joint.size) / epsilon, joint, 0.0) + 1e-3
    for _ in range(50):
        cells *= (wide[0] / np.maximum(cells.sum(axis=1), _TINY))[:, None]
        cells *= wide[1] / np.maximum(cells.sum(axis=0), _TINY)
    chosen = np.unravel_index(stream.choice(cells.size, count, p=(cells / cells.sum()).ravel()), cells.shape)
    sides = []
    for cell, place, counts in zip(chosen, places, fine, strict=True):
        running = np.concatenate(([0.0], np.cumsum(counts)))
        first, last = np.searchsorted(place, cell), np.searchsorted(place, cell, side="right")
        at = running[first] + stream.random(count) * (running[last] - running[first])
        bin_ = np.clip(np.searchsorted(running, at, side="right") - 1, first, last - 1)
        low, high = FINE[bin_], FINE[bin_ + 1]
        sides.append(np.minimum(np.floor(low * (high / low) ** stream.random(count)), high - 1).astype(np.int64))
    return sides[0], sides[1]


def _moments(since_ns: Ints, span_s: int, total: float, epsilon: float, stream: np.random.Generator) -> Moments | None:
    """Rate and dispersion from noisy sums; None for a trace of less than a minute."""
    windows_s = [w for w in DISPERSION_WINDOWS_S if span_s // w >= MIN_WINDOWS]
    if not windows_s:
        return None
    found: dict[float, float] = {}
    for window_s in windows_s:
        count = span_s // window_s
        mean, middle = total / count, round(total / count)
        index = since_ns // (window_s * NS_PER_S)
        apart = np.bincount(index[index < count], minlength=count) - middle
        # A request more or less moves one window by one: the mean deviation by one, then the squares by the bound.
        deviation = float(_noisy(np.array([np.abs(apart).sum()]), 1, epsilon, stream)[0]) / count
        bound = math.ceil(DEVIATIONS * max(deviation, 0.0)) + DEVIATIONS
        squares = (np.clip(apart, -bound, bound) ** 2).sum()
        noisy = float(_noisy(np.array([squares]), 2 * bound + 1, epsilon, stream)[0])
        found[float(window_s)] = max((noisy / count - (mean - middle) ** 2) * count / (count - 1) / mean, 0.0)
    return Moments(total / span_s, float(span_s), found)
