"""Make the parts of a table one sorted file, some rows at a time: the table may be larger than memory."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.rundir import has_table, read_rows, table_files
from replay.tables import TABLES

_GROUP_BYTES = 4 << 20  # of rows, as they are in memory, in each row group that is written
_LEAST = -(2**63)  # stands for null, which is sorted before all numbers
Key = tuple[int, ...]  # values of the first columns that a table is sorted by


@dataclass(frozen=True)
class Merge:
    """How rows of a table are joined, however often, and which rows no other row can be joined to."""

    join: Callable[[pl.DataFrame], pl.DataFrame]
    whole_before: Callable[[pl.DataFrame, Key], Key]  # rows before it are whole when all that come have a key or more


class _Group(NamedTuple):
    """A row group of a part, and a key that none of its rows comes before."""

    low: Key
    path: Path
    number: int


def compact(run_dir: Path, table: str, sort_by: Sequence[str] = (), merge: Merge | None = None) -> None:
    """Make a table's parts one file, merged by `merge` and sorted by `sort_by` where given.

    A folder without parts becomes an empty table; a table that is one file already, or is not there, stays as it is.

    Row groups are taken up by the first of their rows. So rows that come before all that is in later ones are in
    their place, and what is held meanwhile are the rows of parts that reach across one moment: of requests as many as
    ended while the longest of them was in flight, however long the run. Raises `RunError` when a part is damaged.
    """
    folder = run_dir / f"{table}.parquet"
    if not folder.is_dir():
        return
    # Two tell enough; those of requests are of no order in time, and may have 64 bits.
    keys = [name for name in sort_by[:2] if TABLES[table][name].is_integer() and name != "request_id"]
    groups, schema = _groups(run_dir, table, keys)
    whole = run_dir / f".{table}.whole.parquet"
    with _Writer(whole, schema, sort_by) as writer:
        held, new_bytes = [schema.to_frame()], 0
        for group, later in zip_longest(groups, groups[1:]):
            new = list(read_rows(group.path, table, group.number))
            held, new_bytes = held + new, new_bytes + sum(int(rows.estimated_size()) for rows in new)
            if later is not None and keys and new_bytes > _GROUP_BYTES // 4:
                rows, before = _concat(held), later.low
                if merge is not None:
                    rows = merge.join(rows)
                    before = merge.whole_before(rows, before)
                placed = _comes_before(keys, before)
                writer.add(rows.filter(placed))
                held, new_bytes = [rows.filter(~placed)], 0
        rows = _concat(held)
        writer.add(rows if merge is None else merge.join(rows))
    # A folder and a file cannot share a name: the file is written beside it, the folder moved away, the file renamed.
    aside = run_dir / f".{table}.parts"
    folder.rename(aside)
    whole.replace(folder)
    shutil.rmtree(aside)


def _groups(run_dir: Path, table: str, keys: Sequence[str]) -> tuple[list[_Group], pl.Schema]:
    """All row groups, by their lowest keys, and all columns of the parts, which may differ in optional ones."""
    columns: dict[str, pl.DataType] = dict(TABLES[table])
    groups = []
    for path in table_files(run_dir, table) if has_table(run_dir, table) else ():
        with pq.ParquetFile(path) as file:
            known = pl.Schema(file.schema_arrow)
            columns |= {name: known[name] for name in known if name not in columns}
            groups += [_Group(low, path, number) for number, low in enumerate(_lows(file.metadata, keys))]
    return sorted(groups, key=lambda group: group.low), pl.Schema(columns)


def _lows(file: pq.FileMetaData, keys: Sequence[str]) -> Iterator[Key]:
    """Of each row group a key that none of its rows comes before: the least of all where its statistics do not say."""
    for number in range(file.num_row_groups):
        group = file.row_group(number)
        least: dict[str, int] = {}
        for chunk in map(group.column, range(group.num_columns)):
            told = chunk.statistics
            if chunk.path_in_schema in keys and told is not None and told.has_min_max and not told.null_count:
                least[chunk.path_in_schema] = told.min
        # Without nulls only: they are sorted before all numbers.
        yield tuple(least.get(name, _LEAST) for name in keys)


def _comes_before(keys: Sequence[str], key: Key) -> pl.Expr:
    """Whether a row comes before all those with `key`, and so does none of its own."""
    before, same = pl.lit(value=False), pl.lit(value=True)
    for name, value in zip(keys, key, strict=False):
        column = pl.col(name).cast(pl.Int64).fill_null(_LEAST)
        before |= same & (column < value)
        same &= column == value
    return before


def _concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Rows of parts, which may differ in optional columns."""
    return pl.concat(frames, how="diagonal_relaxed")


class _Writer:
    """Writes rows in order, as row groups that are worth it."""

    def __init__(self, path: Path, schema: pl.Schema, sort_by: Sequence[str]) -> None:
        self._path, self._sort_by = path, sort_by
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._rows = [schema.to_frame()]
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
        rows = _concat(self._rows)
        if self._sort_by:
            rows = rows.sort(self._sort_by, maintain_order=True)
        self._rows, self._bytes = [self._schema.to_frame()], 0
        table: pa.Table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", compression_level=3, write_page_checksum=True
            )
        if len(table):
            self._writer.write_table(table)
