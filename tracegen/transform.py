"""Make a trace from a trace: another rate, or a part of its time. Each row stays a whole request."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tracegen.describe import rate_rps
from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import TraceError
from tracegen.schema import check_trace, file_sha256, read_metadata, read_trace
from tracegen.streams import random_stream
from tracegen.synthesize import MAX_ROWS


def scale(frame: pl.DataFrame, target_rps: float, seed: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    """`frame` at a mean of `target_rps`, and what was done: the method, its parameters, the rates before and after.

    To a lower rate by thinning: each request is kept with probability target/current, independently; ids, lengths and
    times stay, and so does the course of the rate over the trace. To a higher rate by superposing: the trace itself,
    whole copies of it and one thinned copy, each turned around the trace's span by a random time of its own; requests
    get new ids. Burstiness then changes as it does when independent streams split or merge. Gaps are never
    stretched or compressed, which would make bursts of another length.

    Raises `TraceError` for a rate that is not positive, a trace with no rate, rows that depend on each other (see
    `_refuse_columns`), more rows than fit in memory, and when thinning keeps nothing.
    """
    if not (math.isfinite(target_rps) and target_rps > 0):
        raise TraceError(f"rate {target_rps:g} is not a positive number of requests per second")
    _refuse_columns(frame, "scale", ("session_id", "parent_id", "think_ns"))
    current_rps = rate_rps(frame)
    if current_rps is None:
        raise TraceError("a trace without two different arrival times has no rate to scale from")
    ratio = target_rps / current_rps
    if ratio <= 1:
        scaled, how = _thin(frame, ratio, random_stream(seed, "thin")), {"keep_probability": ratio}
    else:
        _refuse_columns(frame, "scale up", ("prefix_hashes",))
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


def cut(frame: pl.DataFrame, start_ns: int, duration_ns: int) -> pl.DataFrame:
    """The requests that arrive in [`start_ns`, `start_ns` + `duration_ns`) of `frame`; the slice's time starts at 0.

    Ids and lengths stay. Raises `TraceError` when none arrives then, and for sessions: turns depend on each other.
    """
    _refuse_columns(frame, "slice", ("session_id", "parent_id", "think_ns"))
    arrival_ns = pl.col("arrival_ns")
    # `start_ns + duration_ns` may be beyond int64; the difference of two arrivals' times is not.
    part = frame.filter(arrival_ns >= start_ns).with_columns(arrival_ns - start_ns).filter(arrival_ns < duration_ns)
    if part.is_empty():
        first, last = (format_duration(frame["arrival_ns"][i]) for i in (0, -1))
        raise TraceError(
            f"no request arrives in the {format_duration(duration_ns)} from {format_duration(start_ns)}; "
            f"this trace's arrive from {first} to {last}"
        )
    return part


def scale_trace(path: str | Path, target_rps: float, seed: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    """`scale` for the trace at `path`, with the metadata to write with it; raises `TraceError` as `scale` does."""
    frame, done = scale(read_trace(path), target_rps, seed)
    return frame, {"generator": "tracegen scale", "seed": seed, "parameters": done, **_derived_from(path)}


def slice_trace(path: str | Path, start_ns: int, duration_ns: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    """`cut` for the trace at `path`, with the metadata to write with it; raises `TraceError` as `cut` does."""
    frame = cut(read_trace(path), start_ns, duration_ns)
    parameters = {"start_ns": start_ns, "duration_ns": duration_ns}
    return frame, {"generator": "tracegen slice", "parameters": parameters, **_derived_from(path)}


def _derived_from(path: str | Path) -> dict[str, Any]:
    """Metadata that names the file a trace was made from, with that file's own: the whole way back to its origin."""
    metadata = read_metadata(path)
    source = {"file": Path(path).name, "sha256": file_sha256(path), "metadata": metadata}
    return {"source": source, **{key: metadata[key] for key in ("block_tokens",) if key in metadata}}


def _thin(frame: pl.DataFrame, keep_probability: float, stream: np.random.Generator) -> pl.DataFrame:
    """Each row of `frame` with probability `keep_probability`, independently."""
    return frame.filter(pl.Series(stream.random(frame.height) < keep_probability))


def _superpose(frame: pl.DataFrame, ratio: float, current_rps: float, seed: int) -> pl.DataFrame:
    """`ratio` times as many rows: `frame`, shifted copies and a shifted, thinned copy, in order of arrival."""
    if frame.height * ratio > MAX_ROWS:
        raise TraceError(
            f"{frame.height * ratio:.3g} requests would result, and at most {MAX_ROWS:,} are made at once; "
            "use a lower rate or slice the trace first"
        )
    # The circle that copies turn in holds n gaps: the span and one mean gap more, between the last and the first.
    first_ns, circle_ns = int(frame["arrival_ns"][0]), round(frame.height / current_rps * NS_PER_S)
    shifts_ns = random_stream(seed, "shift").integers(0, circle_ns, math.floor(ratio)).tolist()
    copies = [frame] + [_turn(frame, first_ns, circle_ns, shift_ns) for shift_ns in shifts_ns]
    copies[-1] = _thin(copies[-1], ratio - math.floor(ratio), random_stream(seed, "thin"))
    merged = pl.concat(copies).sort("arrival_ns", maintain_order=True)
    return merged.with_columns(request_id=pl.int_range(pl.len(), dtype=pl.UInt64))


def _turn(frame: pl.DataFrame, first_ns: int, circle_ns: int, shift_ns: int) -> pl.DataFrame:
    """`frame` with its arrivals `shift_ns` later, those beyond the circle's end back at its start."""
    return frame.with_columns((pl.col("arrival_ns") - first_ns + shift_ns) % circle_ns + first_ns)


def _refuse_columns(frame: pl.DataFrame, verb: str, names: tuple[str, ...]) -> None:
    """Raise `TraceError` for a column through which rows depend on each other.

    Dropping or shifting a turn breaks its session, and a copy with the same prefix hashes would hit the cache of its
    original, which independent traffic does not.
    """
    present = [name for name in names if name in frame.columns and frame[name].null_count() < frame.height]
    if present:
        raise TraceError(f"cannot {verb} a trace with column '{present[0]}': its requests depend on each other")
