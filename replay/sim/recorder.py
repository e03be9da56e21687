"""Writes what the simulated engine did: one row a step, and who was in which steps, run-length coded.

Each flush ends the open segments; the next step opens new ones. So a killed engine loses at most the time since the
last flush, and what is left can be attributed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from replay.rundir import SEGMENTS, STEPS, PartWriter
from replay.sim.scheduler import Batch, Kind, Request
from tracegen.errors import ReplayError

# `clock_mhz`: the SM clock that the step was run at, for the truth of simulated runs.
SIM_STEPS = pl.Schema({**STEPS, "clock_mhz": pl.Float64()})


@dataclass(slots=True)
class _Segment:
    """A row of `segments.parquet`, still growing."""

    request_id: int | None
    first_step: int
    last_step: int
    kind: Kind
    tokens_per_step: int
    context_start: int

    def goes_on(self, step: int, kind: Kind, tokens: int, context: int) -> bool:
        """Whether `step` continues this segment."""
        return (
            step == self.last_step + 1
            and kind == self.kind
            and tokens == self.tokens_per_step
            and context == self.context_start + tokens * (step - self.first_step)
        )


class Rows(NamedTuple):
    """What was recorded since the last flush."""

    steps: list[tuple[int | float, ...]]
    segments: list[_Segment]


class Recorder:
    """Collects the steps of one engine instance and writes them to its run directory."""

    def __init__(self, run_dir: Path, instance: int) -> None:
        """Make the tables' folders in `run_dir`; parts carry the instance, so that several engines share them.

        Raises `ReplayError` when `run_dir` cannot be written, or has steps of this instance already: they would be
        written over.
        """
        prefix = f"sim{instance:03d}"
        if any(run_dir.glob(f"steps.parquet/{prefix}-*")):
            raise ReplayError(f"{run_dir} already has steps of instance {instance}; record into another directory")
        self._instance = instance
        try:
            self._writers = {name: PartWriter(run_dir, name, prefix=prefix) for name in ("steps", "segments")}
        except OSError as error:
            raise ReplayError(
                f"{run_dir} cannot be written ({error.strerror}); record into another directory"
            ) from None
        self._rows = Rows([], [])
        self._open: dict[Request, _Segment] = {}
        self._step = 0

    def add(self, start_ns: int, end_ns: int, clock_mhz: float, batch: Batch) -> None:
        """Record the step that ran `batch` from `start_ns` to `end_ns`."""
        step, self._step = self._step, self._step + 1
        work = batch.work
        self._rows.steps.append(
            (
                self._instance,
                step,
                start_ns,
                end_ns,
                int(work.prefill_tokens),
                int(work.decode_tokens),
                int(work.context_tokens),
                int(work.prefill_attention),  # a half token squared is beyond the table's resolution
                len(batch.parts),
                batch.waiting,
                batch.kv_usage,
                clock_mhz,
            )
        )
        for request, kind, tokens, context in batch.parts:
            segment = self._open.get(request)
            if segment is not None and segment.goes_on(step, kind, tokens, context):
                segment.last_step = step
            else:
                segment = _Segment(request.request_id, step, step, kind, tokens, context)
                self._open[request] = segment
                self._rows.segments.append(segment)

    def take(self) -> Rows:
        """What was recorded since the last call, ready for `write`; steps that follow go to new rows."""
        rows, self._rows = self._rows, Rows([], [])
        self._open.clear()
        return rows

    def write(self, rows: Rows) -> None:
        """Write `rows` as the tables' next parts; runs in a thread while `add` goes on."""
        self._writers["steps"].append(pl.DataFrame(rows.steps, schema=SIM_STEPS, orient="row"))
        columns = {name: [getattr(s, name) for s in rows.segments] for name in SEGMENTS if name != "instance"}
        segments = pl.DataFrame({"instance": [self._instance] * len(rows.segments), **columns}, schema=SEGMENTS)
        self._writers["segments"].append(segments)
