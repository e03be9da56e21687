"""What goes on beside the sending: the live figures, and the care that nothing disturbs it or fails unseen."""

import asyncio
import contextlib
import gc
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from replay.clock import NS_PER_S, now_ns
from replay.gpu.sampler import Sampler
from replay.live import Progress, Snapshot
from replay.records import RecordStore
from replay.verdicts import CLOCK_TOLERANCE_MHZ, throttle_reasons

_REDRAW_S = 0.25
_STATUS_S = 0.5  # the sampler's own period of telling
_OFF_STATUSES = 4  # off the clock for 2 s: longer than a lock takes to settle
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


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collector pauses while requests are timed; reference counting goes on."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


async def show(
    schedule_ns: Sequence[int], serving: Sequence[int], store: RecordStore, sampler: Sampler | None, progress: Progress
) -> None:
    """Keep the progress of a run fresh: requests due at `schedule_ns`, on the GPUs `serving`; until cancelled."""
    epoch_ns, planned_ns = schedule_ns[0], schedule_ns[-1] - schedule_ns[0]
    tokens: deque[tuple[int, int]] = deque(maxlen=1 + round(_RATE_S / _REDRAW_S))
    while True:
        t_ns = now_ns()
        recent = list(store.recent)
        lags = [r.sent_ns - r.scheduled_ns for r in recent if r.sent_ns is not None]
        ttfts = [r.first_token_ns - r.sent_ns for r in recent if r.first_token_ns and r.sent_ns]
        status = sampler.status if sampler is not None else None
        watts = [w for gpu in serving if status and (w := status.watts.get(gpu)) is not None]
        clocks = {status.clocks_mhz.get(gpu) for gpu in serving} if status else set()
        tokens.append((t_ns, store.output_tokens()))
        (old_ns, old), (new_ns, new) = tokens[0], tokens[-1]
        rate = (new - old) / ((new_ns - old_ns) / NS_PER_S) if new_ns > old_ns else None
        progress.update(
            Snapshot(
                elapsed_ns=max(0, t_ns - epoch_ns), planned_ns=planned_ns, planned=len(schedule_ns),
                sent=store.sent, ended=store.ended, errors=store.errors,
                lag_p50_ns=_percentile(lags, 0.5), lag_p99_ns=_percentile(lags, 0.99),
                ttft_p50_ns=_percentile(ttfts, 0.5), ttft_p99_ns=_percentile(ttfts, 0.99),
                output_tokens_per_s=rate, watts=sum(watts) if watts else None,
                clock_mhz=clocks.pop() if len(clocks) == 1 else None,
            )
        )  # fmt: skip
        await asyncio.sleep(_REDRAW_S)


def _percentile(values: list[int], q: float) -> float | None:
    return float(sorted(values)[min(len(values) - 1, int(q * len(values)))]) if values else None


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
