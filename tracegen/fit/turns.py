"""Turns and think times of sessions, from a trace that ends before all of them do.

A turn's next one is seen only if it comes before the trace ends: sessions look shorter than they are, and long think
times are missing. So each request counts for what it shows: its next turn after x s, or none within the c s that were
left. With a share p of requests that have a next one at all, after lognormal times with distribution F, that has the
likelihood p F'(x), or 1 - p F(c): a cure model (Berkson and Gage, JASA 47, 1952), the parametric sibling of Kaplan and
Meier's estimate, which knows nothing beyond the longest time seen. Requests in the middle of a session count as those
at its beginning do, so what was before the trace does no harm. The mean number of turns is 1 / (1 - p).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracegen.sessions import ASSUMED_NS_A_TOKEN

Floats = NDArray[np.float64]

SHORT = 0.25  # of the think times: only that they are no longer, for answers' lengths in time are assumed
LEAST_S = 1e-3  # no think time is taken to be shorter: their logarithms are fitted
# What `tracegen.sessions.Structure` takes.
LONGEST_S = 1e7
TURNS_LIMIT = 1000.0
SIGMA_RANGE = (0.01, 5.0)
FALSE_FIRSTS = 0.05  # of what look like first turns may be later ones whose parents came before the trace


@dataclass(frozen=True)
class Turns:
    """How sessions go on: the mean number of turns, and lognormal think times by their median and sigma."""

    mean: float
    think_s: float
    think_sigma: float

    def settled_s(self, output_tokens: float) -> float:
        """How long after the trace's start first turns are what they seem to be, but for `FALSE_FIRSTS` of them.

        Sessions begin at the share 1 - p of the rate of requests, and the share p (1 - F(t)) are later turns of which
        the parents came more than t s before.
        """
        from scipy.special import ndtri

        still = FALSE_FIRSTS / (1 - FALSE_FIRSTS) / max(self.mean - 1, 1e-9)  # of 1 - F(t)
        if still >= 1:
            return 0.0
        answer_s = output_tokens * ASSUMED_NS_A_TOKEN / 1e9
        return answer_s + self.think_s * math.exp(self.think_sigma * float(ndtri(1 - still)))


def fit_turns(think_s: Floats, left_s: Floats, children: float = 1.0) -> Turns:
    """The likeliest turns for `think_s` until the first next turn, and `left_s` of requests where none was seen.

    `children` are the mean next turns of a request that has any: more than one where chats branch.
    """
    from scipy.optimize import minimize
    from scipy.special import log_ndtr, ndtr

    logs = np.log(np.maximum(think_s, LEAST_S))
    left = np.log(left_s[left_s > LEAST_S])
    short = float(np.quantile(logs, SHORT))
    seen = logs[logs >= short]
    requests = think_s.size + left_s.size
    most = min(1 - 1 / TURNS_LIMIT, (1 - 1 / TURNS_LIMIT) / children)

    def cost(free: Floats) -> float:
        share, mu, sigma = free[0], free[1], math.exp(free[2])
        z = (seen - mu) / sigma
        at = -0.5 * float(z @ z) - seen.size * math.log(sigma)
        below = (logs.size - seen.size) * float(log_ndtr((short - mu) / sigma))
        gone = float(np.log1p(-share * ndtr((left - mu) / sigma)).sum())
        return -(at + below + logs.size * math.log(share) + gone) / requests

    widths = (math.log(SIGMA_RANGE[0]), math.log(SIGMA_RANGE[1]))
    bounds = [(1e-6, most), (math.log(LEAST_S), math.log(LONGEST_S)), widths]
    start = [think_s.size / requests, float(np.median(logs)), math.log(max(float(logs.std()), 0.05))]
    start = [min(max(x, low), high) for x, (low, high) in zip(start, bounds, strict=True)]
    share, mu, log_sigma = minimize(cost, np.array(start), method="L-BFGS-B", bounds=bounds).x.tolist()
    return Turns(min(1 / (1 - share * children), TURNS_LIMIT), math.exp(mu), math.exp(log_sigma))
