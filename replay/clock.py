"""One monotonic clock, and sleeping on it to about 50 µs.

asyncio's own timers wake on `epoll_wait`'s millisecond grid; a timerfd does not. All times are `CLOCK_MONOTONIC`
nanoseconds, which no wall-clock step moves.
"""

import asyncio
import ctypes
import os
import sys
import time
from types import TracebackType
from typing import Self

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

now_ns = time.monotonic_ns

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)  # TFD_NONBLOCK and TFD_CLOEXEC have the same values


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class SleepTimer:
    """Lets one task at a time sleep until an absolute time; use it as a context manager inside a running loop."""

    def __init__(self) -> None:
        self._fd = -1
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        """Open the timerfd; elsewhere than on Linux the loop's own timer is all there is."""
        if sys.platform == "linux":
            # os.timerfd_create is new in Python 3.13.
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            asyncio.get_running_loop().add_reader(self._fd, self._expired)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the timerfd."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def sleep_until_ns(self, when_ns: int) -> None:
        """Return at `when_ns`, or at once when that has passed (the loop still gets its turn)."""
        delay_ns = when_ns - now_ns()
        if delay_ns <= 0:
            await asyncio.sleep(0)
        elif self._fd < 0:
            await asyncio.sleep(delay_ns / NS_PER_S)
        else:
            self._arm(when_ns)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _arm(self, when_ns: int) -> None:
        seconds, nanoseconds = divmod(when_ns, NS_PER_S)
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, nanoseconds))
        if self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed anew since: what is waited for now has not come yet
            return
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
