"""Rows of a table in order of one of its columns, part by part, in bounded memory, however the file orders them.

A file that is nearly in order, as everything that is written while it happens, is read a row group at a time: a group
is read when the least value in it (the file's own statistics) is asked for. Only a file in no order at all ends up in
memory as a whole.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import polars as pl

from replay.rundir import RowGroup, read_group

KEPT_ROWS = 8_000_000  # some hundred MB
READERS = 2
FEW_VALUES = 16
UNKNOWN = -(2**63)  # the least value of a row group that does not tell it

Part = tuple[Any, ...]  # the values of the columns that a table is parted by
Rows = dict[Part, pl.DataFrame]


class Reader:
    """Reads row groups of one table; the first ones that will be asked for again are kept until they are."""

    def __init__(self, table: str, columns: Sequence[str]) -> None:
        self._table, self._columns = table, list(columns)
        self._kept: dict[RowGroup, pl.DataFrame] = {}
        self._room = KEPT_ROWS
        self._lock = Lock()

    def first(self, group: RowGroup) -> pl.DataFrame:
        """The rows of a group that `last` will be asked for. Raises `RunError` where they are damaged."""
        rows = self._kept.get(group)
        if rows is None:
            rows = read_group(group, self._table, self._columns)
            with self._lock:
                if rows.height <= self._room:
                    self._kept[group] = rows
                    self._room -= rows.height
        return rows

    def last(self, group: RowGroup) -> pl.DataFrame:
        """The rows of a group that nobody will ask for again. Raises `RunError` where they are damaged."""
        rows = self._kept.pop(group, None)
        return read_group(group, self._table, self._columns) if rows is None else rows


class OrderedRows:
    """The rows of one table of a run, given out once each, each part's in ascending order of `key`."""

    def __init__(
        self,
        groups: Sequence[RowGroup],
        read: Callable[[RowGroup], pl.DataFrame],
        key: str,
        by: Sequence[str],
        shifts: Mapping[Part, int],
    ) -> None:
        """`groups`: with their statistics of `key`; `by`: the columns that tell the table's parts.

        `shifts`: by how much `key` is ahead in each part that is wanted.
        """
        self._groups = sorted(groups, key=lambda group: UNKNOWN if group.low is None else group.low)
        self._read, self._key, self._by = read, key, list(by)
        self._shifts, self._next = shifts, 0
        self._kept: dict[Part, list[pl.DataFrame]] = {part: [] for part in shifts}

    def until(self, value: int | None) -> Rows:
        """The rows with `key`, less their part's shift, below `value` that were not given out before; None: the rest.

        Rows of equal key stay in the order written; parts of which nothing was ever read are left out. Raises
        `RunError` where rows are damaged.
        """
        latest = max(self._shifts.values(), default=0)
        while self._next < len(self._groups):
            group = self._groups[self._next]
            if value is not None and group.low is not None and group.low >= value + latest:
                break
            self._next += 1
            for part, rows in parted(self._read(group), self._by).items():
                if part in self._kept:
                    self._kept[part].append(rows)
        ready = {}
        for part, kept in self._kept.items():
            if not kept:
                continue
            rows = _in_order(_joined(kept), self._key)
            bound = None if value is None else value + self._shifts[part]
            here = rows.height if bound is None else int(rows[self._key].search_sorted(bound, side="left"))
            self._kept[part] = [rows[here:]]
            ready[part] = rows[:here]
        return ready


def read_ahead(groups: Sequence[RowGroup], read: Callable[[RowGroup], Any]) -> Iterator[Any]:
    """What `read` makes of one of `groups` after the other; the next two are read while one is worked on."""
    with ThreadPoolExecutor(READERS) as readers:
        ahead = deque(readers.submit(read, group) for group in groups[:READERS])
        for group in [*groups[READERS:], *[None] * min(READERS, len(groups))]:
            rows = ahead.popleft().result()
            if group is not None:
                ahead.append(readers.submit(read, group))
            yield rows


def parted(rows: pl.DataFrame, by: Sequence[str]) -> Rows:
    """`rows` by the values of `by`, in the order that they have."""
    parts: Rows = {(): rows}
    for name in by:
        parts = {(*part, value): own for part, mine in parts.items() for value, own in _by_value(mine, name)}
    return parts


def _by_value(rows: pl.DataFrame, name: str) -> list[tuple[Any, pl.DataFrame]]:
    """`rows` by the values of one column; to pick out each of a few is three times as fast as `partition_by`."""
    column = rows[name]
    if rows.height and not column.null_count() and column.min() == column.max():
        return [(column[0], rows)]
    values = column.unique(maintain_order=True)
    if len(values) > FEW_VALUES:
        return [(value, own) for (value,), own in rows.partition_by(name, as_dict=True).items()]
    return [(value, rows.filter(column.eq_missing(value))) for value in values]


def rows_between(
    groups: Sequence[RowGroup],
    read: Callable[[RowGroup], pl.DataFrame],
    key: str,
    by: Sequence[str],
    bounds: Mapping[Part, tuple[int, int]],
) -> Rows:
    """The rows of `groups` with `key` in their part's bounds, `[low, high)`, in ascending order."""
    low = min((low for low, _ in bounds.values()), default=0)
    high = max((high for _, high in bounds.values()), default=0)
    found: dict[Part, list[pl.DataFrame]] = {}
    touched = [g for g in groups if (g.low is None or g.low < high) and (g.high is None or g.high >= low)]
    for several in read_ahead(touched, read):
        for part, rows in parted(several, by).items():
            if part in bounds:
                found.setdefault(part, []).append(rows)
    ready = {}
    for part, frames in found.items():
        rows = _in_order(_joined(frames), key)
        low, high = (int(rows[key].search_sorted(bound, side="left")) for bound in bounds[part])
        ready[part] = rows[low:high]
    return ready


def _joined(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Row groups of one table; files may differ in optional columns."""
    several = list(frames)
    return several[0] if len(several) == 1 else pl.concat(several, how="diagonal_relaxed")


def _in_order(rows: pl.DataFrame, key: str) -> pl.DataFrame:
    return rows if rows[key].is_sorted() else rows.sort(key, maintain_order=True)
