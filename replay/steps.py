"""Writes what an engine did: one row a step, who was in which steps, run-length coded, and when requests arrived.

Each flush ends the open segments; the next step opens new ones. So a killed engine loses at most the time since the
last flush, and what is left can be attributed.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import polars as pl

from replay.rundir import PartWriter
from replay.tables import ARRIVALS, SEGMENTS, STEPS
from tracegen.errors import ReplayError

Kind = Literal["prefill", "decode"]
# Of a simulated step, for the truth of such runs: the locked SM clock, and what leakage multiplied its power with.
SIM_STEP = pl.Schema({"clock_mhz": pl.Float64(), "heat": pl.Float64()})


class EngineRequest(Hashable, Protocol):
    """A request as an engine knows it; each object is another request."""

    @property
    def request_id(self) -> int | None:
        """Its id in the trace; None: warm-up or not ours."""


class Totals(NamedTuple):
    """What a step does, summed over its requests, as in `steps.parquet`."""

    prefill_tokens: float
    decode_tokens: float
    context_tokens: float
    prefill_attention: float  # half tokens squared are beyond the table's resolution


# What one request does in a step: the request, prefill or decode, its tokens, and the tokens that it had before them.
Part = tuple[EngineRequest, Kind, int, int]


def totals(parts: Iterable[Part]) -> Totals:
    """The sums over `parts`."""
    prefill = decode = context = attention = 0
    for _, kind, tokens, before in parts:
        if kind == "prefill":
            prefill += tokens
            attention += tokens * (2 * before + tokens)
        else:
            decode += tokens
            context += before
    return Totals(prefill, decode, context, attention / 2)


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
    arrivals: list[tuple[int, int | None, int]]


def part_prefix(instance: int) -> str:
    """How the parts of `instance` are called, so that several engines share a table."""
    return f"engine{instance:03d}"


class StepWriter:
    """Collects the steps of one engine instance and writes them to its run directory."""

    def __init__(self, run_dir: Path, instance: int, *, extra: pl.Schema | None = None) -> None:
        """Make the tables' folders in `run_dir`; parts carry the instance, so that several engines share them.

        `extra`: columns of this engine's own. Raises `ReplayError` when `run_dir` cannot be written, or has steps of
        this instance already: they would be written over.
        """
        self._prefix, self._instance = part_prefix(instance), instance
        self._schema = pl.Schema({**STEPS, **(extra or {})})
        self.move(run_dir)

    def move(self, run_dir: Path | None) -> None:
        """Write into `run_dir` from now on, with steps from 0, for another run; None: nowhere.

        What was recorded and not written is lost. Raises `ReplayError` as for a new writer.
        """
        self._rows = Rows([], [], [])
        self._open: dict[EngineRequest, _Segment] = {}
        self._step = 0
        self._run_dir = run_dir
        self._writers: dict[str, PartWriter] = {}
        if run_dir is None:
            return
        if any(run_dir.glob(f"steps.parquet/{self._prefix}-*")):
            raise ReplayError(
                f"{run_dir} already has steps of instance {self._instance}; record into another directory"
            )
        try:
            for name in ("steps", "segments"):
                self._writers[name] = PartWriter(run_dir, name, prefix=self._prefix)
        except OSError as error:
            raise ReplayError(
                f"{run_dir} cannot be written ({error.strerror}); record into another directory"
            ) from None

    def add(
        self,
        start_ns: int,
        end_ns: int,
        sums: Iterable[float],
        parts: Sequence[Part],
        waiting: int,
        kv_usage: float,
        *extra: float,
    ) -> None:
        """Record the step that ran `parts`, whose totals are `sums`, from `start_ns` to `end_ns`."""
        step, self._step = self._step, self._step + 1
        # Half tokens squared are beyond the table's resolution.
        self._rows.steps.append(
            (self._instance, step, start_ns, end_ns, *map(int, sums), len(parts), waiting, kv_usage, *extra)
        )
        for request, kind, tokens, context in parts:
            segment = self._open.get(request)
            if segment is not None and segment.goes_on(step, kind, tokens, context):
                segment.last_step = step
            else:
                segment = _Segment(request.request_id, step, step, kind, tokens, context)
                self._open[request] = segment
                self._rows.segments.append(segment)

    def arrive(self, request_id: int | None, arrival_ns: int) -> None:
        """Record that the engine got a request; None: warm-up or not ours."""
        self._rows.arrivals.append((self._instance, request_id, arrival_ns))

    def skip(self, steps: int) -> None:
        """Leave a gap of `steps` that are not known."""
        self._step += steps

    def take(self) -> Rows:
        """What was recorded since the last call, ready for `write`; steps that follow go to new rows."""
        rows, self._rows = self._rows, Rows([], [], [])
        self._open.clear()
        return rows

    def write(self, rows: Rows) -> None:
        """Write `rows` as the tables' next parts; runs in a thread while `add` goes on."""
        if self._run_dir is None:
            return
        self._writers["steps"].append(pl.DataFrame(rows.steps, schema=self._schema, orient="row"))
        columns = {name: [getattr(s, name) for s in rows.segments] for name in SEGMENTS if name != "instance"}
        segments = pl.DataFrame({"instance": [self._instance] * len(rows.segments), **columns}, schema=SEGMENTS)
        self._writers["segments"].append(segments)
        if rows.arrivals:
            if "arrivals" not in self._writers:  # an engine that does not say has no such table
                self._writers["arrivals"] = PartWriter(self._run_dir, "arrivals", prefix=self._prefix)
            self._writers["arrivals"].append(pl.DataFrame(rows.arrivals, schema=ARRIVALS, orient="row"))
