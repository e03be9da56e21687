"""Whether a cell is clearly saturated, while it still runs.

The verdict `saturated` (`replay.verdicts.saturation`) calls a run saturated when the requests that wait grow by more
than 5 % of the arrivals. To end a cell early they must grow four times as fast, over all that was sent and over the
latter half of it, so that a burst that is being worked off does not end a cell.
"""

from dataclasses import dataclass, field

import numpy as np

from replay.verdicts import BACKLOG_GROWTH_BOUND, percent

GROWTH_BOUND = 4 * BACKLOG_GROWTH_BOUND
LEAST_SENT = 100  # requests; of fewer the chance arrivals of one minute decide
LEAST_WAITING = 30
LEAST_SHARE = 0.25  # of the trace's requests: its first quarter may be unlike the rest
_LEAST_LOOKS = 8


@dataclass
class Backlog:
    """How many requests waited at each look."""

    _at_s: list[float] = field(default_factory=list)
    _sent: list[int] = field(default_factory=list)
    _waiting: list[int] = field(default_factory=list)

    def look(self, at_s: float, sent: int, planned: int, waiting: int) -> str | None:
        """Why to stop, where the run is clearly saturated.

        `at_s`: time since the first request, `sent` of `planned` requests were, and of those `waiting` wait.
        """
        self._at_s.append(at_s)
        self._sent.append(sent)
        self._waiting.append(waiting)
        early = sent < max(LEAST_SENT, LEAST_SHARE * planned) or waiting < LEAST_WAITING or sent >= planned
        if early or len(self._at_s) < _LEAST_LOOKS:
            return None
        whole, latter = self._growth(0), self._growth(len(self._at_s) // 2)
        if min(whole, latter) <= GROWTH_BOUND:
            return None
        return (
            f"stopped early, clearly saturated: {waiting:,} of {sent:,} requests sent waited after {at_s:.0f} s, "
            f"growing by {percent(latter)} of arrivals (bound {percent(GROWTH_BOUND)})"
        )

    def _growth(self, first: int) -> float:
        """Growth of the backlog as a share of the arrivals, from look `first` on (least squares, as the verdict)."""
        at_s, sent = np.array(self._at_s[first:]), self._sent[first:]
        if sent[-1] == sent[0] or at_s[-1] <= at_s[0]:
            return 0.0
        slope = np.polyfit(at_s - at_s[0], self._waiting[first:], 1)[0]
        return float(slope * (at_s[-1] - at_s[0]) / (sent[-1] - sent[0]))
