"""The run's clock, and a timer that keeps it to about 50 µs where event loops round to a millisecond.

Imports no asyncio: a load worker's memory is counted.
"""

import ctypes
import os
import sys
import time

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

now_ns = time.monotonic_ns  # all times are CLOCK_MONOTONIC nanoseconds, which no wall-clock step moves

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)  # TFD_NONBLOCK and TFD_CLOEXEC have the same values


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class TimerFd:
    """A file descriptor that becomes readable at a time; Linux alone has it."""

    available = sys.platform == "linux"

    def __init__(self) -> None:
        # os.timerfd_create is new in Python 3.13.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._spec = _Itimerspec()
        self._at = ctypes.byref(self._spec)

    def arm(self, when_ns: int) -> None:
        """Become readable at `when_ns`; what was armed before is forgotten."""
        value = self._spec.it_value
        value.tv_sec, value.tv_nsec = divmod(max(when_ns, 1), NS_PER_S)  # 0 would disarm it for ever
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, self._at, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def expired(self) -> bool:
        """Whether the time has come since it was armed last; then it is readable no more."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:  # armed anew since it was seen readable
            return False
        return True

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
