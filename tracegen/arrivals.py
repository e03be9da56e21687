"""Arrival times. Each model takes a mean rate, a window and a random stream, and returns the times in that window."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S

ArrivalModel = Callable[[float, int, np.random.Generator], NDArray[np.int64]]


def poisson_arrivals_ns(rate_rps: float, duration_ns: int, stream: np.random.Generator) -> NDArray[np.int64]:
    """Times of a Poisson process of `rate_rps` requests/s in [0, `duration_ns`), ascending; possibly none.

    The count is itself Poisson, so it varies from seed to seed: a fixed count, or gaps rescaled to fill the window,
    would lose the variance that makes queues. Given the count, the times of a Poisson process are independent and
    uniform, which in whole nanoseconds is exact.
    """
    count = stream.poisson(rate_rps * duration_ns / NS_PER_S)
    return np.sort(stream.integers(0, duration_ns, count, dtype=np.int64))


ARRIVALS: dict[str, ArrivalModel] = {"poisson": poisson_arrivals_ns}
