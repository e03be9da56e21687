"""The trace table: its columns, the rules that its rows keep, checked reading and writing.

Both directions check the same rules; an error names the file, the row (counted from 0) and the column.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tracegen.errors import TraceError

SCHEMA_VERSION = "1.0"
_EARLIER = "is earlier than the row before; sort the trace by arrival_ns"
_NOT_OURS = ("ARROW:", "pandas", "huggingface")  # what libraries leave in a Parquet file's metadata

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
        "priority": pl.Int32(),  # lower goes first, where the server schedules by priority; null: 0
    }
)


def check_trace(frame: pl.DataFrame, source: str, first_row: int = 0) -> pl.DataFrame:
    """`frame` with its known columns in the schema's types and order; unknown columns are kept, behind them.

    Raises `TraceError` naming `source`, row (in a part of a trace counted from its `first_row` on) and column for a
    missing column, a type that does not convert without loss, a null, a zero length, a negative or decreasing arrival,
    or a repeated `request_id`.
    """
    missing = [name for name in TRACE if name not in frame.columns]
    if missing:
        raise TraceError(
            f"{source}: column '{missing[0]}' is missing; a trace has {', '.join(TRACE)} "
            f"(this file has {', '.join(frame.columns)}); to convert another format use 'tracegen import'"
        )
    known = pl.Schema({**TRACE, **{n: t for n, t in TRACE_OPTIONAL.items() if n in frame.columns}})
    frame = frame.select(
        *(_cast(frame, name, dtype, source, first_row) for name, dtype in known.items()),
        *(name for name in frame.columns if name not in known),
    )

    def refuse(name: str, wrong: pl.Expr, why: str) -> None:
        _refuse(frame, wrong, name, source, why, first_row)

    for name in TRACE:
        refuse(name, pl.col(name).is_null(), "is null")
    if frame.is_empty():
        raise TraceError(f"{source}: the trace has no rows; synthesize one with 'tracegen synth'")
    refuse("arrival_ns", pl.col("arrival_ns") < 0, "is negative; arrivals count from the trace's start")
    refuse("arrival_ns", pl.col("arrival_ns").diff().fill_null(0) < 0, _EARLIER)
    for name in ("input_tokens", "output_tokens"):
        refuse(name, pl.col(name) == 0, "is zero; a request has at least one token each way")
    if frame["request_id"].n_unique() < frame.height:
        refuse("request_id", ~pl.col("request_id").is_first_distinct(), "occurs twice; ids are unique")
    return frame


def _cast(frame: pl.DataFrame, name: str, dtype: pl.DataType, source: str, first_row: int) -> pl.Series:
    """Column `name` as `dtype`; a value that does not convert is named with its row."""
    series = frame[name]
    if series.dtype == dtype:
        return series
    if not _convertible(series.dtype, dtype):
        raise TraceError(f"{source}: column '{name}' is {series.dtype}, not {dtype}")
    if series.dtype.is_float():
        _refuse(frame, pl.col(name) != pl.col(name).round(), name, source, "is not a whole number", first_row)
    cast = series.cast(dtype, strict=False)
    lost = cast.is_null() & series.is_not_null()
    if dtype.is_nested():
        lost |= cast.list.eval(pl.element().is_null()).list.sum() > series.list.eval(pl.element().is_null()).list.sum()
    _refuse(frame, lost, name, source, f"does not fit {dtype}", first_row)
    return cast


def _convertible(have: pl.DataType, want: pl.DataType) -> bool:
    """Whether values written as `have` can mean what `want` does; a duration's count, say, has a unit of its own."""
    if have == pl.Null:
        return True
    if isinstance(have, pl.List) and isinstance(want, pl.List):
        return have.inner == pl.Null or have.inner.is_integer()
    if want == pl.String:
        return isinstance(have, (pl.Categorical, pl.Enum))
    return want.is_integer() and (have.is_integer() or have.is_float())


def _refuse(frame: pl.DataFrame, wrong: pl.Expr | pl.Series, name: str, source: str, why: str, first_row: int) -> None:
    """Raise `TraceError` for the first row where `wrong` holds."""
    mask = wrong if isinstance(wrong, pl.Series) else frame.select(wrong).to_series()
    row = mask.arg_max() if mask.any() else None
    if row is not None:
        (value,) = frame[name].slice(row, 1).to_list()
        value = "value" if value is None else value
        raise TraceError(f"{source}: row {first_row + row}, column '{name}': {value} {why}")


def read_trace(path: str | Path) -> pl.DataFrame:
    """The trace at `path`, checked.

    Raises `TraceError` when it is missing, not Parquet, of a newer major version, or breaks a rule.
    """
    frame, metadata = read_table(path)
    _check_metadata(frame.columns, metadata, path)
    return check_trace(frame, str(path))


