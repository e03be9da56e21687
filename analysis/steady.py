"""The part of a run in which the load is steady: without the ramp-up at its beginning and the thinning at its end.

The series is the mean number of requests in flight (sent, last token not yet there) in equal spans between the first
and the last send; what comes after the last send is drain, in an open loop by definition. From either end MSER cuts
what makes the mean of the rest less certain (White, "An effective truncation heuristic for bias reduction in simulation
output", Simulation 69(6), 1997; on batch means as in MSER-5, White, Cobb and Spratt, WSC 2000): the cut d minimises
Σ (x_i - mean)² / (n - d)² over i >= d. As its authors do, a minimum in the second half is taken to mean that the series
does not settle. What is left must not have a trend.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress

NS_PER_S = 1e9
METHOD = "MSER on batch means of the requests in flight, from both ends"
SPANS = 200
FEWEST_REQUESTS = 50  # so few make no series
FEWEST_STAYS = 10  # lengths of the window in mean times in flight: a ramp-up alone takes one or two
TREND_BATCHES = 10
TREND_REL = 0.25  # growth over the window, of its mean, that is no longer steady where it is also significant
TREND_P = 0.01
GROWS = 0.75  # of the batches have more in flight than the one before, where a queue grows throughout

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Steady:
    """The steady window on the clock of the times given, or `why` there is none; seconds count from the first send."""

    start_ns: int | None
    end_ns: int | None
    start_s: float | None
    end_s: float | None
    sent_s: float  # from the first send to the last
    in_flight: float | None  # mean in the window
    why: str | None = None
    method: str = METHOD

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


def find_steady(sent_ns: Ints, gone_ns: Ints) -> Steady:
    """The steady window of requests in flight from `sent_ns` to `gone_ns` (n,), in any order."""
    if sent_ns.size < FEWEST_REQUESTS:
        return _none(0.0, f"{sent_ns.size} requests are too few to tell (at least {FEWEST_REQUESTS})")
    zero_ns = int(sent_ns.min())
    sent_s, gone_s = (np.sort(times - zero_ns) / NS_PER_S for times in (sent_ns, gone_ns))
    last_s = float(sent_s[-1])
    if last_s <= 0:
        return _none(0.0, "all requests were sent at one moment")
    edges_s = np.linspace(0.0, last_s, SPANS + 1)
    in_flight = np.diff(elapsed(sent_s, edges_s) - elapsed(gone_s, edges_s)) / (last_s / SPANS)
    stay_s = float(np.mean(gone_s) - np.mean(sent_s))
    if last_s < FEWEST_STAYS * stay_s:
        short = (
            f"requests were sent for {last_s:.0f} s, less than {FEWEST_STAYS} times the {stay_s:.1f} s that one is in "
            "flight on average"
        )
        grows = _growth(in_flight, sent_s, gone_s)
        return _none(last_s, f"{grows}; {short}" if grows else f"{short}: a longer run would tell")
    head, tail = mser(in_flight), mser(in_flight[::-1])
    if head is None or tail is None or head + tail > SPANS // 2:
        return _none(last_s, _unsettled(in_flight, sent_s, gone_s))
    kept = in_flight[head : SPANS - tail]
    if trend(kept):
        return _none(last_s, _unsettled(kept, sent_s, gone_s))
    start_s, end_s = float(edges_s[head]), float(edges_s[SPANS - tail])
    start_ns = zero_ns + round(start_s * NS_PER_S)
    end_ns = zero_ns + round(end_s * NS_PER_S) + (tail == 0)  # the last send itself is in it
    return Steady(start_ns, end_ns, start_s, end_s, last_s, float(kept.mean()))


def mser(series: Floats) -> int | None:
    """How many entries at the beginning of `series` MSER cuts; None where the minimum is in its second half."""
    n = series.size
    left = n - np.arange(n)
    total = np.cumsum(series[::-1])[::-1]
    squares = np.cumsum(((series - series.mean()) ** 2)[::-1])[::-1]  # around one mean, so that nothing cancels
    around = squares - left * (total / left - series.mean()) ** 2
    cut = int(np.argmin((np.maximum(around, 0.0) / left**2)[: 3 * n // 4 + 1]))  # a few at the end are alike by chance
    return cut if cut <= n // 2 else None


def trend(series: Floats) -> bool:
    """Whether `series` grows or falls by more than `TREND_REL` of its mean, and not by chance (batch means)."""
    means = np.array([batch.mean() for batch in np.array_split(series, TREND_BATCHES)])
    if np.ptp(means) == 0:
        return False
    fit = linregress(np.arange(TREND_BATCHES), means)
    growth = float(fit.slope) * TREND_BATCHES
    return bool(abs(growth) > TREND_REL * means.mean() and fit.pvalue < TREND_P)


def elapsed(times_s: Floats, edges_s: Floats, weights: Floats | None = None) -> Floats:
    """At each edge the seconds that have passed since each of the sorted `times_s`, summed, times their `weights`."""
    weights = np.ones(times_s.size) if weights is None else weights
    count = np.searchsorted(times_s, edges_s, "right")
    many, since = (np.concatenate([[0.0], np.cumsum(values)])[count] for values in (weights, weights * times_s))
    total: Floats = many * edges_s - since
    return total


def _unsettled(in_flight: Floats, sent_s: Floats, gone_s: Floats) -> str:
    """Why there is no steady state, in words."""
    return _growth(in_flight, sent_s, gone_s) or f"the load does not settle ({_thirds(in_flight)})"


def _growth(in_flight: Floats, sent_s: Floats, gone_s: Floats) -> str | None:
    """That the queue grows throughout, in words; None where it does not."""
    means = np.array([batch.mean() for batch in np.array_split(in_flight, TREND_BATCHES)])
    if np.mean(np.diff(means) > 0) < GROWS:
        return None
    sent = sent_s.size / sent_s[-1]
    ended = np.searchsorted(gone_s, sent_s[-1], "right") / sent_s[-1]
    return f"the queue grows throughout ({_thirds(in_flight)}): {sent:.3g} requests/s are sent and {ended:.3g} end"


def _thirds(in_flight: Floats) -> str:
    third = max(1, in_flight.size // 3)
    first, last = float(in_flight[:third].mean()), float(in_flight[-third:].mean())
    return f"{first:,.1f} requests in flight in its first third, {last:,.1f} in its last"


def _none(sent_s: float, why: str) -> Steady:
    return Steady(None, None, None, None, sent_s, None, f"no steady state: {why}")
