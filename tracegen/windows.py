"""The rows of a trace, window of time after window of time.

Each window has random streams of its own, so that it is the same whoever makes it. What reaches over from one to the
next is little: the state of a random rate, which is cheap to run through, and the later turns of sessions, for which
as many windows before are made anew as the longest session lasts. Sessions that began before the trace are there, too,
with the turns that fall into it: the rate is the asked one from the start.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from tracegen.durations import NS_PER_S
from tracegen.lengths import sample_lengths
from tracegen.prefixes import HitTally, Ids, block_hashes
from tracegen.rates import RatePath, steps_path
from tracegen.schema import TRACE, TRACE_OPTIONAL
from tracegen.sessions import (
    NONE,
    Ints,
    client_numbers,
    system_lengths,
    system_prompts,
    think_times_s,
    turn_counts,
    unroll,
)
from tracegen.streams import random_stream
from tracegen.workload import Part, Plan

PREFIX_ROWS = 2**15  # at a time where each has a list of blocks, of which a long prompt has a thousand
_IDS_A_WINDOW = 2**32
_BEFORE = 2**30  # windows before the start are numbered from here, beyond those of any trace


def windows(plan: Plan, tally: HitTally) -> Iterator[pl.DataFrame]:
    """The trace's rows of `plan`'s shard in order, in frames that have some; prefix hits go to `tally`.

    Ids are unique: those of requests or sessions that begin in one window are consecutive, those of the next begin at
    the next multiple of 2^32.
    """
    duration_ns, length_ns = plan.workload.duration_ns, plan.window_ns
    shard_start_ns, shard_end_ns = plan.shard_ns
    first = max((shard_start_ns - plan.longest_ns) // length_ns, -(plan.longest_ns // length_ns) - 1)
    rates = [_Rates(plan, part) for part in plan.parts]
    waiting: pl.DataFrame | None = None
    for window in range(min(first, 0), -(-shard_end_ns // length_ns)):
        start_ns, end_ns = max(window * length_ns, -plan.longest_ns), min((window + 1) * length_ns, duration_ns)
        if start_ns >= end_ns:
            continue
        paths = [rate.over(window, start_ns, end_ns) for rate in rates]
        if window < first:
            continue
        rows = _window_rows(plan, paths, window, start_ns)
        rows = rows if waiting is None else pl.concat([waiting, rows])
        if plan.longest_ns:
            waiting = rows.filter(pl.col("arrival_ns") >= end_ns)
            rows = rows.filter(pl.col("arrival_ns") < end_ns)
        if plan.longest_ns or len(plan.parts) > 1:
            rows = rows.sort("arrival_ns", "request_id")
        if start_ns < shard_start_ns or end_ns > shard_end_ns:
            rows = rows.filter(pl.col("arrival_ns").is_between(shard_start_ns, shard_end_ns, closed="left"))
        for part in rows.iter_slices(PREFIX_ROWS) if plan.structure.has_prefixes else [rows] * (rows.height > 0):
            yield _finished(plan, part, tally)


class _Rates:
    """One part's rate, window after window from 0 on: the asked one times the random ones, whose states it keeps."""

    def __init__(self, plan: Plan, part: Part) -> None:
        self._plan, self._part = plan, part
        self._modulations = part.arrivals.modulations
        self._states: list[Any] = [None] * len(self._modulations)
        self._expected = 0.0

    def over(self, window: int, start_ns: int, end_ns: int) -> tuple[RatePath, float]:
        """The rate in `window`, and what is expected before; before the start of the trace it is as at its start."""
        start_s, end_s = start_ns / NS_PER_S, end_ns / NS_PER_S
        share = steps_path(np.array([self._part.share]), np.array([0.0, end_s - start_s]))
        rate = share.times(self._plan.rate.cut(start_s, end_s))
        if window < 0:
            now_rps = float(self._plan.rate.cut(0.0, 1.0).start_rps[0]) * self._part.share
            rate = steps_path(np.array([now_rps]), rate.at_s[[0, -1]])
            rate = _shrunk(rate, self._plan.turns)
            return rate, now_rps / self._plan.turns * start_s
        for i, modulation in enumerate(self._modulations):
            stream = random_stream(self._plan.workload.seed, f"rate {i}{self._part.suffix}", window)
            path, self._states[i] = modulation.path(end_s - start_s, stream, self._states[i])
            rate = rate.times(path)
        rate = _shrunk(rate, self._plan.turns)
        before, self._expected = self._expected, self._expected + float(rate.expected[-1])
        return rate, before


def _shrunk(rate: RatePath, by: float) -> RatePath:
    """The rate of sessions, where requests have `rate` and a session has `by` turns."""
    return rate if by == 1 else RatePath(rate.at_s, rate.start_rps / by, rate.end_rps / by)


def _window_rows(plan: Plan, paths: list[tuple[RatePath, float]], window: int, start_ns: int) -> pl.DataFrame:
    """The requests, or all turns of the sessions, that start in `window`."""
    number = window if window >= 0 else _BEFORE - window
    frames: list[pl.DataFrame] = []
    used = 0
    for i, (part, (rate, before)) in enumerate(zip(plan.parts, paths, strict=True)):
        starts_ns, client = part.arrivals.arrivals_ns(rate, before, plan.workload.seed, window, part.suffix)
        if client is not None:
            client += np.uint64(i * _IDS_A_WINDOW)
        rows = _part_rows(plan, part, window, starts_ns + start_ns, client, number * _IDS_A_WINDOW + used)
        used += len(rows["request_id"])
        frames.append(pl.DataFrame(rows))
    return pl.concat(frames, how="diagonal") if len(frames) > 1 else frames[0]


