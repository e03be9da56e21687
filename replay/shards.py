"""The rows that each load worker sends, cut before the start: workers share nothing while they run.

A shard is a file of fixed-size rows and one of the rows' prefix hashes, which a worker reads as it goes: its memory
does not grow with the trace, and it needs no library that reads Parquet.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = ".shards"
NONE = -1
# request_id, arrival_ns, think_ns, parent_id, input_tokens, output_tokens, priority, prefix hashes, instance
ROW = struct.Struct("<QqqQIIiIh")
_BLOCK_ROWS = 1024


class Row(NamedTuple):
    """A request to send."""

    request_id: int
    arrival_ns: int  # from the run's epoch
    think_ns: int  # from the end of `parent_id`; NONE: it is sent at its arrival
    parent_id: int
    input_tokens: int
    output_tokens: int
    priority: int
    hash_count: int
    instance: int  # replay.router.LEAST_LOADED: the one with the least to do
    hashes: tuple[int, ...] = ()


def shard_path(run_dir: Path, worker: int) -> Path:
    """Where the rows of `worker` are."""
    return run_dir / FOLDER / f"{worker}.rows"


def hashes_path(run_dir: Path, worker: int) -> Path:
    """Where the prefix hashes of these rows are: UInt64, one row's behind the other's."""
    return run_dir / FOLDER / f"{worker}.hashes"


def read_rows(run_dir: Path, worker: int) -> Iterator[Row]:
    """The rows of `worker`, in the order of their arrival."""
    with shard_path(run_dir, worker).open("rb") as rows, hashes_path(run_dir, worker).open("rb") as hashes:
        while block := rows.read(ROW.size * _BLOCK_ROWS):
            for fields in ROW.iter_unpack(block):
                row = Row._make((*fields, ()))
                if row.hash_count:
                    own = struct.unpack(f"<{row.hash_count}Q", hashes.read(8 * row.hash_count))
                    row = row._replace(hashes=own)
                yield row
