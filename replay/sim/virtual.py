"""The simulated engine in virtual time: a trace goes in, engine steps and token times come out.

Each instance is a scheduler (`replay.sim.core`) on a group of GPUs (`replay.sim.physics`); the loop is in
`replay.sim.loop`. Arrivals come in chunks and results leave through buffers, so memory is bounded by the requests in
flight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.blocks import RecordArray
from replay.sim.hardware import Hardware
from replay.sim.loop import (
    ARRIVAL,
    COUNTS,
    DONE,
    FED,
    LANE,
    LEAST_LOADED,
    NO_ROWS,
    SEGMENT,
    STEP,
    Buffers,
    IntArray,
    Lanes,
    Machine,
    drain,
    feed,
)
from replay.sim.physics import at_lock, idle_w
from replay.sim.state import REQUEST, Limits, make_core

__all__ = [
    "ARRIVAL",
    "DONE",
    "LEAST_LOADED",
    "SEGMENT",
    "STEP",
    "Output",
    "Served",
    "VirtualEngines",
    "arrivals_of",
    "serve",
]

_BUFFER_STEPS = 1 << 18
_ROWS = 1 << 12  # requests in flight at first; doubles when they are more


class Output(NamedTuple):
    """What has happened since the output before: copies of STEP, SEGMENT and DONE rows."""

    steps: RecordArray
    segments: RecordArray
    done: RecordArray


class VirtualEngines:
    """Instances of one kind of engine that serve a trace in virtual time."""

    def __init__(
        self,
        hardware: Hardware,
        clock_mhz: float,
        *,
        instances: int = 1,
        limits: Limits | None = None,
        keys: npt.NDArray[np.uint64] | None = None,
        key_tokens: int = 0,
        start_ns: int = 0,
        buffer_steps: int = _BUFFER_STEPS,
        pinned: IntArray | None = None,
    ) -> None:
        """All `instances` idle from `start_ns` on, their SM clock locked to `clock_mhz`.

        `limits` are the hardware's own unless given. `keys` are the content keys that arrivals name, one for each
        `key_tokens` tokens. `pinned` [steps, 2] are the times in ns at which an engine's steps started and ended: one
        instance then forms its batches at these times instead of the hardware model's, until they are used up.
        """
        self.hardware, self.limits = hardware, limits or hardware.limits
        c, mhz = hardware.constants, float(clock_mhz)
        known = np.zeros((0, 2), np.int64) if pinned is None else np.ascontiguousarray(pinned, dtype=np.int64)
        self._machine = Machine(c, at_lock(c, mhz), hardware.thermal, float(idle_w(c, mhz)), known)
        requests = np.zeros(_ROWS, REQUEST)
        held = np.zeros(1, np.uint64) if keys is None else keys
        per_key = key_tokens or self.limits.block_tokens
        cores = [make_core(self.limits, requests, held, per_key) for _ in range(instances)]
        lane = np.zeros((instances, 1), LANE)
        lane["free_ns"] = known[0, 0] if known.size else start_ns
        lane["temperature_c"] = hardware.thermal.ambient_c + hardware.thermal.resistance_c_per_w * self._machine.idle_w
        self._lanes = Lanes(
            np.stack([core.state for core in cores]),
            requests,
            held,
            np.stack([core.pool.blocks for core in cores]),
            np.stack([core.pool.slots for core in cores]),
            np.stack([core.pool.free for core in cores]),
            np.stack([core.tables for core in cores]),
            np.stack([core.spare for core in cores]),
            np.stack([core.running for core in cores]),
            np.stack([core.parts for core in cores]),
            lane,
            np.arange(_ROWS, dtype=np.int32),
        )
        seqs = self.limits.max_num_seqs
        counts = np.zeros(1, COUNTS)
        counts["rows_free"] = _ROWS
        self._buffers = Buffers(
            np.zeros(buffer_steps, STEP),
            np.zeros(buffer_steps + 2 * seqs, SEGMENT),
            np.zeros(buffer_steps + seqs, DONE),
            counts,
        )
        self._number = 0

    def feed(self, arrivals: RecordArray) -> Iterator[Output]:
        """Let `arrivals` (ARRIVAL, ascending, none before those fed already) come in; what happens until the last.

        Each request must fit the KV cache as a whole. Its `number` counts the requests fed before it.
        """
        if arrivals.size:
            self._widen(int((arrivals["prompt"].astype(np.int64) + arrivals["output"]).max()))
        at = 0
        while True:
            at, why = feed(self._lanes, self._machine, self._buffers, arrivals, at, self._number)
            if why == FED:
                break
            if why == NO_ROWS:
                self._add_rows()
            else:
                yield self._take()
        self._number += arrivals.size
        yield self._take()

    def finish(self) -> Iterator[Output]:
        """Serve to the end what is there."""
        while not drain(self._lanes, self._machine, self._buffers):
            yield self._take()
        yield self._take()

    @property
    def preemptions(self) -> int:
        """Preemptions so far, over all instances."""
        return int(self._lanes.state["preemptions"].sum())

    @property
    def waiting(self) -> int:
        """Requests that wait now, over all instances."""
        return int(self._lanes.state["waiting"].sum())

    def _take(self) -> Output:
        counts = self._buffers.counts
        steps, segments, done = (int(counts[name][0]) for name in ("steps", "segments", "done"))
        output = Output(
            self._buffers.steps[:steps].copy(), self._buffers.segments[:segments].copy(),
            self._buffers.done[:done].copy(),
        )  # fmt: skip
        for name in ("steps", "segments", "done"):
            counts[name] = 0
        return output

    def _widen(self, tokens: int) -> None:
        """Make the block tables wide enough for a request of `tokens`."""
        needed = -(-tokens // self.limits.block_tokens)
        instances, rows, width = self._lanes.tables.shape
        if needed > width:
            tables = np.zeros((instances, rows, max(needed, 2 * width)), dtype=np.int32)
            tables[:, :, :width] = self._lanes.tables
            self._lanes = self._lanes._replace(tables=tables)

    def _add_rows(self) -> None:
        """Make room for as many requests in flight again."""
        old = self._lanes.requests
        rows = np.zeros(2 * old.size, dtype=np.int32)
        rows[: old.size] = np.arange(old.size, 2 * old.size)
        self._buffers.counts["rows_free"] = old.size
        self._lanes = self._lanes._replace(requests=np.concatenate([old, np.zeros_like(old)]), rows=rows)


class Served(NamedTuple):
    """A whole trace served: STEP rows in order of time, and for each request, in its order, DONE rows."""

    steps: RecordArray
    segments: RecordArray
    done: RecordArray


def arrivals_of(
    arrival_ns: npt.NDArray[np.int64], prompt: npt.ArrayLike, output: npt.ArrayLike, instance: npt.ArrayLike = 0
) -> RecordArray:
    """ARRIVAL rows of requests without priorities and shared content; scalars stand for all."""
    rows = np.zeros(len(arrival_ns), ARRIVAL)
    rows["arrival_ns"], rows["prompt"], rows["output"], rows["instance"] = arrival_ns, prompt, output, instance
    return rows


def serve(engines: VirtualEngines, arrivals: RecordArray) -> Served:
    """Serve `arrivals` to the end, all results in memory: for runs that are not too long."""
    outputs = [*engines.feed(arrivals), *engines.finish()]
    steps, segments, done = (np.concatenate(column) for column in zip(*outputs, strict=True))
    return Served(steps, segments, done[np.argsort(done["number"], kind="stable")])
