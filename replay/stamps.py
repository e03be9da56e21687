"""When bytes came, by the kernel's own stamp (`SO_TIMESTAMPNS`), on the run's monotonic clock.

With it the time between a packet's arrival and our reading it is in no figure. The kernel stamps in wall time, which
differs from monotonic time by a constant until somebody steps the wall clock: both follow the same corrections of
frequency. A step is seen before the stamps that it moved are used; those few give way to the time of reading.
"""

import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence

from replay.timerfd import NS_PER_S, now_ns

# Python's socket module names neither; the values are those of Linux on all its usual architectures.
_SO_TIMESTAMPNS = 35
_TOLERANCE_NS = 5000  # more than the two clocks are read apart, less than matters
_TRIES = 16
ANCILLARY_BYTES = socket.CMSG_SPACE(16) if hasattr(socket, "CMSG_SPACE") else 0

_split = struct.Struct("@qq").unpack


class ArrivalClock:
    """Turns the kernel's stamps into monotonic time."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        """`wall_ns`: how the wall clock is read."""
        self._wall_ns = wall_ns
        self.steps = 0  # how often the wall clock was stepped
        self.error_ns = 0  # of a converted stamp, at most
        self._offset_ns = 0
        self._measure()

    def _bracket(self) -> tuple[int, int]:
        """Between which bounds wall time less monotonic time lies."""
        before_ns = now_ns()
        wall_ns = self._wall_ns()
        return wall_ns - now_ns(), wall_ns - before_ns

    def _measure(self) -> None:
        low, high = min((self._bracket() for _ in range(_TRIES)), key=lambda found: found[1] - found[0])
        self._offset_ns, self.error_ns = (low + high) // 2, (high - low + 1) // 2

    def sound(self, t_ns: int) -> bool:
        """Whether stamps taken since the last call can be used; `t_ns`: now. Call it before packets are read."""
        late_ns = self._wall_ns() - t_ns - self._offset_ns
        if -_TOLERANCE_NS < late_ns < _TOLERANCE_NS:
            return True
        low, high = self._bracket()  # either we were held up between the two clocks, or one was set
        if low - _TOLERANCE_NS <= self._offset_ns <= high + _TOLERANCE_NS:
            return True
        self.steps += 1
        self._measure()
        return False

    def arrival_ns(self, ancillary: Sequence[tuple[int, int, bytes]]) -> int | None:
        """When the data that came with `ancillary` arrived; None where the kernel does not say."""
        if not ancillary or ancillary[0][1] != _SO_TIMESTAMPNS:
            return None
        seconds, nanoseconds = _split(ancillary[0][2])
        return int(seconds * NS_PER_S + nanoseconds - self._offset_ns)


def ask_for_stamps(sock: socket.socket) -> bool:
    """Have the kernel stamp what `sock` receives; whether it will: from a moment after the first socket asked on."""
    if sys.platform != "linux" or struct.calcsize("@l") != 8:
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True
