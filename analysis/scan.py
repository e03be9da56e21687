"""Tables of a run read lazily: only the columns that a question asks for, when it is answered.

Every page is checked against its checksum, which `pl.scan_parquet` does not do: a flipped bit is an error and not
another number. A column of 1.75 million steps takes 14 ms so, 9 ms with `pl.scan_parquet`.
"""

from collections.abc import Callable, Iterator, Sequence

import polars as pl
import pyarrow.parquet as pq
from polars.io.plugins import register_io_source

from replay.rundir import Run, row_groups
from replay.tables import TABLES, check_table

Rows = Callable[[Sequence[str]], Iterator[pl.DataFrame]]


def scan(run: Run, table: str) -> pl.LazyFrame:
    """The rows of `table` in the order written, in parts or compacted; parts may differ in optional columns.

    Raises `RunError` now when the table is missing or of another shape, and when it is read where rows are damaged.
    """
    schema = table_schema(run, table)

    def rows(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for frame in run.batches(table, columns):
            missing = [pl.lit(None, schema[name]).alias(name) for name in columns if name not in frame.columns]
            yield frame.with_columns(missing)

    return deferred(schema, rows)


def table_schema(run: Run, table: str) -> pl.Schema:
    """The columns of `table`, those of all its parts; reads no rows. Raises `RunError` as `scan` does."""
    frames = []
    paths = dict.fromkeys(group.path for group in row_groups(run.path, table, next(iter(TABLES[table]))))
    for path in paths:
        empty = pq.read_schema(path).empty_table()
        frame = pl.DataFrame(dict(zip(empty.column_names, empty.columns, strict=True))).lazy()
        frames.append(check_table(frame, table, path).collect())
    # A table without a row group has no path here, and no columns but those that it must have.
    return pl.concat(frames, how="diagonal_relaxed").schema if frames else TABLES[table]


def deferred(schema: pl.Schema, rows: Rows) -> pl.LazyFrame:
    """A frame whose rows `rows` gives when they are needed, and of whose columns only those that are.

    `rows` is given the names of the columns wanted; its frames have these at least.
    """

    def source(
        columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = list(schema) if columns is None else columns
        left = limit
        for given in rows(wanted):
            frame = given.select(pl.col(name).cast(schema[name]) for name in wanted)
            if left is not None:
                frame = frame.head(left)
                left -= frame.height
            yield frame if predicate is None else frame.filter(predicate)
            if left == 0:
                return

    return register_io_source(source, schema=schema)
