"""Some of a trace's rows, or the same rows changed: slice, clamp, sample, relabel."""

from typing import Literal

import numpy as np
import polars as pl

from tracegen.durations import format_duration
from tracegen.errors import TraceError
from tracegen.streams import random_stream
from tracegen.transform.units import unit_numbers, without_lost_parents


def cut(frame: pl.DataFrame, start_ns: int, duration_ns: int) -> pl.DataFrame:
    """The requests that arrive in [`start_ns`, `start_ns` + `duration_ns`) of `frame`; the slice's time starts at 0.

    Ids and lengths stay. A turn whose parent arrived before keeps its input, which holds what was said, but has no
    parent any more. Raises `TraceError` when no request arrives then.
    """
    arrival_ns = pl.col("arrival_ns")
    # `start_ns + duration_ns` may be beyond int64; the difference of two arrivals' times is not.
    part = frame.filter(arrival_ns >= start_ns).with_columns(arrival_ns - start_ns).filter(arrival_ns < duration_ns)
    if part.is_empty():
        first, last = (format_duration(frame["arrival_ns"][i]) for i in (0, -1))
        raise TraceError(
            f"no request arrives in the {format_duration(duration_ns)} from {format_duration(start_ns)}; "
            f"this trace's arrive from {first} to {last}"
        )
    return without_lost_parents(part)


def clamp(
    frame: pl.DataFrame, max_context: int, how: Literal["drop", "clip"], block_tokens: int | None = None
) -> tuple[pl.DataFrame, int]:
    """`frame` with no request of more than `max_context` tokens of input and output, and how many were changed.

    `drop` leaves such requests out, and with one the turns after it, which build on it. `clip` shortens the output to
    `max_context` - 1 where it must, and the input to what is left; prefix hashes then end with the input, for which
    `block_tokens` is needed where there are any. Raises `TraceError` for a context below 2, and when nothing is left.
    """
    if max_context < 2:
        raise TraceError(f"a context of {max_context} tokens holds no request; use 2 or more")
    tokens = frame.select(pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens")).to_series()
    over = tokens > max_context
    if how == "drop":
        # Rows are in order of arrival, so what follows in a unit are the later turns.
        fits = (
            pl.DataFrame({"unit": unit_numbers(frame), "over": over})
            .select(~pl.col("over").cum_max().over("unit"))
            .to_series()
        )
        if not fits.any():
            raise TraceError(f"no request fits into a context of {max_context} tokens; use a larger one, or --clip")
        return without_lost_parents(frame.filter(fits)), int((~fits).sum())
    output = pl.min_horizontal(pl.col("output_tokens"), pl.lit(max_context - 1, pl.UInt32))
    shorter = frame.with_columns(
        output, pl.min_horizontal(pl.col("input_tokens"), max_context - output).cast(pl.UInt32).alias("input_tokens")
    )
    if "prefix_hashes" in frame.columns and block_tokens:
        whole = pl.col("input_tokens") // block_tokens
        clipped = pl.col("prefix_hashes").list.head(whole)
        shorter = shorter.with_columns(pl.when(over).then(clipped).otherwise("prefix_hashes").alias("prefix_hashes"))
    return shorter, int(over.sum())


def sample(frame: pl.DataFrame, requests: int, seed: int) -> pl.DataFrame:
    """`requests` of `frame`'s requests, drawn without replacement; times and ids stay.

    Where there are sessions they are drawn whole, in a random order, as long as they fit; then there may be a few
    requests less. Raises `TraceError` for more than there are, or when no session fits.
    """
    if not 1 <= requests <= frame.height:
        raise TraceError(f"cannot sample {requests} of {frame.height} requests; use a number from 1 to {frame.height}")
    unit = unit_numbers(frame)
    sizes = np.bincount(unit)
    order = random_stream(seed, "sample").permutation(sizes.size)
    kept = np.zeros(sizes.size, dtype=np.bool_)
    kept[order[np.cumsum(sizes[order]) <= requests]] = True
    if not kept.any():
        raise TraceError(f"the session drawn first has more than {requests} requests; use more, or another seed")
    return frame.filter(pl.Series(kept[unit]))


def relabel(frame: pl.DataFrame, label: str, only: str | None = None) -> tuple[pl.DataFrame, int]:
    """`frame` with `label` on every row, or on those that have the label `only`; and how many rows that is.

    Raises `TraceError` when none has the label `only`.
    """
    if only is None:
        return frame.with_columns(label=pl.lit(label)), frame.height
    labels = frame["label"] if "label" in frame.columns else pl.Series([None], dtype=pl.String)
    chosen = int((labels == only).sum())
    if not chosen:
        there = ", ".join(labels.drop_nulls().unique().sort().to_list()) or "none"
        raise TraceError(f"no request has the label '{only}'; the labels are {there}")
    return frame.with_columns(label=pl.when(pl.col("label") == only).then(pl.lit(label)).otherwise("label")), chosen
