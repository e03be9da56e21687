"""Rows of a table in order of one of its columns, in bounded memory, however the file orders them.

A file that is nearly in order, as everything that is written while it happens, is read a row group at a time: a group
is read when the least value in it (the file's own statistics) is asked for. Only a file in no order at all ends up in
memory as a whole.
"""

from collections.abc import Sequence

import polars as pl

from replay.rundir import RowGroup, Run, read_group, row_groups

UNKNOWN = -(2**63)  # the least value of a row group that does not tell it


class OrderedRows:
    """The rows of one table of a run, given out once each in ascending order of `key`."""

    def __init__(self, run: Run, table: str, key: str, columns: Sequence[str]) -> None:
        """Raises `RunError` where the table is missing or damaged."""
        groups = row_groups(run.path, table, key)
        self._groups = sorted(groups, key=lambda group: UNKNOWN if group.low is None else group.low)
        self._table, self._key, self._columns = table, key, list(columns)
        self._next = 0
        self._rest: pl.DataFrame | None = None

    def until(self, value: int | None) -> pl.DataFrame | None:
        """The rows with `key` below `value` that were not given out before; None: all that are left.

        Rows of equal key stay in the order written; None when nothing was ever read. Raises `RunError` where rows are
        damaged.
        """
        frames = [] if self._rest is None else [self._rest]
        while self._next < len(self._groups):
            group = self._groups[self._next]
            if value is not None and group.low is not None and group.low >= value:
                break
            frames.append(read_group(group, self._table, self._columns))
            self._next += 1
        if not frames:
            return None
        rows = frames[0] if len(frames) == 1 else pl.concat(frames, how="diagonal_relaxed")
        rows = _in_order(rows, self._key)
        here = rows.height if value is None else int(rows[self._key].search_sorted(value, side="left"))
        self._rest = rows[here:]
        return rows[:here]


def rows_between(
    groups: Sequence[RowGroup], table: str, key: str, columns: Sequence[str], bounds: tuple[int, int]
) -> pl.DataFrame | None:
    """The rows of `groups` with `key` in `[low, high)`, in ascending order; None where no group may hold any."""
    low, high = bounds
    frames = [
        read_group(group, table, columns).filter(pl.col(key).is_between(low, high, closed="left"))
        for group in groups
        if (group.low is None or group.low < high) and (group.high is None or group.high >= low)
    ]
    return _in_order(pl.concat(frames, how="diagonal_relaxed"), key) if frames else None


def _in_order(rows: pl.DataFrame, key: str) -> pl.DataFrame:
    return rows if rows[key].is_sorted() else rows.sort(key, maintain_order=True)
