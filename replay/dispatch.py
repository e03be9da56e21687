"""The general path's open loop: each request leaves when the trace says, whatever became of those before it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from replay.clock import NS_PER_MS, SleepTimer, now_ns
from replay.workload import FOREVER_NS, Job, Workload

_SPARE_NS = 2 * NS_PER_MS  # making one request takes well under this


async def dispatch(work: Workload, send: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
    """Start `send(job)` as a task at each job's time; return when all have ended and none is left.

    Requests are made ahead while there is time to spare, so that a burst finds them ready. An exception in a task is a
    bug: it cancels the others and comes out as an `ExceptionGroup`. Cancelling the dispatch cancels all of them.
    """
    ended = asyncio.Event()
    open_ = 0

    def end(_: object) -> None:
        nonlocal open_
        open_ -= 1
        ended.set()

    with SleepTimer() as timer:
        async with asyncio.TaskGroup() as group:
            while True:
                due_ns = work.due_ns()
                if due_ns == FOREVER_NS:  # until a turn's think time begins
                    if not open_:
                        return
                    ended.clear()
                    await ended.wait()
                    continue
                while due_ns - now_ns() > _SPARE_NS and work.make_ahead():  # noqa: ASYNC110 - a turn for the others
                    await asyncio.sleep(0)
                if work.due_ns() > now_ns():
                    await timer.sleep_until_ns(work.due_ns())
                    continue  # meanwhile another one may have become due before
                open_ += 1
                group.create_task(send(work.pop())).add_done_callback(end)


class StallMeter:
    """Measures how late the event loop serves a timer: what the client's own delays can be at most."""

    def __init__(self, period_ns: int = 20 * NS_PER_MS) -> None:
        self._period_ns = period_ns
        self.worst_ns = 0  # whoever reads it sets it back

    async def run(self) -> None:
        """Sample until cancelled."""
        with SleepTimer() as timer:
            due_ns = now_ns()
            while True:
                due_ns = max(due_ns + self._period_ns, now_ns())
                await timer.sleep_until_ns(due_ns)
                self.worst_ns = max(self.worst_ns, now_ns() - due_ns)
