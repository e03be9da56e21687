"""The opt-in caps on sending, which close the open loop and are reported as doing so."""

import asyncio
import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncio_throttle import Throttler  # type: ignore[attr-defined]  # exported without saying so


class Caps:
    """Bounds requests in flight and requests a second.

    They act after the scheduled time, so what they hold back shows as lag.
    """

    def __init__(self, max_concurrency: int | None, max_rate_rps: float | None) -> None:
        self._slots = asyncio.Semaphore(max_concurrency or sys.maxsize)
        # The throttler's waiters poll and are not first-come first-served; a lock lets one wait at a time.
        self._turn = asyncio.Lock()
        self._throttler = None
        if max_rate_rps is not None:
            requests = math.ceil(max_rate_rps)  # the throttler counts whole requests; the period makes it exact
            self._throttler = Throttler(requests, requests / max_rate_rps)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Wait for the turn, and hold a slot for as long as this context lasts."""
        async with self._slots:
            if self._throttler is not None:
                async with self._turn, self._throttler:
                    pass
            yield
