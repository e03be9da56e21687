"""Make the parts of `requests.parquet` one sorted file, some rows at a time: the table may be larger than memory."""

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.rundir import RowGroup, read_group, row_groups
from replay.tables import REQUESTS, REQUESTS_OPTIONAL

_GROUP_BYTES = 4 << 20  # of rows, as they are in memory, in each row group that is written


def compact_requests(run_dir: Path, table: str = "requests") -> None:
    """Make the parts one file, sorted by `scheduled_ns` and `request_id`; a table that is one file stays as it is.

    `table`: `requests`, or `warmup`, which is like it.

    Parts are taken up by the first of their rows. So rows that are scheduled before all that is in later parts are in
    their place, and what is held meanwhile are the rows of parts that reach across one moment: as many as ended while
    the longest of their requests was in flight, however long the run. Raises `RunError` when a part is damaged.
    """
    folder = run_dir / f"{table}.parquet"
    if not folder.is_dir() or not any(folder.glob("*-*.parquet")):
        return
    groups = sorted(row_groups(run_dir, table, "scheduled_ns"), key=_first_ns)
    whole = run_dir / f".{table}.whole.parquet"
    with _Writer(whole) as writer:
        held: list[pl.DataFrame] = []
        for group, later in zip_longest(groups, groups[1:]):
            held.append(read_group(group, table, _columns(group)))
            if later is not None:
                rows, placed = _concat(held), pl.col("scheduled_ns") < _first_ns(later)
                writer.add(rows.filter(placed))
                held = [rows.filter(~placed)]
        writer.add(_concat(held))
    # A folder and a file cannot share a name: the file is written beside it, the folder moved away, the file renamed.
    aside = run_dir / f".{table}.parts"
    folder.rename(aside)
    whole.replace(folder)
    shutil.rmtree(aside)


def _first_ns(group: RowGroup) -> int:
    """When the first of its rows was scheduled."""
    return group.low or 0


def _concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Rows of parts, which may differ in optional columns."""
    return pl.concat(frames, how="diagonal_relaxed")


def _columns(group: RowGroup) -> Sequence[str]:
    """Those of the table's columns that a part has."""
    have = set(pq.read_schema(group.path).names)
    return [name for name in (*REQUESTS, *REQUESTS_OPTIONAL) if name in have]


class _Writer:
    """Writes rows in order, as row groups that are worth it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[pl.DataFrame] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            if kind is None:
                self._write()
            if self._writer is not None:
                self._writer.close()
            whole = kind is None
        finally:
            if not whole:
                self._path.unlink(missing_ok=True)

    def add(self, rows: pl.DataFrame) -> None:
        """Take rows that come before all that are added later."""
        self._rows.append(rows)
        self._bytes += int(rows.estimated_size())
        if self._bytes > _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        rows = _concat(self._rows).sort("scheduled_ns", "request_id", maintain_order=True)
        self._rows, self._bytes = [], 0
        table: pa.Table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", compression_level=3, write_page_checksum=True
            )
        self._writer.write_table(table)
