"""Make the parts of `requests.parquet` one sorted file, some rows at a time: the table may be larger than memory."""

import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.rundir import REQUESTS, REQUESTS_OPTIONAL, RowGroup, read_group, row_groups

_GROUP_BYTES = 4 << 20  # of rows, as they are in memory, in each row group that is written


def compact_requests(run_dir: Path) -> None:
    """Make the parts one file, sorted by `scheduled_ns` and `request_id`; a table that is one file stays as it is.

    Parts follow each other by the ends of their requests. So rows that are scheduled before all that is in later parts
    are in their place, and what is held meanwhile are about as many rows as requests were in flight.
    Raises `RunError` when a part is damaged.
    """
    folder = run_dir / "requests.parquet"
    if not folder.is_dir() or not any(folder.glob("*-*.parquet")):
        return
    groups = sorted(row_groups(run_dir, "requests", "scheduled_ns"), key=_number)
    whole = run_dir / ".requests.whole.parquet"
    with _Writer(whole) as writer:
        lows = [group.low if group.low is not None else 0 for group in groups]
        later = [*list(accumulate(reversed(lows), min))[::-1][1:], None]  # the least of all later parts
        held: pl.DataFrame | None = None
        for group, bound in zip(groups, later, strict=True):
            rows = read_group(group, "requests", _columns(group))
            held = rows if held is None else pl.concat([held, rows], how="diagonal_relaxed")
            if bound is None:
                writer.add(held)
            else:
                placed = pl.col("scheduled_ns") < bound
                writer.add(held.filter(placed))
                held = held.filter(~placed)
    # A folder and a file cannot share a name: the file is written beside it, the folder moved away, the file renamed.
    aside = run_dir / ".requests.parts"
    folder.rename(aside)
    whole.replace(folder)
    shutil.rmtree(aside)


def _number(group: RowGroup) -> tuple[str, str, int]:
    """Parts of the same second stand beside each other, whichever worker's they are."""
    name, _, number = group.path.stem.rpartition("-")
    return number, name, group.number


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
        if kind is None:
            self._write()
        if self._writer is not None:
            self._writer.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def add(self, rows: pl.DataFrame) -> None:
        """Take rows that come before all that are added later."""
        self._rows.append(rows)
        self._bytes += int(rows.estimated_size())
        if self._bytes > _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        rows = pl.concat(self._rows, how="diagonal_relaxed").sort("scheduled_ns", "request_id", maintain_order=True)
        self._rows, self._bytes = [], 0
        table: pa.Table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", compression_level=3, write_page_checksum=True
            )
        self._writer.write_table(table)
