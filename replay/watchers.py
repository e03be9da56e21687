"""What goes on beside the sending: the live figures, and the care that nothing disturbs it or fails unseen."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from replay.clock import NS_PER_S, now_ns
from replay.cut import Due
from replay.gpu.sampler import Sampler
from replay.live import Progress, Snapshot
from replay.stream import GONE
from replay.verdicts import CLOCK_TOLERANCE_MHZ, throttle_reasons
from replay.workers import LoadWorkers
from tracegen.console import plural

_REDRAW_S = 0.25
_STATUS_S = 0.5  # the sampler's own period of telling
_OFF_STATUSES = 4  # off the clock for 2 s: longer than a lock takes to settle
_GONE_NS = 30 * NS_PER_S  # between two warnings of a server that went away
_RATE_S = 5.0  # the live token rate looks back so far


@asynccontextmanager
async def background(
    coroutines: Sequence[Coroutine[Any, Any, None]], sending: asyncio.Task[None]
) -> AsyncIterator[None]:
    """Run `coroutines` beside the sending; one that fails is a bug and ends it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            sending.cancel()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def show(
    epoch_ns: int,
    due: Due,
    serving: Sequence[int],
    workers: LoadWorkers,
    sampler: Sampler | None,
    progress: Progress,
    *,
    simulated: bool,
) -> None:
    """Keep the progress of a run fresh: requests that come `due` after the epoch, on the GPUs `serving`.

    Until cancelled. `simulated`: whether the engine is, which the progress says.
    """
    past: deque[tuple[int, int, int, int]] = deque(maxlen=1 + round(_RATE_S / _REDRAW_S))
    while True:
        t_ns = now_ns()
        status = sampler.status if sampler is not None else None
        watts = [w for gpu in serving if status and (w := status.watts.get(gpu)) is not None]
        clocks = {status.clocks_mhz.get(gpu) for gpu in serving} if status else set()
        past.append((t_ns, due.by(t_ns - epoch_ns), workers.total("sent"), workers.total("output_tokens")))
        seconds = (past[-1][0] - past[0][0]) / NS_PER_S
        target, sent, tokens = (
            (b - a) / seconds if seconds else None for a, b in zip(past[0][1:], past[-1][1:], strict=True)
        )
        lag, ttft, tbt = (
            [_percentile(ordered, q) for q in (0.5, 0.99)]
            for ordered in map(sorted, (workers.lag_us, workers.ttft_us, workers.tbt_us))
        )
        progress.update(
            Snapshot(
                elapsed_ns=max(0, t_ns - epoch_ns), planned_ns=due.last_ns, planned=due.requests,
                sent=workers.total("sent"), ended=workers.total("ended"), errors=workers.total("errors"),
                lag_p50_ns=lag[0], lag_p99_ns=lag[1], ttft_p50_ns=ttft[0], ttft_p99_ns=ttft[1],
                output_tokens_per_s=tokens, watts=sum(watts) if watts else None,
                clock_mhz=clocks.pop() if len(clocks) == 1 else None, target_rps=target, sent_rps=sent,
                tbt_p50_ns=tbt[0], tbt_p99_ns=tbt[1],
                joules_per_token=sum(watts) / tokens if watts and tokens else None,
                # One that failed waits no longer, nor does one that was answered without a stream.
                waiting=workers.total("sent") - max(workers.total("begun"), workers.total("ended")),
                simulated=simulated,
            )
        )  # fmt: skip
        await asyncio.sleep(_REDRAW_S)


def _percentile(ordered: Sequence[int], q: float) -> float | None:
    """A percentile of ordered durations in µs, in ns."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3 if ordered else None


async def warn_of_server(workers: LoadWorkers, progress: Progress) -> None:
    """Say it when requests find nobody where a server had answered before, now and then how many; until cancelled."""
    said, next_ns = 0, 0
    while True:
        gone = workers.total("gone")
        if gone > said and now_ns() >= next_ns:
            said, next_ns = gone, now_ns() + _GONE_NS
            progress.warn(f"{GONE}: {plural(gone, 'request')} found nobody there so far; the trace is sent on")
        await asyncio.sleep(_STATUS_S)


async def warn_of_gpus(
    sampler: Sampler | None, serving: Sequence[int], locked_mhz: int | None, progress: Progress
) -> None:
    """Say once, while it can still be mended, when a GPU leaves its locked clock or is lost; until cancelled."""
    said: set[str] = set()
    off: dict[int, int] = {}
    while True:
        status = sampler.status if sampler is not None else None
        for gpu in serving if status is not None else ():
            assert status is not None
            lost, clock_mhz = status.lost.get(gpu), status.clocks_mhz.get(gpu)
            if lost is not None and f"lost {gpu}" not in said:
                said.add(f"lost {gpu}")
                progress.warn(f"GPU {gpu} cannot be read any more: {lost}")
            held = locked_mhz is None or clock_mhz is None or abs(clock_mhz - locked_mhz) <= CLOCK_TOLERANCE_MHZ
            off[gpu] = 0 if held else off.get(gpu, 0) + 1
            if off[gpu] >= _OFF_STATUSES and f"clock {gpu}" not in said:
                said.add(f"clock {gpu}")
                why = ", ".join(throttle_reasons(status.throttle_reasons.get(gpu))) or "no reason given"
                progress.warn(f"GPU {gpu} runs at {clock_mhz} MHz, not at the locked {locked_mhz} MHz ({why})")
        await asyncio.sleep(_STATUS_S)
