"""The simulated engine in wall time: runs the scheduler's steps on the hardware model, one after the other.

The engine's own time is ideal. A step starts where the one before ended, or when a request arrives at an idle engine,
and lasts exactly as long as the hardware model says; these are the times on record. The loop sleeps until a step's
end and then hands out its tokens. When the loop runs late the engine's time does not: later steps catch up, and a
request joins only steps that start after it arrived.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from replay.gpu.sim import SimBoard
from replay.sim.blocks import content_keys
from replay.sim.hardware import Hardware
from replay.sim.metrics import Metrics
from replay.sim.physics import heat, warmed
from replay.sim.scheduler import Batch, Request, Scheduler
from replay.steps import StepWriter

_NS_PER_S = 1_000_000_000
_IDLE_POLL_S = 0.05  # how often an idle engine looks for a changed clock


@dataclass(eq=False, slots=True)
class Stream:
    """A submitted request and the tokens that have come out of it."""

    request: Request
    arrival_ns: int
    tokens: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)  # one item a token; True: it is the last
    last_token_ns: int | None = None


class Engine:
    """One instance: a scheduler on one TP group of the board's GPUs."""

    def __init__(
        self,
        scheduler: Scheduler,
        hardware: Hardware,
        board: SimBoard,
        gpus: Sequence[int],
        recorder: StepWriter,
        *,
        sleep_until_ns: Callable[[int], Awaitable[None]],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`gpus`: the board's indices, `hardware.tp` of them; `sleep_until_ns` may return late, never early."""
        self._scheduler, self._hardware, self._board, self._gpus = scheduler, hardware, board, gpus
        self._recorder = recorder
        self._sleep_until_ns, self._now_ns = sleep_until_ns, now_ns
        self._inbox: deque[Stream] = deque()  # arrived, not yet seen by a step
        self._streams: dict[Request, Stream] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._stepping = False
        self._free_ns = 0  # the next step may start from here on
        self._idle_clocks_mhz: list[int] = []
        self._temperature_c = math.nan  # of the GPUs, at `_warm_ns`
        self._warm_ns = 0
        self.metrics = Metrics()

    def submit(self, request: Request) -> Stream:
        """Queue `request`, arriving now. The scheduler must be able to hold it (`Scheduler.fits`)."""
        stream = Stream(request, self._now_ns())
        if not (self._busy or self._inbox):  # the step that it begins may be written a little late
            for gpu in self._gpus:
                self._board.expect_change(gpu, stream.arrival_ns)
        self._streams[request] = stream
        self._inbox.append(stream)
        self._recorder.arrive(request.request_id, stream.arrival_ns)
        self._wake.set()
        return stream

    def abort(self, stream: Stream) -> None:
        """Drop the request of `stream` and free its KV blocks; a finished one is no error."""
        if self._streams.pop(stream.request, None) is None:
            return
        if stream in self._inbox:
            self._inbox.remove(stream)
        else:
            self._scheduler.abort(stream.request)

    def stop(self) -> None:
        """Let `run` return after the step under way."""
        self._stopping = True
        self._wake.set()

    def gauges(self) -> dict[str, float]:
        """The present state, by vLLM's metric names."""
        return {
            "num_requests_running": self._scheduler.running,
            "num_requests_waiting": self._scheduler.waiting + len(self._inbox),
            "kv_cache_usage_perc": self._scheduler.kv_usage,
        }

    @property
    def idle(self) -> bool:
        """Whether there is no request, and no step under way."""
        return not (self._stepping or self._busy or self._inbox)

    @property
    def preemptions(self) -> int:
        """Preemptions since the start."""
        return self._scheduler.preemptions

    def load(self) -> None:
        """Load the model: from now on its GPUs draw what they draw with it when idle.

        The step's code is compiled here, or found in the cache, so that no request waits for it.
        """
        self._compile()
        self._rest(self._now_ns())
        thermal = self._hardware.thermal
        self._warm_ns = self._free_ns
        self._temperature_c = thermal.ambient_c + thermal.resistance_c_per_w * self._idle_w()

    async def run(self) -> None:
        """Run steps until `stop`, then unload the model. `load` comes before."""
        try:
            while (start_ns := await self._next_start_ns()) is not None:
                self._stepping = True
                self._admit(start_ns)
                batch = self._scheduler.schedule()
                clock_mhz = min(self._board.clock_mhz(gpu) for gpu in self._gpus)  # the group runs in lock step
                self._warm(self._idle_w(), start_ns)
                hot = heat(self._hardware.thermal, self._temperature_c)
                end_ns = self._begin(batch, start_ns, clock_mhz, hot)
                await self._sleep_until_ns(end_ns)
                state = batch.waiting, batch.kv_usage, clock_mhz, hot
                self._recorder.add(start_ns, end_ns, batch.work, batch.parts, *state)
                self._hand_out(end_ns)
                self._free_ns = end_ns
                self._stepping = False
        finally:
            self._unload()

    async def _next_start_ns(self) -> int | None:
        """Wait for work; when its step starts, None when the engine is to stop."""
        waits = not self._busy and (not self._inbox or self._inbox[0].arrival_ns > self._free_ns)
        if waits or self._stopping:
            self._rest(self._free_ns)
        while not (self._busy or self._inbox or self._stopping):
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _IDLE_POLL_S)
            if not self._inbox and self._idle_clocks_mhz != self._clocks_mhz():
                self._rest(self._now_ns())
        if self._stopping:
            return None
        return self._free_ns if self._busy else max(self._free_ns, self._inbox[0].arrival_ns)

    @property
    def _busy(self) -> bool:
        return self._scheduler.running + self._scheduler.waiting > 0

    def _admit(self, start_ns: int) -> None:
        """Hand the scheduler all that arrived by `start_ns`."""
        while self._inbox and self._inbox[0].arrival_ns <= start_ns:
            self._scheduler.add(self._inbox.popleft().request)

    def _begin(self, batch: Batch, start_ns: int, clock_mhz: int, hot: float) -> int:
        """Let the GPUs draw the step's power from `start_ns` on; when it ends."""
        cap_w = min(self._board.cap_w(gpu) for gpu in self._gpus)
        found = self._hardware.run_step(batch.work, clock_mhz, hot, cap_w)
        end_ns = start_ns + max(1, round(found.duration_s * _NS_PER_S))
        self._warm(found.gpu_w, end_ns)
        for gpu in self._gpus:
            self._board.set_power(
                gpu, start_ns, found.gpu_w, clock_mhz=found.clock_mhz, capped=found.capped, busy=True,
                known_until_ns=end_ns,
            )  # fmt: skip
        return end_ns

    def _compile(self) -> None:
        """Run all that a step needs on an engine that is thrown away."""
        scratch = Scheduler(self._scheduler.limits)
        tokens = np.zeros(self._scheduler.limits.block_tokens, dtype=np.uint64)
        request = Request(None, tokens.size + 1, 1, keys=content_keys(tokens, tokens.size).tolist())
        scratch.add(request)
        self._hardware.run_step(scratch.schedule().work, self._clocks_mhz()[0])
        scratch.complete()
        scratch.abort(request)
        heat(self._hardware.thermal, warmed(self._hardware.thermal, 0.0, self._idle_w(), 1.0))

    def _warm(self, gpu_w: float, until_ns: int) -> None:
        """Let the GPUs' temperature follow their power, `gpu_w` each, until then."""
        elapsed_s = (until_ns - self._warm_ns) / _NS_PER_S
        if elapsed_s > 0:
            self._temperature_c = warmed(self._hardware.thermal, self._temperature_c, gpu_w, elapsed_s)
            self._warm_ns = until_ns

    def _idle_w(self) -> float:
        """What each GPU draws without a step."""
        return self._hardware.idle_w(min(self._clocks_mhz()))

    def _hand_out(self, end_ns: int) -> None:
        """Give each stream the token that the step ending at `end_ns` made for it."""
        metrics = self.metrics
        metrics.engine_lag_max_s = max(metrics.engine_lag_max_s, (self._now_ns() - end_ns) / _NS_PER_S)
        for request in self._scheduler.complete():
            stream = self._streams[request]
            if stream.last_token_ns is None:
                metrics.prompt_tokens += request.prompt_tokens
                metrics.ttft.observe((end_ns - stream.arrival_ns) / _NS_PER_S)
            else:
                metrics.inter_token.observe((end_ns - stream.last_token_ns) / _NS_PER_S)
            stream.last_token_ns = end_ns
            metrics.generation_tokens += 1
            if request.finished:
                metrics.succeeded += 1
                metrics.e2e.observe((end_ns - stream.arrival_ns) / _NS_PER_S)
                del self._streams[request]
            stream.tokens.put_nowait(request.finished)

    def _rest(self, t_ns: int) -> None:
        """Let the GPUs idle, model loaded, from `t_ns` on."""
        self._idle_clocks_mhz = self._clocks_mhz()
        for gpu, clock_mhz in zip(self._gpus, self._idle_clocks_mhz, strict=True):
            self._board.set_power(gpu, t_ns, self._hardware.idle_w(clock_mhz))
        self._free_ns = t_ns

    def _unload(self) -> None:
        """Leave the GPUs as they were before the engine came; from now, or from the end of a step cut short."""
        now_ns = max(self._now_ns(), self._free_ns)
        for gpu in self._gpus:
            unloaded_w = self._hardware.idle_w(self._board.clock_mhz(gpu), loaded=False)
            self._board.set_power(gpu, now_ns, unloaded_w)

    def _clocks_mhz(self) -> list[int]:
        return [self._board.clock_mhz(gpu) for gpu in self._gpus]