def _part_rows(
    plan: Plan, part: Part, window: int, starts_ns: Ints, client: Ids | None, first_id: int
) -> dict[str, Any]:
    """The columns of the requests of sessions (or of single requests) that start at `starts_ns`, session by session."""
    structure, seed, suffix = plan.structure, plan.workload.seed, part.suffix
    if client is None and structure.clients:
        client = client_numbers(structure, starts_ns.size, seed, window, suffix)
    each: dict[str, Ids] = {} if client is None else {"client_id": client}
    if structure.system_prompts:
        each["system"] = system_prompts(structure, starts_ns.size, seed, window, suffix)
    if not structure.has_sessions:
        ids = np.arange(first_id, first_id + starts_ns.size, dtype=np.uint64)
        lengths = _lengths(part, np.ones(starts_ns.size, np.int64), seed, window)
        return {"request_id": ids, "arrival_ns": starts_ns, **lengths, **each}
    counts = turn_counts(structure, starts_ns.size, seed, window, suffix)
    lengths = _lengths(part, counts, seed, window)
    own, output = (lengths[f"{side}_tokens"].astype(np.int64) for side in ("input", "output"))
    thinks_s = think_times_s(structure, own.size, seed, window, suffix)
    turns = unroll(starts_ns, counts, own, output, thinks_s)
    ids = np.arange(first_id, first_id + own.size, dtype=np.uint64)
    firsts = turns.place == 0
    columns = {
        "request_id": ids,
        "arrival_ns": turns.arrival_ns,
        **lengths,
        "input_tokens": turns.input_tokens,
        **{name: values[turns.session] for name, values in each.items()},
        "session_id": (np.uint64(first_id) + turns.session.astype(np.uint64)),
        "parent_id": np.where(firsts, NONE, ids - np.uint64(1)),
        "parent_ns": np.where(firsts, -1, np.concatenate((turns.arrival_ns[:1], turns.arrival_ns[:-1]))),
        "think_ns": turns.think_ns,
        "known_tokens": turns.known_tokens,
    }
    keep = turns.keep(structure, output, plan.longest_ns, starts_ns)
    return {
        name: values.filter(keep) if isinstance(values, pl.Series) else values[keep] for name, values in columns.items()
    }


def _lengths(part: Part, counts: Ints, seed: int, window: int) -> dict[str, Any]:
    """Lengths and labels of sessions with so many turns; a session is of one mix."""
    total = int(counts.sum())
    if len(part.mixes) == 1:
        mix = part.mixes[0][0]
        tokens = sample_lengths(mix, total, seed, window, part.suffix)
        return {"input_tokens": tokens[0], "output_tokens": tokens[1], "label": pl.repeat(mix.name, total, eager=True)}
    shares = [share for _, share in part.mixes]
    chosen = np.repeat(random_stream(seed, "label", window).choice(len(shares), counts.size, p=shares), counts)
    sides = np.empty((2, total), np.uint32)
    for k, (mix, _) in enumerate(part.mixes):
        sides[:, chosen == k] = sample_lengths(mix, int((chosen == k).sum()), seed, window, f" {mix.name}")
    names = pl.Series([mix.name for mix, _ in part.mixes])
    return {"input_tokens": sides[0], "output_tokens": sides[1], "label": names.gather(chosen)}


def _finished(plan: Plan, rows: pl.DataFrame, tally: HitTally) -> pl.DataFrame:
    """`rows` as a trace has them: nulls, prefix hashes, the schema's types and order."""
    if plan.structure.has_sessions:
        # The turn before was before the trace: what it left is history, but no request here.
        has_parent = pl.col("parent_ns") >= 0
        rows = rows.with_columns(
            pl.when(has_parent).then("parent_id"),
            pl.when(has_parent).then("think_ns"),
            pl.when(has_parent).then("known_tokens").otherwise(-1),
        )
    if plan.structure.has_prefixes:
        rows = rows.with_columns(_prefix_hashes(plan, rows, tally))
    known = {**TRACE, **TRACE_OPTIONAL}
    return rows.select(pl.col(name).cast(dtype) for name, dtype in known.items() if name in rows.columns)


def _prefix_hashes(plan: Plan, rows: pl.DataFrame, tally: HitTally) -> pl.Series:
    """The hashes of the blocks that another request may have, and the count of those that one before had."""
    structure = plan.structure
    inputs = rows["input_tokens"].cast(pl.Int64).to_numpy()
    nobody = np.zeros(rows.height, np.uint64)
    system = rows["system"].to_numpy() if structure.system_prompts else nobody
    # A prompt's last token is its own: a system prompt may fill the rest.
    of_system = np.minimum(system_lengths(structure, system), inputs - 1) * (structure.system_prompts > 0)
    system_blocks = of_system // structure.block_tokens
    if structure.has_sessions:
        owner, blocks = rows["session_id"].to_numpy(), inputs // structure.block_tokens
        known = rows["known_tokens"].to_numpy()
    else:
        owner, blocks, known = nobody, system_blocks, np.full(rows.height, -1)
    tally.add(inputs, np.where(known >= 0, known // structure.block_tokens, -1), system, system_blocks)
    return block_hashes(owner, blocks, system, system_blocks).alias("prefix_hashes")
