"""The run directory: its tables and manifest, written part by part, readable at any moment.

While a run goes on a table is a folder `NAME.parquet/part-*.parquet`; `compact` makes it one file at the end.
A reader sees the same rows either way. Only this module is seen by `analysis`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tracegen.errors import RunError
from tracegen.schema import TRACE, TRACE_OPTIONAL, write_parquet

SCHEMA_VERSION = "1.0"
MANIFEST = "manifest.json"
_PARTS = "*-*.parquet"  # one that is still being written ends otherwise
_BATCH_ROWS = 1 << 18

REQUESTS = pl.Schema(
    {
        "request_id": pl.UInt64(),
        "instance": pl.UInt16(),
        "scheduled_ns": pl.Int64(),
        "sent_ns": pl.Int64(),
        "headers_ns": pl.Int64(),
        "first_token_ns": pl.Int64(),
        "last_token_ns": pl.Int64(),
        "done_ns": pl.Int64(),
        "input_tokens": pl.UInt32(),  # as the server counted
        "output_tokens": pl.UInt32(),  # as the server counted
        "output_tokens_wanted": pl.UInt32(),
        "cached_tokens": pl.UInt32(),
        "status": pl.String(),
        "http_status": pl.UInt16(),
        "error": pl.String(),
        "worker": pl.UInt16(),
    }
)
REQUESTS_OPTIONAL = pl.Schema({"chunk_ns": pl.List(pl.Int64()), "chunk_tokens": pl.List(pl.UInt16())})
STATUSES = ("ok", "http_error", "stream_error", "connect_error", "timeout", "aborted", "length_mismatch")

STEPS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "step": pl.UInt64(),
        "start_ns": pl.Int64(),
        "end_ns": pl.Int64(),
        "prefill_tokens": pl.UInt32(),
        "decode_tokens": pl.UInt32(),
        "context_tokens": pl.UInt64(),  # sum of the contexts that decode reads, without the step's own tokens
        "prefill_attention": pl.UInt64(),  # sum over prefill chunks of chunk x (tokens before it + chunk / 2)
        "requests": pl.UInt32(),
        "waiting": pl.UInt32(),
        "kv_usage": pl.Float32(),
    }
)
SEGMENTS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "request_id": pl.UInt64(),  # null: warm-up or not ours
        "first_step": pl.UInt64(),
        "last_step": pl.UInt64(),  # inclusive
        "kind": pl.String(),  # prefill | decode
        "tokens_per_step": pl.UInt32(),
        "context_start": pl.UInt32(),  # tokens before first_step
    }
)
ARRIVALS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "request_id": pl.UInt64(),  # null: warm-up or not ours
        "arrival_ns": pl.Int64(),  # when the engine's scheduler got it
    }
)
POWER = pl.Schema(
    {
        "t_ns": pl.Int64(),  # polled
        "sensor_ns": pl.Int64(),  # when the sensor updated
        "host": pl.String(),
        "gpu": pl.UInt16(),  # NVML index
        "power_instant_mw": pl.UInt32(),
        "power_average_mw": pl.UInt32(),
        "energy_mj": pl.UInt64(),
        "sm_clock_mhz": pl.UInt32(),
        "mem_clock_mhz": pl.UInt32(),
        "temperature_c": pl.UInt16(),
        "utilization": pl.UInt8(),
        "throttle_reasons": pl.UInt64(),
    }
)
CPU_ENERGY = pl.Schema(
    {
        "t_ns": pl.Int64(),
        "host": pl.String(),
        "domain": pl.String(),  # package-0, dram-0, ...
        "energy_uj": pl.UInt64(),  # the counter, its wrap-arounds added up
    }
)
SERVER_METRICS = pl.Schema(
    {
        "t_ns": pl.Int64(),
        "instance": pl.UInt16(),
        "name": pl.String(),
        "labels": pl.String(),
        "value": pl.Float64(),
    }
)
TRUTH = pl.Schema(
    {
        "request_id": pl.UInt64(),
        "energy_j": pl.Float64(),
        "prefill_j": pl.Float64(),
        "decode_j": pl.Float64(),
    }
)

TABLES: dict[str, pl.Schema] = {
    "trace": TRACE,
    "requests": REQUESTS,
    "steps": STEPS,
    "segments": SEGMENTS,
    "arrivals": ARRIVALS,
    "power": POWER,
    "cpu_energy": CPU_ENERGY,
    "server_metrics": SERVER_METRICS,
    "truth": TRUTH,
}
_OPTIONAL: dict[str, pl.Schema] = {"trace": TRACE_OPTIONAL, "requests": REQUESTS_OPTIONAL}


def check_table(frame: pl.LazyFrame, table: str, source: Path, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """`frame` with the known columns of `table` in their types; unknown columns are kept.

    `columns`: those of the table that `frame` should have; None: all that a table must have.
    Raises `RunError` naming the file and the column that is missing or of another type.
    """
    have = frame.collect_schema()
    casts = []
    for name in TABLES[table] if columns is None else columns:
        if name not in have:
            raise RunError(f"{source}: column '{name}' is missing; a {table} table has {', '.join(TABLES[table])}")
    known = {**TABLES[table], **_OPTIONAL.get(table, {})}
    for name, dtype in known.items():
        if name not in have or have[name] == dtype:
            continue
        if not _convertible(have[name], dtype):
            raise RunError(f"{source}: column '{name}' is {have[name]}, not {dtype}")
        casts.append(pl.col(name).cast(dtype))
    return frame.with_columns(casts) if casts else frame


def _convertible(have: pl.DataType, want: pl.DataType) -> bool:
    """Whether a column written by another program as `have` may be read as `want` without losing its meaning."""
    if isinstance(have, pl.List) and isinstance(want, pl.List):
        return _convertible(
            pl.DataType.from_python(int) if have.inner is None else _dtype(have.inner), _dtype(want.inner)
        )
    if have == pl.Null:
        return True
    if want == pl.String:
        return isinstance(have, (pl.Categorical, pl.Enum))
    return (have.is_integer() and want.is_numeric()) or (have.is_float() and want.is_float())


def _dtype(inner: Any) -> pl.DataType:
    """An inner type as an instance, whichever way it was written."""
    return inner if isinstance(inner, pl.DataType) else inner()


class PartWriter:
    """Appends frames to one table of a run directory as Parquet parts, each renamed into place when whole."""

    def __init__(self, run_dir: Path, table: str, *, prefix: str = "part") -> None:
        """`prefix` tells the parts of several writers of one table apart."""
        self._folder = run_dir / f"{table}.parquet"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._table = table
        self._prefix = prefix
        self._count = 0

    def append(self, frame: pl.DataFrame, number: int | None = None) -> None:
        """Write `frame` (with all the table's columns) as the next part, or as part `number`; empty, it writes none."""
        if frame.is_empty():
            return
        path = self._folder / f"{self._prefix}-{self._count if number is None else number:06d}.parquet"
        checked = check_table(frame.lazy(), self._table, path).collect()
        write_parquet(checked.to_arrow(compat_level=pl.CompatLevel.oldest()), path)
        self._count += 1


def scan_table(run_dir: Path, table: str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """The rows of `table`, checked, in the order written, whether still in parts or compacted; they are read now.

    `columns`: read these alone.
    Raises `RunError` when the table is missing, empty of parts, damaged or of another shape.
    """
    path = run_dir / f"{table}.parquet"
    if not has_table(run_dir, table):
        raise RunError(f"{run_dir}: has no table {table}.parquet")
    if not path.is_dir():
        return _read_part(path, table, columns).lazy()
    parts = [_read_part(part, table, columns) for part in sorted(path.glob(_PARTS))]
    return pl.concat(parts, how="diagonal_relaxed").lazy()  # parts may differ in optional columns


def _read_part(path: Path, table: str, columns: Sequence[str] | None) -> pl.DataFrame:
    """The checked rows of one file of `table`. Raises `RunError` when it is damaged or of another shape."""
    with _reading(path, table):
        arrow = pq.ParquetFile(path, page_checksum_verification=True).read(columns)
        return _checked(arrow, table, path, columns)


def table_batches(run_dir: Path, table: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """`scan_table`, but some rows at a time: never is the whole table in memory. Raises `RunError` as it does.

    Rows of a part without one of the optional `columns` come without it.
    """
    needed = [name for name in columns if name in TABLES[table]]
    path = run_dir / f"{table}.parquet"
    if not has_table(run_dir, table):
        raise RunError(f"{run_dir}: has no table {table}.parquet")
    for part in sorted(path.glob(_PARTS)) if path.is_dir() else [path]:
        with _reading(part, table), pq.ParquetFile(part, page_checksum_verification=True) as file:
            for rows in file.iter_batches(_BATCH_ROWS, columns=columns):
                yield _checked(pa.Table.from_batches([rows]), table, part, needed)


class RowGroup(NamedTuple):
    """Some consecutive rows of one file of a table, and what the file's statistics say of them, if anything."""

    path: Path
    number: int  # which row group of the file
    rows: int
    low: int | None  # least and greatest value of a column
    high: int | None
    full: frozenset[str]  # columns without a null


def row_groups(run_dir: Path, table: str, column: str) -> list[RowGroup]:
    """The row groups of `table` in the order written, by their statistics of `column`; reads no rows.

    Raises `RunError` when the table is missing or damaged, or has no such column.
    """
    path = run_dir / f"{table}.parquet"
    if not has_table(run_dir, table):
        raise RunError(f"{run_dir}: has no table {table}.parquet")
    groups = []
    for part in sorted(path.glob(_PARTS)) if path.is_dir() else [path]:
        with _reading(part, table), pq.ParquetFile(part) as file:
            empty = file.schema_arrow.empty_table()
            check_table(pl.DataFrame(dict(zip(empty.column_names, empty.columns, strict=True))).lazy(), table, part)
            for number in range(file.num_row_groups):
                meta = file.metadata.row_group(number)
                chunks = {chunk.path_in_schema: chunk.statistics for chunk in map(meta.column, range(meta.num_columns))}
                known = chunks[column]
                low, high = (known.min, known.max) if known is not None and known.has_min_max else (None, None)
                full = frozenset(
                    name for name, s in chunks.items() if s is not None and s.has_null_count and not s.null_count
                )
                groups.append(RowGroup(part, number, meta.num_rows, low, high, full))
    return groups


def read_group(group: RowGroup, table: str, columns: Sequence[str]) -> pl.DataFrame:
    """The checked rows of one of `row_groups`, of `columns` alone. Raises `RunError` when they are damaged."""
    with _reading(group.path, table), pq.ParquetFile(group.path, page_checksum_verification=True) as file:
        return _checked(file.read_row_group(group.number, columns), table, group.path, columns)


def _checked(arrow: pa.Table, table: str, path: Path, columns: Sequence[str] | None) -> pl.DataFrame:
    """`arrow` as a frame of the right shape."""
    arrow.validate(full=True)
    frame = pl.DataFrame(dict(zip(arrow.column_names, arrow.columns, strict=True)))
    return check_table(frame.lazy(), table, path, columns).collect()


@contextmanager
def _reading(path: Path, table: str) -> Iterator[None]:
    """Turn what a damaged file raises into one `RunError`; pyarrow reports one where polars panics."""
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not readable as a {table} table ({why})") from None


def has_table(run_dir: Path, table: str) -> bool:
    """Whether `run_dir` has at least one readable file of `table`."""
    path = run_dir / f"{table}.parquet"
    return path.is_file() or (path.is_dir() and any(path.glob(_PARTS)))


def compact(
    run_dir: Path,
    table: str,
    *,
    sort_by: Sequence[str] = (),
    merge: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> None:
    """Make a table's parts one file, passed through `merge` and sorted by `sort_by` where given.

    A folder without parts becomes an empty table; a table that is one file already, or is not there, stays as it is.
    """
    folder = run_dir / f"{table}.parquet"
    if not folder.is_dir():
        return
    frame = scan_table(run_dir, table).collect() if has_table(run_dir, table) else TABLES[table].to_frame()
    if merge is not None:
        frame = merge(frame)
    if sort_by:
        frame = frame.sort(sort_by, maintain_order=True)
    # A folder and a file cannot share a name: write the file beside it, move the folder away, then rename.
    whole = run_dir / f".{table}.whole.parquet"
    write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), whole)
    aside = run_dir / f".{table}.parts"
    folder.rename(aside)
    whole.replace(folder)
    shutil.rmtree(aside)


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` by rename."""
    path = run_dir / MANIFEST
    partial = run_dir / f".{MANIFEST}.partial"
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=2, allow_nan=False, default=str)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of `run_dir`. Raises `RunError` when it is missing, broken or of a newer major version."""
    path = run_dir / MANIFEST
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run directory; 'replay run TRACE' writes one under runs/")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run_dir}: has no {MANIFEST}, so it is not a run directory") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error})") from None
    version = str(manifest.get("schema_version", "")) if isinstance(manifest, dict) else ""
    major = version.partition(".")[0]
    if not major.isdigit():
        raise RunError(f"{path}: has no schema_version")
    if int(major) > int(SCHEMA_VERSION.partition(".")[0]):
        raise RunError(
            f"{path}: schema_version {version} is newer than this program's {SCHEMA_VERSION}; update wattrace"
        )
    return dict(manifest)


@dataclass(frozen=True)
class Run:
    """One run directory, opened for reading."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open the run directory at `path`, complete or not. Raises `RunError` when it is none."""
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def simulated(self) -> bool:
        """Whether the run's engine was simulated; what derives from such a run says so."""
        return self.manifest.get("engine") == "simulated"

    def has(self, table: str) -> bool:
        """Whether the run has `table`."""
        return has_table(self.path, table)

    def scan(self, table: str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """The rows of `table` (or its `columns` alone), checked. Raises `RunError` when it is missing or wrong."""
        return scan_table(self.path, table, columns)

    def batches(self, table: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The rows of `table`, of `columns` alone, some at a time. Raises `RunError` as `scan` does."""
        return table_batches(self.path, table, columns)
