"""What is said while a run goes on."""

import asyncio
import contextlib

from replay import watchers
from replay.watchers import warn_of_server

S = 1_000_000_000


class Workers:
    """Load workers that tell, look after look, how many requests found nobody."""

    def __init__(self, gone):
        self._gone = iter(gone)

    def total(self, name):
        assert name == "gone"
        with contextlib.suppress(StopIteration):
            return next(self._gone)
        raise asyncio.CancelledError


class Said:
    def __init__(self):
        self.lines = []

    def warn(self, message):
        self.lines.append(message)


def test_a_server_that_went_away_is_told_at_once_and_then_now_and_then(monkeypatch):
    """A request fails every second, looks come twice a second; 30 s lie between two warnings."""
    now = [100 * S]

    async def sleep(_):
        now[0] += S // 2

    monkeypatch.setattr(watchers, "now_ns", lambda: now[0])
    monkeypatch.setattr(watchers.asyncio, "sleep", sleep)
    said = Said()
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(warn_of_server(Workers([0, 0, *(1 + i // 2 for i in range(130))]), said))
    counts = [line.removeprefix("the server went away: ").split(" found")[0] for line in said.lines]
    assert counts == ["1 request", "31 requests", "61 requests"]
