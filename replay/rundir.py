"""The run directory: its tables and manifest, written part by part, readable at any moment.

While a run goes on a table is a folder `NAME.parquet/part-*.parquet`; `replay.compaction` makes it one file at the
end. A reader sees the same rows either way. Of `replay`, `analysis` sees this module and `replay.tables`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.tables import TABLES, check_table, named
from tracegen.errors import RunError
from tracegen.schema import write_parquet

SCHEMA_VERSION = "1.0"
MANIFEST = "manifest.json"
_PARTS = "*-*.parquet"  # one that is still being written ends otherwise
_MAGIC = b"PAR1"  # what a Parquet file ends with
_ENDED = ("complete", "interrupted", "failed")  # states of a run whose tables nobody writes any more
_BATCH_ROWS = 1 << 18


class PartWriter:
    """Appends frames to one table of a run directory as Parquet parts, each renamed into place when whole."""

    def __init__(self, run_dir: Path, table: str, *, prefix: str = "part") -> None:
        """`prefix` tells the parts of several writers of one table apart."""
        self._folder = run_dir / f"{table}.parquet"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._table = table
        self._prefix = prefix
        self._count = 0

    def append(self, frame: pl.DataFrame | pa.Table, number: int | None = None) -> None:
        """Write `frame` (with all the table's columns) as the next part, or as part `number`; empty, it writes none.

        A frame's types are checked; an Arrow table is taken to have the right ones.
        """
        if not len(frame):
            return
        path = self._folder / f"{self._prefix}-{self._count if number is None else number:06d}.parquet"
        if isinstance(frame, pl.DataFrame):
            frame = (
                check_table(frame.lazy(), self._table, path).collect().to_arrow(compat_level=pl.CompatLevel.oldest())
            )
        write_parquet(frame, path)
        self._count += 1


def scan_table(run_dir: Path, table: str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """The rows of `table`, checked, in the order written, whether still in parts or compacted; they are read now.

    `columns`: read these alone.
    Raises `RunError` when the table is missing, empty of parts, damaged or of another shape.
    """
    parts = [_read_part(part, table, columns) for part in table_files(run_dir, table)]
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
    for part in table_files(run_dir, table):
        with _reading(part, table), pq.ParquetFile(part, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):  # who wrote them knew how large rows are
                for rows in file.iter_batches(_BATCH_ROWS, [number], columns):
                    yield _checked(pa.Table.from_batches([rows]), table, part, needed)


def read_rows(path: Path, table: str, number: int) -> Iterator[pl.DataFrame]:
    """All columns of one row group of a file of `table`, some rows at a time. Raises `RunError` as the others do."""
    with _reading(path, table), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for rows in file.iter_batches(_BATCH_ROWS, [number]):
            yield _checked(pa.Table.from_batches([rows]), table, path, None)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Some consecutive rows of one file of a table, and what the file's statistics say of them, if anything."""

    path: Path
    file: pq.FileMetaData
    number: int  # which row group of the file
    rows: int
    low: int | None  # least and greatest value of a column
    high: int | None
    full: frozenset[str]  # columns without a null
    same: Mapping[str, int | str]  # columns with one value in all rows


def row_groups(run_dir: Path, table: str, column: str) -> list[RowGroup]:
    """The row groups of `table` in the order written, by their statistics of `column`; reads no rows.

    Raises `RunError` when the table is missing or damaged, or has no such column.
    """
    groups = []
    for part in table_files(run_dir, table):
        with _reading(part, table), pq.ParquetFile(part) as file:
            check_table(pl.Schema(file.schema_arrow).to_frame().lazy(), table, part)  # empty_table() imports pandas
            for number in range(file.num_row_groups):
                meta = file.metadata.row_group(number)
                chunks = {chunk.path_in_schema: chunk.statistics for chunk in map(meta.column, range(meta.num_columns))}
                known = {name: s for name, s in chunks.items() if s is not None and s.has_min_max}
                low, high = (known[column].min, known[column].max) if column in known else (None, None)
                full = frozenset(
                    name for name, s in chunks.items() if s is not None and s.has_null_count and not s.null_count
                )
                same = {
                    n: s.min for n, s in known.items() if n in full and type(s.min) in {int, str} and s.min == s.max
                }
                groups.append(RowGroup(part, file.metadata, number, meta.num_rows, low, high, full, same))
    return groups


def read_group(group: RowGroup, table: str, columns: Sequence[str]) -> pl.DataFrame:
    """The checked rows of one of `row_groups`, of `columns` alone. Raises `RunError` when they are damaged."""
    # What is the same in all rows, as most columns of a host are, need not be read. One is, for a frame to have rows.
    read = [n for n in columns if n not in group.same] or list(columns[:1])
    whole = pq.ParquetFile(group.path, metadata=group.file, page_checksum_verification=True)
    with _reading(group.path, table), whole as file:
        rows = _checked(file.read_row_group(group.number, read), table, group.path, read)
    told = [pl.lit(group.same[n], TABLES[table][n]).alias(n) for n in columns if n in group.same and n not in read]
    return rows.with_columns(told).select(n for n in columns if n in rows.columns or n in group.same)


def _checked(arrow: pa.Table, table: str, path: Path, columns: Sequence[str] | None) -> pl.DataFrame:
    """`arrow` as a frame of the right shape."""
    arrow.validate(full=True)
    frame = pl.DataFrame(arrow)
    return check_table(frame.lazy(), table, path, columns).collect()


@contextmanager
def _reading(path: Path, table: str) -> Iterator[None]:
    """Turn what a damaged file raises into one `RunError`; pyarrow reports one where polars panics."""
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not readable as {named(table)} ({why})") from None


def has_table(run_dir: Path, table: str) -> bool:
    """Whether `run_dir` has at least one readable file of `table`."""
    path = run_dir / f"{table}.parquet"
    return path.is_file() or any(map(_whole, path.glob(_PARTS)))


def table_files(run_dir: Path, table: str) -> list[Path]:
    """The files of `table` in the order written, without the parts that a run that has not ended left torn.

    Raises `RunError` where there is none, or a run has ended and has a torn one.
    """
    path = run_dir / f"{table}.parquet"
    if path.is_file():
        return [path]
    parts = sorted(path.glob(_PARTS))
    torn = [part for part in parts if not _whole(part)]
    if torn and read_manifest(run_dir).get("state") in _ENDED:
        raise RunError(f"{torn[0]}: not readable as {named(table)} (torn), though the run has ended")
    if len(torn) == len(parts):
        raise RunError(f"{run_dir}: has no table {table}.parquet")
    return [part for part in parts if part not in torn]


def _whole(part: Path) -> bool:
    """Whether a file was written to its end."""
    with part.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_MAGIC), 0))
        return file.read() == _MAGIC


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` by rename."""
    path = run_dir / MANIFEST
    partial = run_dir / f".{MANIFEST}.partial"
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=2, allow_nan=False, default=str)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise RunError(f"{path}: has no schema_version, so it is not a run's; a run's says \"{SCHEMA_VERSION}\"")
    version = str(manifest["schema_version"])
    major = version.partition(".")[0]
    if not (major.isascii() and major.isdigit()):
        raise RunError(f"{path}: key 'schema_version' is {version!r}, not a number as \"{SCHEMA_VERSION}\"")
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

    def files(self, table: str) -> list[Path]:
        """The files of `table` that can be read. Raises `RunError` as `scan` does."""
        return table_files(self.path, table)

    def torn(self) -> list[str]:
        """Parts of tables that are left out, for they were not written to their ends."""
        parts = self.path.glob(f"*.parquet/{_PARTS}")
        return [f"{part.parent.name}/{part.name}" for part in sorted(parts) if not _whole(part)]

    def scan(self, table: str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """The rows of `table` (or its `columns` alone), checked. Raises `RunError` when it is missing or wrong."""
        return scan_table(self.path, table, columns)

    def batches(self, table: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The rows of `table`, of `columns` alone, some at a time. Raises `RunError` as `scan` does."""
        return table_batches(self.path, table, columns)