def read_table(path: str | Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The rows and the file metadata of the Parquet file at `path`, whatever its columns.

    Raises `TraceError` when it is missing, not Parquet, or damaged.
    """
    with _reading(path):
        # By pyarrow, which reports a damaged file where polars panics; and a path is a path, never a pattern.
        file = pq.ParquetFile(path, page_checksum_verification=True)
        table = file.read()
        table.validate(full=True)
        # Whole, for column by column it would import pyarrow.compute, 8 MiB; without metadata, of which polars panics
        # where it is no UTF-8.
        return pl.DataFrame(table.replace_schema_metadata()), _own_metadata(file.metadata.metadata)


def read_trace_parts(path: str | Path, rows: int) -> Iterator[pl.DataFrame]:
    """The trace at `path` in parts of at most `rows`, in memory for one of them, each checked as it is read.

    Raises what `read_trace` does, but that an id occurs twice only where it does so within a part.
    """
    with _reading(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        names, metadata = file.schema_arrow.names, _own_metadata(file.metadata.metadata)
    _check_metadata(names, metadata, path)
    first_row, latest_ns = 0, 0
    with file:
        batches = file.iter_batches(rows)
        while True:
            with _reading(path):
                batch = next(batches, None)
                if batch is None:
                    break
                batch.validate(full=True)
                frame = pl.DataFrame(pa.Table.from_batches([batch]).replace_schema_metadata())
            frame = check_trace(frame, str(path), first_row)
            if (arrival_ns := int(frame["arrival_ns"][0])) < latest_ns:
                raise TraceError(f"{path}: row {first_row}, column 'arrival_ns': {arrival_ns} {_EARLIER}")
            first_row, latest_ns = first_row + frame.height, int(frame["arrival_ns"][-1])
            yield frame
    if not first_row:
        check_trace(pl.DataFrame(file.schema_arrow.remove_metadata().empty_table()), str(path))  # says what is missing


def _check_metadata(columns: Sequence[str], metadata: Mapping[str, Any], path: str | Path) -> None:
    """Raise `TraceError` where the file is of a newer major version, or its blocks have no size."""
    version = str(metadata.get("schema_version", SCHEMA_VERSION))
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise TraceError(f"{path}: schema_version {version}, and this program reads {SCHEMA_VERSION}; update wattrace")
    check_blocks(columns, metadata, path)


def check_blocks(columns: Sequence[str], metadata: Mapping[str, Any], path: str | Path) -> None:
    """Raise `TraceError` where `columns` name prefix hashes, but `metadata` do not say how many tokens a block has."""
    block_tokens = metadata.get("block_tokens")
    if "prefix_hashes" in columns and not (type(block_tokens) is int and block_tokens > 0):
        raise TraceError(
            f"{path}: has prefix_hashes, but block_tokens in its file metadata is {block_tokens}; "
            "write there how many tokens a block has"
        )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The trace's own file metadata (generator, seed, parameters, source); empty where it has none.

    Raises `TraceError` when the file is missing or not Parquet.
    """
    with _reading(path):
        return _own_metadata(pq.read_metadata(path).metadata)


def _own_metadata(raw: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The file's metadata: JSON where it is JSON, text where it is not; `schema_version` is always text."""
    found: dict[str, Any] = {}
    for raw_key, raw_value in (raw or {}).items():
        key, value = raw_key.decode("utf-8", "replace"), raw_value.decode("utf-8", "replace")
        if key.startswith(_NOT_OURS):
            continue
        try:
            found[key] = value if key == "schema_version" else json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _as_text(value: Any) -> str:
    """`value` as file metadata keeps it: plain text, or JSON where text alone would be read as something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, sort_keys=True)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn what a missing or damaged file raises into one `TraceError`."""
    try:
        yield
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; synthesize one with 'tracegen synth --mix chat -o {path}'") from None
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{path}: not a readable Parquet file ({why})") from None


def write_trace(frame: pl.DataFrame, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write the checked `frame` with `metadata` (JSON values), by rename: a killed writer leaves no half file.

    The bytes depend on the values in `frame` and `metadata` alone, not on their memory layout or key order.
    Raises `TraceError` when `frame` breaks a rule or `path` cannot be written.
    """
    path = Path(path)
    check_blocks(frame.columns, metadata, path)
    table = check_trace(frame, str(path)).rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    try:
        write_parquet(table.replace_schema_metadata(file_metadata(metadata)), path)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from None


def file_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`metadata` (JSON values) as a trace's file keeps it."""
    keys = {"schema_version": str(metadata.get("schema_version", SCHEMA_VERSION))}
    return keys | {key: _as_text(metadata[key]) for key in sorted(metadata) if key != "schema_version"}


def save_trace(
    frame: pl.DataFrame,
    path: str | Path,
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    source: str | Path | None = None,
) -> None:
    """`write_trace`, but only over what can be made again: see `check_output`.

    Raises `TraceError` for any other file that exists at `path`, unless `force`.
    """
    check_output(path, force=force, source=source)
    write_trace(frame, path, metadata)


def check_output(path: str | Path, *, force: bool = False, source: str | Path | None = None) -> None:
    """Raise `TraceError` where a trace may not be written to `path`, unless `force`.

    That is over `source`, and over any file that is not a trace that names its generator.
    """
    path = Path(path)
    if path.exists() and not force:
        if source is not None and path.samefile(source):
            raise TraceError(f"{path}: is the input itself; choose another output, or overwrite it with --force")
        if not _remakable(path):
            raise TraceError(f"{path}: exists and is no trace made here; choose another output, or --force")


def _remakable(path: Path) -> bool:
    """Whether `path` is a trace whose metadata say how it was made."""
    try:
        return "generator" in read_metadata(path)
    except TraceError:
        return False


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` with zstd to a hidden neighbour of `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Checksums, so that a flipped bit is an error and not another number.
        pq.write_table(table, partial, compression="zstd", compression_level=3, write_page_checksum=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
