"""What must stay together: the turns of a session, or a request alone. And new numbers for copies of them."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tracegen.errors import TraceError
from tracegen.prefixes import mixed

# Columns while copies are made; with a blank, as no column of a trace has.
COPY, PART, NUMBER, PARENT = "copy of", "part of", "new number", "parent's number"


def unit_numbers(frame: pl.DataFrame) -> NDArray[np.int64]:
    """The number of each row's unit, from 0 in order of first arrival: its session, or the row alone.

    Raises `TraceError` for turns (`parent_id`) without sessions.
    """
    if not _used(frame, "session_id"):
        if _used(frame, "parent_id"):
            raise TraceError(
                "the trace has parent_id, but no session_id that says which turns belong together; "
                "import it anew, or drop column parent_id"
            )
        return np.arange(frame.height)
    row, session = pl.col("row"), pl.col("session_id")
    first = pl.when(session.is_null()).then(row).otherwise(row.min().over(session))
    rows = frame.select("session_id").with_row_index("row")
    return rows.select(first.rank("dense").cast(pl.Int64) - 1).to_series().to_numpy()


def _used(frame: pl.DataFrame, name: str) -> bool:
    return name in frame.columns and frame[name].null_count() < frame.height


def without_lost_parents(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` with no parent and no think time where the turn before is not in it: that is history now."""
    if "parent_id" not in frame.columns:
        return frame
    there = pl.col("parent_id").is_in(frame["request_id"].implode())
    names = [name for name in ("parent_id", "think_ns") if name in frame.columns]
    return frame.with_columns(pl.when(there).then(pl.col(name)).alias(name) for name in names)


def join_copies(copies: Sequence[pl.DataFrame], *, clients: bool = False) -> pl.DataFrame:
    """The rows of all `copies` in order of arrival, with new ids.

    Sessions and, with `clients`, clients of different copies are different. A turn keeps its parent where that is in
    the same copy and part of it (column `PART`). Copies after the first get prefix hashes of their own: independent
    traffic does not hit another's cache.
    """
    marked = [_salted(copy, k) for k, copy in enumerate(copies)]
    marked = [
        frame.with_columns(pl.lit(k, pl.Int64).alias(COPY), *([] if PART in frame.columns else [pl.lit(0).alias(PART)]))
        for k, frame in enumerate(marked)
    ]
    merged = pl.concat(marked, how="diagonal_relaxed").sort("arrival_ns", maintain_order=True)
    merged = merged.with_columns(pl.int_range(pl.len(), dtype=pl.UInt64).alias(NUMBER))
    if "parent_id" in merged.columns:
        places = merged.select(COPY, PART, pl.col("request_id").alias("parent_id"), pl.col(NUMBER).alias(PARENT))
        merged = merged.join(places, on=[COPY, PART, "parent_id"], how="left", maintain_order="left")
        known = pl.col(PARENT) < pl.col(NUMBER)
        names = {"parent_id": PARENT, "think_ns": "think_ns"}
        merged = merged.with_columns(
            pl.when(known).then(pl.col(source)).alias(name) for name, source in names.items() if name in merged.columns
        ).drop(PARENT)
    for name, keys in (("session_id", (COPY, PART)), ("client_id", (COPY,) if clients else None)):
        if name in merged.columns and keys is not None:
            first = pl.col(NUMBER).min().over(*keys, name)  # a number that is nobody else's
            merged = merged.with_columns(pl.when(pl.col(name).is_not_null()).then(first).alias(name))
    return merged.with_columns(request_id=NUMBER).drop(NUMBER, COPY, PART)


def _salted(frame: pl.DataFrame, copy: int) -> pl.DataFrame:
    """`frame` with the prefix hashes of its `copy`; 0 has the trace's own."""
    if copy == 0 or "prefix_hashes" not in frame.columns:
        return frame
    salt = int(mixed(np.array([copy], dtype=np.uint64))[0])
    hashes = pl.col("prefix_hashes").cast(pl.List(pl.UInt64))
    return frame.with_columns(hashes.list.eval(pl.element() ^ pl.lit(salt, pl.UInt64)))
