"""Sleeping on the run's clock in an event loop, to about 50 µs.

asyncio's own timers wake on `epoll_wait`'s millisecond grid; a timerfd does not.
"""

import asyncio
from types import TracebackType
from typing import Self

from replay.timerfd import NS_PER_MS, NS_PER_S, TimerFd, now_ns

__all__ = ["NS_PER_MS", "NS_PER_S", "SleepTimer", "now_ns"]


class SleepTimer:
    """Lets one task at a time sleep until an absolute time; use it as a context manager inside a running loop."""

    def __init__(self) -> None:
        self._timer: TimerFd | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        """Open the timerfd; elsewhere than on Linux the loop's own timer is all there is."""
        if TimerFd.available:
            self._timer = TimerFd()
            asyncio.get_running_loop().add_reader(self._timer.fd, self._expired)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the timerfd."""
        if self._timer is not None:
            asyncio.get_running_loop().remove_reader(self._timer.fd)
            self._timer.close()
            self._timer = None

    async def sleep_until_ns(self, when_ns: int) -> None:
        """Return at `when_ns`, or at once when that has passed (the loop still gets its turn)."""
        delay_ns = when_ns - now_ns()
        if delay_ns <= 0:
            await asyncio.sleep(0)
        elif self._timer is None:
            await asyncio.sleep(delay_ns / NS_PER_S)
        else:
            self._timer.arm(when_ns)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _expired(self) -> None:
        assert self._timer is not None
        if self._timer.expired() and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
