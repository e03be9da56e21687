"""The load workers of a run, seen from the replayer: started before the first request, then summed up."""

import asyncio
import contextlib
import errno
import os
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec

from replay.child import Child
from replay.tally import Histogram
from replay.workload import Begin, Config
from tracegen.errors import ReplayError

_RECENT = 1000  # values of each kind that the live figures look back on


class WorkerBugError(Exception):
    """A bug in a load worker; the message is its traceback."""


class LoadWorkers:
    """Sends a run's requests, in processes of their own, while this async context lasts."""

    def __init__(self, configs: Sequence[Config]) -> None:
        """A worker for each of `configs`."""
        self._configs = configs
        self._children = [Child("replay.worker", config.run_dir, config.worker) for config in configs]
        self._latest: list[dict[str, Any]] = [{} for _ in configs]
        self.lag_us: deque[int] = deque(maxlen=_RECENT)
        self.ttft_us: deque[int] = deque(maxlen=_RECENT)
        self.tbt_us: deque[int] = deque(maxlen=_RECENT)
        self.stall_ns = array("q")  # four a second from each
        self.died: str | None = None  # which worker was killed

    async def __aenter__(self) -> Self:
        """Start all, and wait until they are ready. Raises `ReplayError` when one cannot be."""
        starting = [child.start(msgspec.json.encode(c)) for child, c in zip(self._children, self._configs, strict=True)]
        try:
            for first in await asyncio.gather(*starting):
                self._check(first or {"error": errno.ECHILD, "why": "it did not start"})
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End what still runs; in-flight requests are given up, and on record."""
        await self.stop()

    def begin(self, epoch_ns: int) -> None:
        """The trace's time 0 is at `epoch_ns`."""
        for child in self._children:
            child.tell(msgspec.json.encode(Begin(epoch_ns)))

    async def wait(self) -> None:
        """Return when all requests have ended, or a worker was killed (`died` says which).

        Raises `OSError` when a log cannot be written, `WorkerBugError` for a bug.
        """
        following = [asyncio.create_task(self._follow(number)) for number in range(len(self._children))]
        try:
            for ended in asyncio.as_completed(following):
                await ended
                if self.died is not None:
                    return
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def stop(self) -> None:
        """Have the workers give up what is in flight, write their records and end."""
        for child in self._children:
            child.close()
        for number, child in enumerate(self._children):
            for message in await child.stop():
                with contextlib.suppress(ReplayError, WorkerBugError, OSError):  # the first one was raised
                    self._take(number, message)

    async def _follow(self, number: int) -> None:
        """Take what a worker says, to its end."""
        async for message in self._children[number].messages():
            self._take(number, message)
        if not self._latest[number].get("done"):
            process = self._children[number].process
            code = await process.wait() if process is not None else None
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
            self.died = f"load worker {number} ended {how}: requests that were its own have no record, or were not sent"

    def _take(self, number: int, message: dict[str, Any]) -> None:
        self._check(message)
        self._latest[number] = message
        self.lag_us.extend(message["lag_us"])
        self.ttft_us.extend(message["ttft_us"])
        self.tbt_us.extend(message["tbt_us"])
        self.stall_ns.append(message["stall_ns"])

    @staticmethod
    def _check(message: dict[str, Any]) -> None:
        """Raise what a worker says has gone wrong."""
        if "disk" in message:
            raise OSError(message["disk"], os.strerror(message["disk"]))
        if "error" in message:
            raise ReplayError(f"a load worker cannot send: {message['why']}")
        if "bug" in message:
            raise WorkerBugError(message["bug"])

    def total(self, name: str) -> int:
        """A count summed over the workers: `sent`, `begun`, `ended`, `errors`, `gone`, `in_flight`, `output_tokens`."""
        return sum(message.get(name, 0) for message in self._latest)

    def client_error(self) -> dict[str, Any]:
        """How exact the client's own times are, for the manifest.

        `ttft_ms`: how far a TTFT may be off, p50, p99 and max over the requests, None where nothing was measured.
        `source` says how that is known. With the kernel's stamps a request left somewhere between the beginning and
        the end of its `send`, and its first token came when the stamp says; `read_delay_ms` is how long first tokens
        lay there before they were read, which is in no figure. Without them a first token may have lain as long as the
        event loop was held up at worst. `by_chunks`: answers whose usage came at the end only, and proved that each
        chunk bore one token.
        """
        by_chunks = self.total("by_chunks")
        sending, reading, error_ns = Histogram(), Histogram(), 0
        for message in self._latest:
            sending.merge(Histogram.from_list(message.get("sending", [0, []])))
            reading.merge(Histogram.from_list(message.get("reading", [0, []])))
            told = message.get("stamp_error_ns", 0)
            error_ns = -1 if told is None else max(error_ns, told)
        if error_ns < 0:
            stalls = Histogram()
            for stall_ns in self.stall_ns:
                stalls.add(stall_ns)
            return {"ttft_ms": stalls.summary_ms(), "source": "loop stall", "by_chunks": by_chunks}
        bound = sending.summary_ms()
        return {
            "ttft_ms": None if bound is None else {q: ms + error_ns / 1e6 for q, ms in bound.items()},
            "source": "kernel stamps",
            "read_delay_ms": reading.summary_ms(),
            "unstamped": self.total("unstamped"),
            "shared": self.total("shared"),
            "wall_clock_steps": self.total("clock_steps"),
            "by_chunks": by_chunks,
        }


@contextmanager
def yielding() -> Iterator[None]:
    """Let the load workers go first: this process keeps tables and a display meanwhile, which can wait.

    All its threads become `SCHED_BATCH`, which no waking worker waits for, and then what they were; where that is not
    allowed (back to a real-time policy needs a privilege) they stay so.
    """
    if not hasattr(os, "SCHED_BATCH"):
        yield
        return
    before = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            thread = int(task.name)
            before[thread] = os.sched_getscheduler(thread), os.sched_getparam(thread)
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        own = before[threading.get_native_id()]  # what threads that have begun meanwhile would have had
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(task.name), *before.get(int(task.name), own))
