"""Who was in which steps: segments.parquet as compact arrays, an instance at a time, 21 bytes a row."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.checks import check_members, check_segments, check_steps
from analysis.kernels import compiled, first_overlap, spans_of
from analysis.streams import parted, read_ahead
from replay.rundir import RowGroup, Run, read_group, row_groups

Ints32 = NDArray[np.int32]
Pieces = dict[str, NDArray[Any]]  # by the names that they have in `Members`
COLUMNS = ("instance", "request_id", "first_step", "last_step", "kind", "tokens_per_step", "context_start")
SPARSE = 8  # ids spread wider than so many times their number are looked up by bisection
MOST_STEPS = 2**31 - 2  # between an instance's first and last step


@dataclass(frozen=True)
class Members:
    """One instance's segments in order of their first step; arrays of one length, and two by request."""

    base: int  # the step number that all others count from
    request: Ints32  # row of the request's id, -1 for one that is not ours
    first: Ints32
    last: Ints32  # inclusive
    prefill: NDArray[np.bool_]
    tokens: NDArray[np.uint32]
    context: NDArray[np.uint32]
    reach: Ints32  # the greatest `last` so far
    here_from: Ints32  # in ascending order, the first step of each request, foreign segments standing alone,
    here_to: Ints32  # and its last
    here_reach: Ints32  # the greatest `here_to` so far

    def __len__(self) -> int:
        return int(self.request.size)

    def among(self, low: int, high: int) -> NDArray[np.int64]:
        """Rows of the segments that are in some of the steps `low` to `high`, counted from `base`."""
        end = _found(self.first, high, "right")
        begin = _found(self.reach[:end], low, "left")
        return begin + np.flatnonzero(self.last[begin:end] >= low)

    def here_between(self, low: int, high: int) -> tuple[Ints32, Ints32]:
        """First and last step of the requests that were in the engine at some of the steps `low` to `high`."""
        end = _found(self.here_from, high, "right")
        begin = _found(self.here_reach[:end], low, "left")
        return self.here_from[begin:end], self.here_to[begin:end]


def _found(ascending: Ints32, step: int, side: Literal["left", "right"]) -> int:
    """Where `step` would stand; asked as a number of another width numpy would copy the whole array first."""
    return int(np.searchsorted(ascending, np.int32(min(max(step, -MOST_STEPS), MOST_STEPS)), side=side))


class RowOf:
    """Finds the row of a request's id."""

    def __init__(self, ids: pl.Series) -> None:
        """`ids`: unique, by row."""
        values = ids.to_numpy().astype(np.uint64, copy=False)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, -1)
        self._low, self._span = np.uint64(low), np.uint64(high - low + 1)
        # As most traces count their requests, an id tells its row without a table.
        in_a_row = values.size == high - low + 1 and ids.is_sorted()
        dense = in_a_row or high - low < SPARSE * values.size + 1000
        self._table = np.zeros(0, dtype=np.int32) if in_a_row or not dense else np.full(high - low + 1, -1, np.int32)
        if self._table.size:
            self._table[(values - self._low).astype(np.int64)] = np.arange(values.size, dtype=np.int32)
        self._order = np.zeros(0, dtype=np.int64) if dense else np.argsort(values)
        self._sorted = values[self._order]

    def __call__(self, ids: pl.Series) -> Ints32:
        """Rows of `ids`, -1 for a null and for an id that is not there."""
        null = ids.is_null().to_numpy() if ids.null_count() else None
        values = ids.fill_null(int(self._low)).to_numpy() if null is not None else ids.to_numpy()
        if self._order.size:
            place = np.minimum(np.searchsorted(self._sorted, values), self._sorted.size - 1)
            rows = np.where(self._sorted[place] == values, self._order[place], -1).astype(np.int32)
        else:
            rows = _rows_of(values, self._low, self._span, self._table)
        return rows if null is None else np.where(null, np.int32(-1), rows)


@compiled
def _rows_of(ids: NDArray[np.uint64], low: np.uint64, span: np.uint64, table: Ints32) -> Ints32:
    """Rows of `ids` by `table`, which begins at `low`, or without one by their distance from it; -1 beyond `span`."""
    rows = np.empty(ids.size, dtype=np.int32)
    for i in range(ids.size):
        place = ids[i] - low  # wraps around below `low`, beyond any span
        rows[i] = -1 if place >= span else np.int32(place) if table.size == 0 else table[place]
    return rows


