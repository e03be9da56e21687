"""The trace table: its columns, the rules that its rows keep, checked reading and writing.

Both directions check the same rules; an error names the file, the row (counted from 0) and the column.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tracegen.errors import TraceError

SCHEMA_VERSION = "1.0"

TRACE = pl.Schema(
    {
        "request_id": pl.UInt64(),
        "arrival_ns": pl.Int64(),  # from the trace's start
        "input_tokens": pl.UInt32(),
        "output_tokens": pl.UInt32(),
    }
)
TRACE_OPTIONAL = pl.Schema(
    {
        "client_id": pl.UInt64(),
        "session_id": pl.UInt64(),
        "parent_id": pl.UInt64(),  # the turn before
        "think_ns": pl.Int64(),  # from the end of the parent to this turn
        "model": pl.String(),
        "label": pl.String(),  # the mix or source that a request came from
        "prefix_hashes": pl.List(pl.UInt64()),  # one per block of `block_tokens` (file metadata)
    }
)


def check_trace(frame: pl.DataFrame, source: str) -> pl.DataFrame:
    """`frame` with its known columns in the schema's types and order; unknown columns are kept, behind them.

    Raises `TraceError` naming `source`, row and column for a missing column, a type that does not convert
    without loss, a null, a zero length, a negative or decreasing arrival, or a repeated `request_id`.
    """
    missing = [name for name in TRACE if name not in frame.columns]
    if missing:
        raise TraceError(
            f"{source}: column '{missing[0]}' is missing; a trace has {', '.join(TRACE)} "
            f"(this file has {', '.join(frame.columns)}); to convert another format use 'tracegen import'"
        )
    known = pl.Schema({**TRACE, **{n: t for n, t in TRACE_OPTIONAL.items() if n in frame.columns}})
    frame = frame.select(
        *(_cast(frame, name, dtype, source) for name, dtype in known.items()),
        *(name for name in frame.columns if name not in known),
    )
    for name in TRACE:
        _refuse(frame, pl.col(name).is_null(), name, source, "is null")
    if frame.is_empty():
        raise TraceError(f"{source}: the trace has no rows; synthesize one with 'tracegen synth'")
    _refuse(frame, pl.col("arrival_ns") < 0, "arrival_ns", source, "is negative; arrivals count from the trace's start")
    _refuse(
        frame,
        pl.col("arrival_ns").diff().fill_null(0) < 0,
        "arrival_ns",
        source,
        "is earlier than the row before; sort the trace by arrival_ns",
    )
    for name in ("input_tokens", "output_tokens"):
        _refuse(frame, pl.col(name) == 0, name, source, "is zero; a request has at least one token each way")
    if frame["request_id"].n_unique() < frame.height:
        _refuse(frame, ~pl.col("request_id").is_first_distinct(), "request_id", source, "occurs twice; ids are unique")
    return frame


def _cast(frame: pl.DataFrame, name: str, dtype: pl.DataType, source: str) -> pl.Series:
    """Column `name` as `dtype`; a value that does not convert is named with its row."""
    series = frame[name]
    if series.dtype == dtype:
        return series
    if dtype.is_integer() and series.dtype.is_float():
        _refuse(frame, pl.col(name) != pl.col(name).round(), name, source, "is not a whole number")
    try:
        cast = series.cast(dtype, strict=False)
    except pl.exceptions.PolarsError:
        raise TraceError(f"{source}: column '{name}' is {series.dtype}, not {dtype}") from None
    _refuse(frame, cast.is_null() & series.is_not_null(), name, source, f"does not fit {dtype}")
    return cast


def _refuse(frame: pl.DataFrame, wrong: pl.Expr | pl.Series, name: str, source: str, why: str) -> None:
    """Raise `TraceError` for the first row where `wrong` holds."""
    mask = wrong if isinstance(wrong, pl.Series) else frame.select(wrong).to_series()
    row = mask.arg_max() if mask.any() else None
    if row is not None:
        value = frame[name][row]
        raise TraceError(f"{source}: row {row}, column '{name}': {value} {why}")


def read_trace(path: str | Path) -> pl.DataFrame:
    """The trace at `path`, checked. Raises `TraceError` when it is missing, not Parquet, or breaks a rule."""
    try:
        frame = pl.read_parquet(path)
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; synthesize one with 'tracegen synth --mix chat -o {path}'") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TraceError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    return check_trace(frame, str(path))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The trace's own file metadata (generator, seed, parameters, source); empty where it has none."""
    raw = pq.read_schema(path).metadata or {}
    return {
        key.decode().removeprefix("wattrace."): json.loads(value)
        for key, value in raw.items()
        if key.startswith(b"wattrace.")
    }


def write_trace(frame: pl.DataFrame, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write the checked `frame` with `metadata`, by rename: a killed writer leaves no half file.

    The bytes depend on `frame` and `metadata` alone.
    """
    path = Path(path)
    table = check_trace(frame, str(path)).to_arrow(compat_level=pl.CompatLevel.oldest())
    document = {"schema_version": SCHEMA_VERSION, **metadata}
    keys = {f"wattrace.{key}": json.dumps(value, sort_keys=True) for key, value in document.items()}
    table = table.replace_schema_metadata(keys)
    write_parquet(table, path)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` with zstd to a hidden neighbour of `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, partial, compression="zstd", compression_level=3)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
