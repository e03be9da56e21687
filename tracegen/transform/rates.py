"""Another rate: by thinning or superposing, which keep bursts as they are, or by a warp of time, which does not."""

import math
from typing import Any

import numpy as np
import polars as pl

from tracegen.describe import rate_rps
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.schema import check_trace
from tracegen.streams import random_stream
from tracegen.transform.units import PART, join_copies, unit_numbers

MAX_ROWS = 20_000_000  # at about 250 bytes each while they are made, 5 GB


def scale(frame: pl.DataFrame, target_rps: float, seed: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    """`frame` at a mean of `target_rps`, and what was done: the method, its parameters, the rates before and after.

    To a lower rate by thinning: each request, or each session as a whole, is kept with probability target/current,
    independently; ids, lengths and times stay, and so does the course of the rate over the trace. To a higher rate by
    superposing: the trace itself, whole copies of it and one thinned copy, each turned around the trace's span by a
    random time of its own; requests and sessions get new ids, and copies prefix hashes of their own. A session that the
    turn cuts in two goes on as another session without a parent, as one does that began before the trace. Burstiness
    then changes as it does when independent streams split or merge. Gaps are never stretched or compressed, which would
    make bursts of another length: that is `warp`.

    Raises `TraceError` for a rate that is not positive, a trace with no rate, turns without sessions, more rows than
    fit in memory, and when thinning keeps nothing.
    """
    if not (math.isfinite(target_rps) and target_rps > 0):
        raise TraceError(f"rate {target_rps:g} is not a positive number of requests per second")
    current_rps = rate_rps(frame)
    if current_rps is None:
        raise TraceError("a trace without two different arrival times has no rate to scale from")
    ratio = target_rps / current_rps
    if ratio <= 1:
        scaled, how = _thin(frame, ratio, random_stream(seed, "thin")), {"keep_probability": ratio}
    else:
        scaled = _superpose(frame, ratio, current_rps, seed)
        how = {"whole_copies": math.floor(ratio), "thinned_copy_keep_probability": ratio - math.floor(ratio)}
    if scaled.is_empty():
        raise TraceError(
            f"thinning {frame.height} requests to {target_rps:g} per second kept none; choose a higher rate"
        )
    done = {
        "method": "thinning" if ratio <= 1 else "superposing",
        "rate_before_rps": current_rps,
        "rate_target_rps": target_rps,
        "rate_after_rps": rate_rps(scaled),
        **how,
    }
    return check_trace(scaled, "the scaled trace"), done


def warp(frame: pl.DataFrame, time_scale: float) -> pl.DataFrame:
    """`frame` with all times `time_scale` times as long: 2 takes twice as long at half the rate, 0.5 the other way.

    Arrivals and think times alike, so bursts are stretched or compressed: their requests stay, their length changes.
    Answers take no longer: with a scale below 1 a turn may be due before its parent is answered, which `replay run
    --think-time` waits for. Raises `TraceError` for a scale that is not positive, and for times beyond 292 years.
    """
    if not (math.isfinite(time_scale) and time_scale > 0):
        raise TraceError(f"time scale {time_scale:g} is not a positive number; 2 is twice as slow, 0.5 twice as fast")
    names = [name for name in ("arrival_ns", "think_ns") if name in frame.columns]
    if any(float(frame[name].max() or 0) * time_scale >= 2**63 for name in names):  # type: ignore[arg-type]
        raise TraceError(f"time scale {time_scale:g} makes times of more than 292 years; use a smaller one")
    return frame.with_columns((pl.col(name) * time_scale).round().cast(pl.Int64) for name in names)


def _thin(frame: pl.DataFrame, keep_probability: float, stream: np.random.Generator) -> pl.DataFrame:
    """Each session of `frame`, or each row without one, with probability `keep_probability`, independently."""
    unit = unit_numbers(frame)
    kept = stream.random(int(unit.max()) + 1) < keep_probability
    return frame.filter(pl.Series(kept[unit]))


def _superpose(frame: pl.DataFrame, ratio: float, current_rps: float, seed: int) -> pl.DataFrame:
    """`ratio` times as many rows: `frame`, shifted copies and a shifted, thinned copy, in order of arrival."""
    refuse_more_than_fit(frame.height * ratio, "use a lower rate")
    unit_numbers(frame)  # refuses turns that cannot be told apart
    first_ns, circle_ns = int(frame["arrival_ns"][0]), whole_circle_ns(frame, current_rps)
    shifts_ns = random_stream(seed, "shift").integers(0, circle_ns, math.floor(ratio)).tolist()
    copies = [frame] + [_turn(frame, first_ns, circle_ns, shift_ns) for shift_ns in shifts_ns]
    copies[-1] = _thin(copies[-1], ratio - math.floor(ratio), random_stream(seed, "thin"))
    return join_copies(copies)


def whole_circle_ns(frame: pl.DataFrame, current_rps: float) -> int:
    """The circle that copies turn in holds n gaps: the span and one mean gap more, between the last and the first."""
    return round(frame.height / current_rps * NS_PER_S)


def refuse_more_than_fit(rows: float, instead: str) -> None:
    """Raise `TraceError` for so many `rows`, if memory may not hold them."""
    if rows > MAX_ROWS:
        raise TraceError(
            f"{rows:.3g} requests would result, and at most {MAX_ROWS:,} are made at once; "
            f"{instead} or slice the trace first"
        )


def _turn(frame: pl.DataFrame, first_ns: int, circle_ns: int, shift_ns: int) -> pl.DataFrame:
    """`frame` with its arrivals `shift_ns` later, those beyond the circle's end back at its start, as another part."""
    later = pl.col("arrival_ns") - first_ns + shift_ns
    return frame.with_columns(later % circle_ns + first_ns, (later // circle_ns).cast(pl.Int32).alias(PART))
