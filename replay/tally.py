"""What a load worker says of itself while it runs and at its end, small enough for a line."""

import contextlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import msgspec

from replay.stream import GONE, Record

_RECENT = 100  # values of each kind in a message: it must fit into one atomic write to a pipe (4,096 bytes)
# Upper ends of a histogram's bins, ns: 16 an octave from 1 µs to 18 minutes, so that a quantile is told to 4.5 %.
_EDGES_NS = [round(1000 * 2 ** (i / 16)) for i in range(16 * 30 + 1)]


class Histogram:
    """Counts durations; its quantiles are bins' upper ends, its greatest value is exact."""

    def __init__(self, counts: Mapping[int, int] | None = None, greatest_ns: int = 0) -> None:
        """`counts`: by bin."""
        self.counts = dict(counts or {})
        self.greatest_ns = greatest_ns

    def add(self, duration_ns: int) -> None:
        """Count one."""
        place = bisect_left(_EDGES_NS, duration_ns)
        self.counts[place] = self.counts.get(place, 0) + 1
        self.greatest_ns = max(self.greatest_ns, duration_ns)

    def merge(self, other: "Histogram") -> None:
        """Count all of `other`'s too."""
        for place, count in other.counts.items():
            self.counts[place] = self.counts.get(place, 0) + count
        self.greatest_ns = max(self.greatest_ns, other.greatest_ns)

    def quantile_ns(self, q: float) -> int | None:
        """The least bin's end at or below which a share `q` lies; None where nothing was counted."""
        need = q * sum(self.counts.values())
        for place in sorted(self.counts):
            need -= self.counts[place]
            if need <= 0:
                return min(_EDGES_NS[min(place, len(_EDGES_NS) - 1)], self.greatest_ns)
        return None

    def summary_ms(self) -> dict[str, float] | None:
        """p50, p99 and max, ms; None where nothing was counted."""
        p50, p99 = self.quantile_ns(0.5), self.quantile_ns(0.99)
        if p50 is None or p99 is None:
            return None
        return {"p50": p50 / 1e6, "p99": p99 / 1e6, "max": self.greatest_ns / 1e6}

    def as_list(self) -> list[Any]:
        """What `from_list` takes; for JSON."""
        return [self.greatest_ns, [[place, count] for place, count in self.counts.items()]]

    @classmethod
    def from_list(cls, told: list[Any]) -> "Histogram":
        """The histogram that `as_list` told."""
        return cls(dict(told[1]), told[0])


class Tally:
    """Counts a worker's requests, and keeps a few recent figures between two messages."""

    def __init__(self) -> None:
        self.sent = self.begun = self.ended = self.errors = 0  # begun: the first token has come
        self.tokens = 0  # output tokens that have come
        self.gone = 0  # requests that found nobody where a server had answered before
        self.by_chunks = 0  # answers whose usage at the end proved that each chunk bore one token
        self.unsent = 0  # records of requests that a cap held back until the end
        self.due = 0
        self.stall_ns = 0  # the longest time that nothing was read, since the last message
        self.sending = Histogram()  # how long the sends took: a request left in between
        self.reading = Histogram()  # how long first tokens lay in the kernel before they were read
        self.unstamped = 0  # first tokens whose arrival the kernel did not say
        self.shared = 0  # first tokens that were read with later ones, and so have the last one's stamp
        self._lag_us: list[int] = []
        self._ttft_us: list[int] = []

    def send(self, record: Record) -> None:
        """A request has left."""
        assert record.sent_ns is not None
        self.sent += 1
        if len(self._lag_us) < _RECENT:
            self._lag_us.append((record.sent_ns - record.scheduled_ns) // 1000)

    def first_token(self, record: Record) -> None:
        """A request's first token has come."""
        self.begun += 1
        if len(self._ttft_us) < _RECENT and record.first_token_ns is not None and record.sent_ns is not None:
            self._ttft_us.append((record.first_token_ns - record.sent_ns) // 1000)

    def end(self, record: Record) -> None:
        """A request that was sent has ended."""
        self.ended += 1
        self.errors += record.status != "ok"
        self.gone += record.status == "connect_error" and (record.error or "").startswith(GONE)
        self.by_chunks += record.by_chunks

    def message(self, in_flight: Iterable[Record]) -> dict[str, Any]:
        """The state of the worker; the recent figures begin anew.

        Few of the requests `in_flight` are looked at: nothing is sent meanwhile, and they may be thousands.
        """
        recent = [record.chunk_ns for record in islice(in_flight, _RECENT)]
        gaps_us = [(times[-1] - times[-2]) // 1000 for times in recent if len(times) > 1]
        told = {
            "sent": self.sent, "begun": self.begun, "ended": self.ended, "errors": self.errors,
            "in_flight": self.sent - self.ended,
            "due": self.due, "gone": self.gone, "by_chunks": self.by_chunks, "output_tokens": self.tokens,
            "lag_us": self._lag_us, "ttft_us": self._ttft_us,
            "tbt_us": gaps_us, "stall_ns": self.stall_ns,
        }  # fmt: skip
        self._lag_us, self._ttft_us, self.stall_ns = [], [], 0
        return told

    def last_message(self, *, steps: int, stamp_error_ns: int | None) -> dict[str, Any]:
        """What is said at the end: the state, and how exact the times are.

        `steps`: of the wall clock; `stamp_error_ns`: of a stamp by the kernel, None where there were none.
        """
        return {
            **self.message(()), "done": True, "sending": self.sending.as_list(), "reading": self.reading.as_list(),
            "unstamped": self.unstamped, "shared": self.shared, "clock_steps": steps, "stamp_error_ns": stamp_error_ns,
        }  # fmt: skip


def tell(message: Mapping[str, Any], *, wait: bool = False) -> None:
    """Tell the parent; a message that its pipe does not take at once is dropped, unless told to `wait`."""
    os.set_blocking(1, wait)
    with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a parent that is late, or has left
        os.write(1, msgspec.json.encode(message) + b"\n")
