"""The open loop: each request leaves when the trace says, whatever became of those before it."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from replay.clock import NS_PER_MS, SleepTimer, now_ns

_LOOKAHEAD = 256  # bodies built ahead of their send time
_SPARE_NS = 2 * NS_PER_MS  # building one body takes well under this


async def dispatch(
    scheduled_ns: Sequence[int],
    prepare: Callable[[int], bytes],
    send: Callable[[int, bytes], Coroutine[Any, Any, None]],
) -> None:
    """Start `send(i, prepare(i))` as a task at each of the non-decreasing `scheduled_ns`; return when all have ended.

    Bodies are prepared ahead while there is time to spare, so that a burst finds them ready. An exception in a task is
    a bug: it cancels the others and comes out as an `ExceptionGroup`. Cancelling the dispatch cancels all of them.
    """
    ready: deque[bytes] = deque()
    prepared = 0
    with SleepTimer() as timer:
        async with asyncio.TaskGroup() as group:
            for i, due_ns in enumerate(scheduled_ns):
                while prepared < min(i + _LOOKAHEAD, len(scheduled_ns)) and (
                    prepared <= i or due_ns - now_ns() > _SPARE_NS
                ):
                    ready.append(prepare(prepared))
                    prepared += 1
                    # Preparing must not hold up the streams that are being read.
                    await asyncio.sleep(0)
                if due_ns > now_ns():
                    await timer.sleep_until_ns(due_ns)
                group.create_task(send(i, ready.popleft()))


class StallMeter:
    """Measures how late the event loop serves a timer: what the client's own delays can be at most."""

    def __init__(self, period_ns: int = 20 * NS_PER_MS) -> None:
        self._period_ns = period_ns
        self.late_ns: list[int] = []

    async def run(self) -> None:
        """Sample until cancelled."""
        with SleepTimer() as timer:
            due_ns = now_ns()
            while True:
                due_ns = max(due_ns + self._period_ns, now_ns())
                await timer.sleep_until_ns(due_ns)
                self.late_ns.append(now_ns() - due_ns)
