"""Sort batches by time in bounded memory: sorted runs on disk, merged.

A run is held in memory while it grows; where one holds everything nothing is written.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from tracegen.importers.base import Batches
from tracegen.sources import no_room

RUN_BYTES = 32 << 20  # of rows in memory; sorting holds a copy more
PART_BYTES = 1 << 20  # of each run in memory while runs are merged
BATCH_BYTES = 8 << 20  # or more, to a batch that goes out, where runs are merged
_KEY = ("_time_ns", "_line")  # so equal times keep the file's order


def sort_batches(batches: Batches, run_bytes: int = RUN_BYTES, part_bytes: int = PART_BYTES) -> Batches:
    """The rows of `batches` by `_time_ns`, those of one time by `_line`; columns are the same in all."""
    with tempfile.TemporaryDirectory(prefix="tracegen-sort-") as folder:
        runs: list[Path] = []
        held: list[pl.DataFrame] = []
        for batch in batches:
            held.append(batch)
            if sum(frame.estimated_size() for frame in held) >= run_bytes:
                runs.append(_spill(_sorted(held), Path(folder) / f"{len(runs)}.arrow", part_bytes))
                held = []
        if not runs:
            if held:
                yield _sorted(held)
            return
        if held:
            runs.append(_spill(_sorted(held), Path(folder) / f"{len(runs)}.arrow", part_bytes))
        yield from _joined(_merged(runs))


def _sorted(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames).sort(_KEY, maintain_order=True)


def _spill(frame: pl.DataFrame, path: Path, part_bytes: int) -> Path:
    """Write a sorted run in parts that are read one at a time."""
    part_rows = max(1, int(frame.height * part_bytes / frame.estimated_size()))
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    try:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=part_rows)
    except OSError as error:
        raise no_room(path, error) from None
    return path


def _parts(path: Path) -> Iterator[pl.DataFrame]:
    with pa.OSFile(str(path)) as opened:  # not mapped: what was read would count as memory of this process
        file = pa.ipc.open_file(opened)
        for k in range(file.num_record_batches):
            yield pl.DataFrame(file.get_batch(k))


def _joined(parts: Batches) -> Batches:
    """The rows of `parts` in fewer batches."""
    held: list[pl.DataFrame] = []
    for part in parts:
        held.append(part)
        if sum(frame.estimated_size() for frame in held) >= BATCH_BYTES:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


def _merged(paths: list[Path]) -> Batches:
    """Merge runs: what is not after the earliest end of the parts in memory is whole, and goes out sorted."""
    runs = [_parts(path) for path in paths]
    heads = [next(run) for run in runs]
    while runs:
        ends = [head.select(_KEY).row(-1) for head in heads]
        time_ns, line = min(ends)
        whole = (pl.col("_time_ns") < time_ns) | ((pl.col("_time_ns") == time_ns) & (pl.col("_line") <= line))
        counts = [int(head.select(whole.sum()).item()) for head in heads]
        yield _sorted([head.head(n) for head, n in zip(heads, counts, strict=True)])
        rests = [head.slice(n) for head, n in zip(heads, counts, strict=True)]
        heads = [rest if rest.height else next(run, rest) for run, rest in zip(runs, rests, strict=True)]
        going = [k for k, head in enumerate(heads) if head.height]
        runs, heads = [runs[k] for k in going], [heads[k] for k in going]
