"""A run's live figures for Prometheus: `http://127.0.0.1:PORT/metrics`, in its text format (version 0.0.4).

Units are Prometheus' base units, so seconds and hertz. What has not been measured has no sample.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import NamedTuple, Self

from replay.clock import NS_PER_S
from replay.live import Progress, Snapshot
from tracegen.errors import ReplayError

HOST = "127.0.0.1"
_REQUEST_BYTES = 8192  # a scraper's head is a few hundred bytes
_REQUEST_S = 5.0  # a scraper that says nothing is not waited for


class Metric(NamedTuple):
    """One metric and where its value is in a snapshot."""

    name: str
    kind: str  # counter | gauge
    meaning: str
    read: Callable[[Snapshot], float | None] | str  # the value; or of what the two percentiles are


METRICS = (
    Metric("wattrace_simulated", "gauge", "1: engine and power are SIMULATED", lambda s: s.simulated),
    Metric("wattrace_elapsed_seconds", "gauge", "since the trace's start", lambda s: s.elapsed_ns / NS_PER_S),
    Metric("wattrace_planned_seconds", "gauge", "length of the trace", lambda s: s.planned_ns / NS_PER_S),
    Metric("wattrace_planned_requests", "gauge", "requests of the trace", lambda s: s.planned),
    Metric("wattrace_sent_requests_total", "counter", "requests sent", lambda s: s.sent),
    Metric("wattrace_ended_requests_total", "counter", "requests that ended, well or not", lambda s: s.ended),
    Metric("wattrace_failed_requests_total", "counter", "requests that ended in an error", lambda s: s.errors),
    Metric("wattrace_in_flight_requests", "gauge", "requests that have not ended", lambda s: s.sent - s.ended),
    Metric("wattrace_target_requests_per_second", "gauge", "what the trace asks for now", lambda s: s.target_rps),
    Metric("wattrace_sent_requests_per_second", "gauge", "what is sent now", lambda s: s.sent_rps),
    Metric("wattrace_dispatch_lag_seconds", "gauge", "send minus schedule, recent requests", "lag"),
    Metric("wattrace_ttft_seconds", "gauge", "first token minus send, recent requests", "ttft"),
    Metric("wattrace_tbt_seconds", "gauge", "time between tokens, recent ones", "tbt"),
    Metric("wattrace_output_tokens_per_second", "gauge", "output tokens now", lambda s: s.output_tokens_per_s),
    Metric("wattrace_power_watts", "gauge", "power of the serving GPUs", lambda s: s.watts),
    Metric("wattrace_joules_per_output_token", "gauge", "power by token rate, now", lambda s: s.joules_per_token),
    Metric(
        "wattrace_sm_clock_hertz", "gauge", "SM clock, where all serving GPUs have the same",
        lambda s: None if s.clock_mhz is None else s.clock_mhz * 1e6,
    ),
)  # fmt: skip


def _samples(metric: Metric, snapshot: Snapshot) -> Iterator[str]:
    """The lines of what has been measured."""
    if isinstance(metric.read, str):
        for quantile, suffix in (("0.5", "p50"), ("0.99", "p99")):
            ns = getattr(snapshot, f"{metric.read}_{suffix}_ns")
            if ns is not None:
                yield f'{metric.name}{{quantile="{quantile}"}} {ns / NS_PER_S!r}'
    elif (value := metric.read(snapshot)) is not None:
        yield f"{metric.name} {float(value)!r}"


def exposition(snapshot: Snapshot | None) -> str:
    """`snapshot` in Prometheus' text format; None, before the run has begun: no samples."""
    lines = []
    for metric in METRICS:
        lines += [f"# HELP {metric.name} {metric.meaning}", f"# TYPE {metric.name} {metric.kind}"]
        lines += () if snapshot is None else _samples(metric, snapshot)
    return "\n".join(lines) + "\n"


class WatchedProgress:
    """A progress whose latest state others can read."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.latest: Snapshot | None = None

    def __enter__(self) -> Self:
        """Begin."""
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._progress.__exit__(kind, error, trace)

    def say(self, message: str) -> None:
        """A line that stays."""
        self._progress.say(message)

    def warn(self, message: str) -> None:
        """A line that must be seen."""
        self._progress.warn(message)

    def status(self, message: str) -> None:
        """A line that the next one replaces."""
        self._progress.status(message)

    def update(self, snapshot: Snapshot) -> None:
        """The run's state."""
        self.latest = snapshot
        self._progress.update(snapshot)


@asynccontextmanager
async def serve_metrics(port: int | None, progress: WatchedProgress) -> AsyncIterator[None]:
    """Answer scrapes at `port` of this host for as long as the context lasts; None: do not.

    Raises `ReplayError` when the port cannot be had.
    """
    if port is None:
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(head, progress.latest))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a scraper that breaks off is no matter of the run's
        finally:
            writer.close()

    try:
        server = await asyncio.start_server(answer, HOST, port, limit=_REQUEST_BYTES)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ReplayError(f"--prometheus-port {port}: cannot be had on {HOST} ({why}); choose another") from None
    async with server:
        progress.say(f"metrics at http://{HOST}:{server.sockets[0].getsockname()[1]}/metrics")
        yield


def _answer(head: bytes, snapshot: Snapshot | None) -> bytes:
    """The whole HTTP answer to a request."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    method, target = words[0], words[1].split(b"?")[0] if len(words) > 1 else b""
    if target != b"/metrics":
        status, body = "404 Not Found", b"see /metrics\n"
    elif method not in {b"GET", b"HEAD"}:
        status, body = "405 Method Not Allowed", b"use GET\n"
    else:
        status, body = "200 OK", exposition(snapshot).encode()
    lines = [
        f"HTTP/1.1 {status}", "Content-Type: text/plain; version=0.0.4; charset=utf-8",
        f"Content-Length: {len(body)}", "Connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + (b"" if method == b"HEAD" else body)