def read_members(run: Run, row_of: RowOf) -> tuple[dict[int, Members], list[str]]:
    """The segments of each instance of `run`, and what to say of rows that were cut.

    Raises `RunError` naming file, column and row where they contradict themselves or a complete run's steps.
    """
    groups = row_groups(run.path, "segments", "first_step")
    lows = [group.low for group in groups]
    base = min((low for low in lows if low is not None), default=0) if None not in lows else 0
    rows_before = dict(zip(groups, accumulate((group.rows for group in groups), initial=0), strict=False))

    def read(group: RowGroup) -> list[tuple[int, Pieces]]:
        rows = read_group(group, "segments", COLUMNS)
        check_members(run, rows, rows_before[group], base + MOST_STEPS)
        return [(instance, _pieces(own, base, row_of)) for (instance,), own in parted(rows, ("instance",)).items()]

    pieces: dict[int, list[Pieces]] = {}
    for found in read_ahead(groups, read):
        for instance, piece in found:
            pieces.setdefault(instance, []).append(piece)
    members = {instance: _members(base, parts) for instance, parts in pieces.items()}
    return members, _check(run, members)


def _pieces(rows: pl.DataFrame, base: int, row_of: RowOf) -> Pieces:
    """The arrays of `Members` of some rows of one instance."""
    return {
        "request": row_of(rows["request_id"]),
        "first": (rows["first_step"].cast(pl.Int64) - base).to_numpy().astype(np.int32),
        "last": (rows["last_step"].cast(pl.Int64) - base).to_numpy().astype(np.int32),
        "prefill": (rows["kind"] == "prefill").to_numpy(),
        "tokens": rows["tokens_per_step"].to_numpy(),
        "context": rows["context_start"].to_numpy(),
    }


def _members(base: int, parts: list[Pieces]) -> Members:
    """One instance's arrays, in order."""
    whole = {}
    for name in list(parts[0]):
        whole[name] = np.concatenate([part.pop(name) for part in parts])
    if np.any(np.diff(whole["first"]) < 0):
        order = np.argsort(whole["first"], kind="stable")
        whole = {name: values[order] for name, values in whole.items()}
    here_from, here_to = spans_of(whole["request"], whole["first"], whole["last"])
    order = np.argsort(here_from, kind="stable")
    return Members(
        base,
        **whole,
        reach=np.maximum.accumulate(whole["last"]),
        here_from=here_from[order],
        here_to=here_to[order],
        here_reach=np.maximum.accumulate(here_to[order]),
    )


def _check(run: Run, members: dict[int, Members]) -> list[str]:
    """Whether a request is in a step twice, or in steps that were not recorded; what to say of those cut off."""
    twice = any(first_overlap(m.request, m.first, m.last) >= 0 for m in members.values())
    strange = set(members) - {int(i["instance"]) for i in run.manifest["instances"]}
    early, late = 0, 0
    for instance, (low, high) in step_ranges(run).items():
        if instance in members:
            early += int((members[instance].first < low - members[instance].base).sum())
            late += int((members[instance].last > high - members[instance].base).sum())
    if twice or strange or (late and run.manifest.get("state") == "complete"):
        check_steps(run, run.scan("steps").collect().sort("instance", "step"))
        check_segments(run, run.scan("segments").collect(), run.scan("steps", ["instance", "step"]).collect())
    said = ((early, "begin before the first"), (late, "reach beyond the last"))
    return [f"{count} segments {what} engine step recorded and were cut there" for count, what in said if count]


def step_ranges(run: Run) -> dict[int, tuple[int, int]]:
    """The numbers of the first and the last step of each instance in steps.parquet; not of one without a number."""
    parts = []
    by_step = row_groups(run.path, "steps", "step")
    for group, place in zip(by_step, row_groups(run.path, "steps", "instance"), strict=True):
        if place.low is not None and place.low == place.high and group.low is not None and group.high is not None:
            parts.append((place.low, group.low, group.high))
        else:
            rows = read_group(group, "steps", ("instance", "step")).drop_nulls()
            ends = (pl.col("step").min().alias("low"), pl.col("step").max().alias("high"))
            parts += rows.group_by("instance").agg(ends).rows()
    known: dict[int, tuple[int, int]] = {}
    for instance, low, high in parts:
        before = known.get(instance, (low, high))
        known[instance] = min(low, before[0]), max(high, before[1])
    return known
