"""Steps and segments as arrays: what attribution works on, whoever recorded them.

A step has a time, an amount `g` and a coordinate `q`. With step records `g` is 1 and `q` the step's number; without
them (`analysis.membership`) a pseudo-step is a stretch between two client events, `g` its seconds and `q` its middle.
In each of its steps a segment does `tokens * g` tokens and reads `reads * g * (context + growth * (q - q_start))`.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.kernels import occupied, step_times, sum_pieces, work_of
from analysis.load import Floats
from analysis.members import Members

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PAUSE_S = 0.010  # a shorter gap between steps is the engine's own pause, never idleness
PREFILL, DECODE = 0, 1
# Columns of Steps.work, in the order of steps.parquet.
PREFILL_TOKENS, DECODE_TOKENS, CONTEXT_TOKENS, PREFILL_ATTENTION = range(4)
WORK = ("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention")


@dataclass(frozen=True)
class Segments:
    """Runs of steps of one request each; arrays of one length."""

    request: Ints  # row of the run's request ids, -1 for a request that is not ours
    first: Ints  # row of its first step
    last: Ints  # row of its last step, inclusive
    kind: Ints  # PREFILL or DECODE
    tokens: Floats  # per unit of g
    reads: Floats  # contexts read per unit of g
    context: Floats  # tokens before the segment's start (plus half a chunk, for prefill's attention)
    growth: Floats  # tokens that the context grows by per unit of q
    q_start: Floats

    def __len__(self) -> int:
        return int(self.request.size)


@dataclass(frozen=True)
class Steps:
    """Engine steps in order of time; arrays of one length n, work of shape (n, 4)."""

    start_s: Floats  # including the pause before it
    end_s: Floats
    measured_s: Floats  # as recorded, without the pause
    g: Floats
    q: Floats
    requests: Floats  # in the step, ≥ 1
    work: Floats
    unlisted: Floats  # requests in the step that no segment names, ≥ 0
    unlisted_work: Floats  # their work
    timed: bool  # whether durations are the engine's own, so that they can be modelled

    def __len__(self) -> int:
        return int(self.start_s.size)


@dataclass(frozen=True)
class Before:
    """The step before some others: its end, and whether requests waited then."""

    end_s: float
    waiting: bool


def times_of(
    rows: pl.DataFrame, members: Members, before: Before | None, zero_ns: int
) -> tuple[Floats, Floats, Floats]:
    """Start, pause included, and end of each step of `rows` (STEPS in order), and its own duration.

    Seconds, times from `zero_ns` of their clock.
    """
    return step_times(
        rows["start_ns"].to_numpy(),
        rows["end_ns"].to_numpy(),
        zero_ns,
        _held(rows["step"], members),
        rows["waiting"].fill_null(0).to_numpy(),
        -np.inf if before is None else before.end_s,
        before is not None and before.waiting,
        PAUSE_S,
    )


def _held(number: pl.Series, members: Members) -> Bools:
    """Whether the engine held a request between the step before and each of the steps `number`."""
    step = number.cast(pl.Int64).to_numpy() - members.base
    low, high = int(step[0]), int(step[-1])
    begin, end = members.here_between(low, high)
    if high - low + 1 == step.size:
        return occupied(begin, end, low, step.size)
    # Steps were lost in between.
    first, last = np.searchsorted(step, begin, side="left"), np.searchsorted(step, end, side="right") - 1
    return occupied(first, last, 0, step.size)


def from_records(rows: pl.DataFrame, times: tuple[Floats, Floats, Floats], members: Members) -> tuple[Steps, Segments]:
    """Arrays of the steps `rows` (STEPS in order), with their `times_of`, and of the segments in them.

    A segment that goes beyond these steps is cut to them.
    """
    step = rows["step"].cast(pl.Int64).to_numpy() - members.base
    segments = _segments(members, step)
    q, ones = step.astype(np.float64), np.ones(step.size)
    count, listed = sum_segments(segments, ones, q)
    prefill, decode, context, attention, inside = (rows[name].fill_null(0).to_numpy() for name in (*WORK, "requests"))
    requests, work, unlisted, unlisted_work = work_of(prefill, decode, context, attention, inside, count, listed)
    start_s, end_s, measured_s = times
    steps = Steps(start_s, end_s, measured_s, ones, q, requests, work, unlisted, unlisted_work, timed=True)
    return steps, segments


def no_steps() -> tuple[Steps, Segments]:
    """An instance that did nothing."""
    none, index = np.zeros(0), np.zeros(0, dtype=np.int64)
    work = np.zeros((0, len(WORK)))
    steps = Steps(none, none, none, none, none, none, work, none, work, timed=False)
    return steps, Segments(index, index, index, index, none, none, none, none, none)


def _segments(members: Members, step: Ints) -> Segments:
    """The segments in the steps numbered `step` from the members' base, ascending; cut to these."""
    rows = members.among(int(step[0]), int(step[-1]))
    first, last = members.first[rows].astype(np.int64), members.last[rows].astype(np.int64)
    prefill = members.prefill[rows]
    tokens = members.tokens[rows].astype(np.float64)
    if step[-1] - step[0] + 1 == step.size:
        first_row, last_row = np.maximum(first - step[0], 0), np.minimum(last - step[0], step.size - 1)
    else:  # steps were lost in between
        first_row, last_row = np.searchsorted(step, first), np.searchsorted(step, last, side="right") - 1
    segments = Segments(
        request=members.request[rows].astype(np.int64),
        first=first_row.astype(np.int64),
        last=last_row.astype(np.int64),
        kind=np.where(prefill, PREFILL, DECODE).astype(np.int64),
        tokens=tokens,
        reads=np.where(prefill, tokens, 1.0),
        context=members.context[rows].astype(np.float64) + np.where(prefill, tokens / 2, 0.0),
        growth=tokens,
        q_start=first.astype(np.float64),
    )
    some = segments.first <= segments.last  # not only in steps that were lost
    return segments if some.all() else take(segments, some)


def take(segments: Segments, rows: Bools | Ints) -> Segments:
    """The segments at `rows`."""
    return Segments(*(getattr(segments, name)[rows] for name in Segments.__dataclass_fields__))


def steps_at(steps: Steps, rows: Bools | Ints | slice) -> Steps:
    """The steps at `rows`."""
    arrays = {name: value[rows] for name, value in vars(steps).items() if name != "timed"}
    return Steps(**arrays, timed=steps.timed)


def segments_between(segments: Segments, low: int, high: int) -> Segments:
    """The segments in the steps `low` to `high`, exclusive, cut to these and counted from `low`."""
    part = take(segments, (segments.first < high) & (segments.last >= low))
    first, last = np.maximum(part.first, low) - low, np.minimum(part.last, high - 1) - low
    return replace(part, first=first, last=last)


def sum_segments(segments: Segments, g: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Per step the number of requests (n,) and the work (n, 4) that `segments` put into it."""
    if not q.size:
        return np.zeros(0), np.zeros((0, len(WORK)))
    base = segments.reads * (segments.context + segments.growth * (q[0] - segments.q_start))
    slope = segments.reads * segments.growth
    prefill = segments.kind == PREFILL
    return sum_pieces(segments.first, segments.last, prefill, segments.tokens, base, slope, g, q - q[0])
