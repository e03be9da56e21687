"""Steps and segments as arrays: what attribution works on, whoever recorded them.

A step has a time, an amount `g` and a coordinate `q`. With step records `g` is 1 and `q` the step's number; without
them (`analysis.membership`) a pseudo-step is a stretch between two client events, `g` its seconds and `q` its middle.
In each of its steps a segment does `tokens * g` tokens and reads `reads * g * (context + growth * (q - q_start))`.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.load import Floats, InstanceData
from tracegen.errors import RunError

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

    request: Ints  # row of the instance's request ids, -1 for a request that is not ours
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


def from_records(instance: InstanceData, request_ids: pl.Series, source: str) -> tuple[Steps, Segments]:
    """Arrays from an instance's steps and segments. Raises `RunError` for a segment that cannot be."""
    assert instance.steps is not None
    assert instance.segments is not None
    table = instance.steps
    number = table["step"].cast(pl.Int64).to_numpy()
    segments = _segments(instance.segments, number, request_ids, source)
    start_s, end_s = table["start_s"].to_numpy(), table["end_s"].to_numpy()
    q = (number - number[0]).astype(np.float64)
    ones = np.ones(q.size)
    count, listed = sum_segments(segments, ones, q)
    recorded = table.select(pl.col(WORK).cast(pl.Float64)).to_numpy()
    in_step = table["requests"].cast(pl.Float64).fill_null(0.0).to_numpy()
    requests = np.maximum(np.maximum(count, in_step), 1.0)
    # Half-chunks may have been rounded per request when the table was written: that is no unlisted work.
    rounding = np.abs(recorded - listed) <= np.maximum(count, 1.0)[:, None] * np.array([0.0, 0.0, 0.0, 1.0])
    work = np.where(rounding, listed, np.maximum(recorded, listed))
    return Steps(
        start_s=_with_pauses(start_s, end_s, segments, table["waiting"].fill_null(0).to_numpy() > 0),
        end_s=np.maximum.accumulate(end_s),
        measured_s=end_s - start_s,
        g=ones,
        q=q,
        requests=requests,
        work=work,
        unlisted=requests - count,
        unlisted_work=work - listed,
        timed=True,
    ), segments


def no_steps() -> tuple[Steps, Segments]:
    """An instance that did nothing."""
    none, index = np.zeros(0), np.zeros(0, dtype=np.int64)
    work = np.zeros((0, len(WORK)))
    steps = Steps(none, none, none, none, none, none, work, none, work, timed=False)
    return steps, Segments(index, index, index, index, none, none, none, none, none)


def _segments(table: pl.DataFrame, number: Ints, request_ids: pl.Series, source: str) -> Segments:
    """The rows of segments.parquet that lie in recorded steps; `number` is the steps' numbers, ascending."""
    for name in ("first_step", "last_step", "kind", "tokens_per_step", "context_start"):
        if table[name].null_count():
            raise RunError(f"{source}: column '{name}' has a null in row {table[name].is_null().arg_max()}")
    odd = table.filter(~pl.col("kind").is_in(["prefill", "decode"]))
    if odd.height:
        raise RunError(f"{source}: column 'kind': '{odd['kind'][0]}' is neither prefill nor decode")
    wrong = table.filter(pl.col("last_step") < pl.col("first_step"))
    if wrong.height:
        raise RunError(f"{source}: request {wrong['request_id'][0]}: last_step is before first_step")
    row = pl.DataFrame({"request_id": request_ids}).with_row_index("request")
    table = table.join(row, on="request_id", how="left", maintain_order="left")
    first_step = table["first_step"].cast(pl.Int64).to_numpy()
    first = np.searchsorted(number, first_step, side="left")
    last = np.searchsorted(number, table["last_step"].cast(pl.Int64).to_numpy(), side="right") - 1
    prefill = (table["kind"] == "prefill").to_numpy()
    tokens = table["tokens_per_step"].cast(pl.Float64).to_numpy()
    segments = Segments(
        request=table["request"].cast(pl.Int64).fill_null(-1).to_numpy(),
        first=first.astype(np.int64),
        last=last.astype(np.int64),
        kind=np.where(prefill, PREFILL, DECODE).astype(np.int64),
        tokens=tokens,
        reads=np.where(prefill, tokens, 1.0),
        context=table["context_start"].cast(pl.Float64).to_numpy() + np.where(prefill, tokens / 2, 0.0),
        growth=tokens,
        q_start=(first_step - number[0]).astype(np.float64),
    )
    return take(segments, first <= last)


def take(segments: Segments, rows: Bools | Ints) -> Segments:
    """The segments at `rows`."""
    return Segments(*(getattr(segments, name)[rows] for name in Segments.__dataclass_fields__))


def sum_segments(segments: Segments, g: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Per step the number of requests (n,) and the work (n, 4) that `segments` put into it.

    Sums of integers and halves, exact in float64 for step records.
    """

    def running(values: Floats, rows: Bools) -> Floats:
        delta = np.zeros(q.size + 1)
        np.add.at(delta, segments.first[rows], values[rows])
        np.add.at(delta, segments.last[rows] + 1, -values[rows])
        return np.cumsum(delta)[:-1]

    work = np.zeros((q.size, 4))
    base = segments.reads * (segments.context - segments.growth * segments.q_start)
    slope = segments.reads * segments.growth
    for kind, token_column, read_column in (
        (PREFILL, PREFILL_TOKENS, PREFILL_ATTENTION),
        (DECODE, DECODE_TOKENS, CONTEXT_TOKENS),
    ):
        rows = segments.kind == kind
        work[:, token_column] = running(segments.tokens, rows) * g
        work[:, read_column] = (running(base, rows) + running(slope, rows) * q) * g
    everyone = np.ones(len(segments), dtype=bool)
    return running(np.ones(len(segments)), everyone), np.maximum(work, 0.0)


def _with_pauses(start_s: Floats, end_s: Floats, segments: Segments, waiting: Bools) -> Floats:
    """Each step's start, moved back over the pause before it unless the engine was empty then.

    The engine is empty between two steps when they are further apart than a pause, nobody waited after the first, and
    no request has segments on both sides.
    """
    previous_s = np.concatenate([[-np.inf], np.maximum.accumulate(end_s)[:-1]])
    gap_s = start_s - previous_s
    ours = segments.request >= 0
    group = np.where(ours, segments.request, -1 - np.arange(len(segments)))  # each foreign segment stands alone
    _, member = np.unique(group, return_inverse=True)
    first = np.full(len(segments), np.iinfo(np.int64).max)
    last = np.full(len(segments), -1)
    np.minimum.at(first, member, segments.first)
    np.maximum.at(last, member, segments.last)
    held = np.zeros(start_s.size + 1)
    seen = last >= 0
    np.add.at(held, first[seen] + 1, 1.0)
    np.add.at(held, last[seen] + 1, -1.0)
    occupied = np.cumsum(held)[:-1] > 0
    occupied |= np.concatenate([[False], waiting[:-1]])
    occupied |= gap_s < PAUSE_S
    occupied[0] = False
    return np.where(occupied, previous_s, np.maximum(start_s, previous_s))
