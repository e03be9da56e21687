"""Points of stationary processes of unit rate in [0, length), ascending, each from a random stream of its own.

`RatePath.times_s` places them on the clock. Nothing is rescaled to fill the stretch, so counts keep their variance.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S

Floats = NDArray[np.float64]
CV_RANGE = (0.05, 30.0)  # of gaps; beyond, shapes are so extreme that sums of doubles lose the small gaps


def poisson_arrivals_ns(rate_rps: float, duration_ns: int, stream: np.random.Generator) -> NDArray[np.int64]:
    """Times of a Poisson process of `rate_rps` requests/s in [0, `duration_ns`), ascending; possibly none.

    The count is itself Poisson, so it varies from seed to seed: a fixed count, or gaps rescaled to fill the window,
    would lose the variance that makes queues. Given the count, the times of a Poisson process are independent and
    uniform, which in whole nanoseconds is exact.
    """
    count = stream.poisson(rate_rps * duration_ns / NS_PER_S)
    return np.sort(stream.integers(0, duration_ns, count, dtype=np.int64))


def poisson_points(length: float, stream: np.random.Generator) -> Floats:
    """A Poisson process."""
    return np.sort(stream.random(stream.poisson(length))) * length


def constant_points(length: float, before: float) -> Floats:
    """Every whole number of a count that stood at `before` at the start: equal gaps, over windows too."""
    first = math.ceil(before)
    return np.arange(first, math.ceil(before + length), dtype=np.float64) - before


def gamma_points(length: float, stream: np.random.Generator, cv: float) -> Floats:
    """A renewal process with gamma gaps of mean 1 and coefficient of variation `cv`; vLLM's burstiness is 1/cv².

    It starts in equilibrium: the first point comes a uniform part of a length-biased gap after 0 (Cox, Renewal Theory,
    1962, section 5.2), so the rate is 1 from the start and in each window.
    """
    shape = 1 / cv**2
    first = stream.random() * stream.standard_gamma(shape + 1) / shape
    return _renewal(first, lambda count: stream.standard_gamma(shape, count) / shape, length, cv)


def weibull_points(length: float, stream: np.random.Generator, cv: float) -> Floats:
    """A renewal process with Weibull gaps of mean 1 and coefficient of variation `cv`, in equilibrium at 0."""
    shape = weibull_shape(cv)
    scale = 1 / math.gamma(1 + 1 / shape)
    first = stream.random() * scale * stream.standard_gamma(1 + 1 / shape) ** (1 / shape)
    return _renewal(first, lambda count: scale * stream.weibull(shape, count), length, cv)


def weibull_shape(cv: float) -> float:
    """The shape of the Weibull distribution with this coefficient of variation."""
    from scipy.optimize import brentq

    def excess(shape: float) -> float:
        log_ratio = math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)
        return log_ratio - math.log1p(cv**2)

    return float(brentq(excess, 0.05, 100.0))


def _renewal(first: float, gaps: Callable[[int], Floats], length: float, cv: float) -> Floats:
    """Points from `first` on, `gaps` apart, below `length`."""
    points = np.array([first])
    while points[-1] < length:
        left = length - points[-1]
        # Six deviations more than are expected: one draw is nearly always enough.
        more = points[-1] + np.cumsum(gaps(math.ceil(left + 6 * cv * math.sqrt(left) + 10)))
        points = np.concatenate((points, more))
    return points[: np.searchsorted(points, length)]
