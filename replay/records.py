"""From the load workers' logs to `requests.parquet`, a part a second; and what a kill left of them."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from replay import reqlog, shards
from replay.reqlog import files, number_of, owner_of
from replay.rundir import REQUESTS, PartWriter, read_manifest
from replay.stream import Record
from tracegen.errors import ReplayError

_FLUSH_S = 1.0
_ROW_BYTES = 250  # of a request, in the log and in the table
_TOKEN_BYTES = 14  # of a token's time and count, likewise
_COPIES = 2.5  # parts and the table made of them stand beside each other for a while
_SPARE_BYTES = 64 << 20  # for power, steps and logs


async def finish_in_thread(write: Callable[[], None]) -> None:
    """Run `write` in a thread. A caller that is cancelled still waits for its end: two writers would race."""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


def to_frame(records: Sequence[Record], *, save_chunks: bool = True) -> pl.DataFrame:
    """`requests.parquet` rows of `records`, with or without the time and tokens of each chunk."""
    frame = pl.DataFrame({name: [getattr(r, name) for r in records] for name in REQUESTS}, schema=REQUESTS)
    if not save_chunks:
        return frame
    times = b"".join(r.chunk_ns.tobytes() for r in records)
    tokens = b"".join(b"" if r.chunk_tokens is None else r.chunk_tokens.tobytes() for r in records)
    sizes = [len(r.chunk_ns) for r in records]
    known = [None if r.chunk_tokens is None else len(r.chunk_tokens) for r in records]
    return frame.with_columns(
        _lists("chunk_ns", sizes, pa.int64(), times), _lists("chunk_tokens", known, pa.uint16(), tokens)
    )


def _lists(name: str, sizes: Sequence[int | None], inner: pa.DataType, values: bytes) -> pl.Series:
    """A column of lists of `inner`: `values` cut into `sizes`, None for a null.

    Made of buffers: what makes Arrow arrays of Python's lists imports pandas where it is installed, 30 MiB.
    """
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum([size or 0 for size in sizes], out=ends[1:])
    valid = np.packbits([size is not None for size in sizes], bitorder="little")
    flat = pa.Array.from_buffers(inner, int(ends[-1]), [None, pa.py_buffer(values)])
    buffers = [pa.py_buffer(valid.tobytes()), pa.py_buffer(ends.tobytes())]
    lists = pa.Array.from_buffers(pa.large_list(inner), len(sizes), buffers, children=[flat])
    return pl.Series(name, lists)


class RecordStore:
    """Stores what the workers of a run have logged; memory is bounded by what a second brings."""

    def __init__(self, run_dir: Path, *, save_chunks: bool = True) -> None:
        """Where the logs and the table are."""
        self._run_dir, self._save_chunks = run_dir, save_chunks
        (run_dir / "requests.parquet").mkdir(exist_ok=True)

    def store(self, *, rest: bool = False) -> int:
        """Store the files that are whole, or with the `rest` those too that a kill cut off.

        How many records were stored. Raises `OSError` when the table cannot be written.
        """
        return sum(self._store(path) for path in files(self._run_dir, cut_off=rest))

    def _store(self, path: Path) -> int:
        """Store one file as the part of its name, and remove it."""
        records: list[Record] = []
        writer = PartWriter(self._run_dir, "requests", prefix=owner_of(path))
        # A part is renamed into place when it is whole: its log was not removed in time, and says nothing new.
        if not (self._run_dir / "requests.parquet" / f"{path.stem}.parquet").exists():
            records = list(reqlog.read(path))
            writer.append(to_frame(records, save_chunks=self._save_chunks), number_of(path))
        path.unlink()
        return len(records)

    def _store_whole(self) -> None:
        self.store()

    def _store_rest(self) -> None:
        self.store(rest=True)

    async def store_forever(self) -> None:
        """Store once a second until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await finish_in_thread(self._store_whole)

    async def close(self) -> None:
        """Store what is left, once the workers have ended, and remove what they were given."""
        await finish_in_thread(self._store_rest)
        _clear(self._run_dir)


def recover(run_dir: Path) -> int:
    """Store what a killed run's workers had logged; how many records that were.

    Raises `RunError` when `run_dir` is no run directory, `OSError` when it cannot be written.
    """
    stored = 0
    if files(run_dir, cut_off=True):
        arguments = read_manifest(run_dir).get("arguments", {})
        stored = RecordStore(run_dir, save_chunks=arguments.get("save_chunks") is not False).store(rest=True)
    _clear(run_dir)
    return stored


def left_over(run_dir: Path) -> int:
    """How many records are in logs that no part has yet: more than none after a kill."""
    stored = {path.stem for path in (run_dir / "requests.parquet").glob("*.parquet")}
    return sum(sum(1 for _ in reqlog.read(path)) for path in files(run_dir, cut_off=True) if path.stem not in stored)


def _clear(run_dir: Path) -> None:
    for folder in (reqlog.FOLDER, shards.FOLDER):
        shutil.rmtree(run_dir / folder, ignore_errors=True)


def check_space(run_dir: Path, trace: pl.DataFrame, *, save_chunks: bool) -> None:
    """Raise `ReplayError` when the records of `trace` will not fit beside what is on the disk."""
    tokens = int(trace["output_tokens"].cast(pl.Int64).sum()) if save_chunks else 0
    need = _COPIES * (trace.height * _ROW_BYTES + tokens * _TOKEN_BYTES) + _SPARE_BYTES
    there = next(path for path in [run_dir.absolute(), *run_dir.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        hint = "; --no-save-chunks needs less" if save_chunks else ""
        raise ReplayError(
            f"{run_dir}: the run's records need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there; "
            f"free some space or give another -o{hint}"
        )
