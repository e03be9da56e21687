"""From the load workers' logs to `requests.parquet`, a part a second; and what a kill left of them."""

import asyncio
import os
import shutil
from collections.abc import Callable, Container, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from replay import reqlog, shards
from replay.reqlog import files, number_of, owner_of
from replay.rundir import PartWriter, read_manifest, table_batches
from replay.stream import Record
from replay.tables import REQUESTS
from tracegen.errors import ReplayError

if TYPE_CHECKING:
    from array import array

_SCHEMA = REQUESTS.to_frame().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
_FLUSH_S = 1.0
_ROW_BYTES = 250  # of a request, in the log and in the table
_TOKEN_BYTES = 14  # of a token's time and count, likewise
_COPIES = 2.5  # parts and the table made of them stand beside each other for a while
_SPARE_BYTES = 64 << 20  # for power, steps and logs
_RESERVE_BYTES = 64 << 10  # a manifest of many GPUs, and what others write in the moment before it


async def finish_in_thread(write: Callable[[], None]) -> None:
    """Run `write` in a thread. A caller that is cancelled still waits for its end: two writers would race."""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


def to_table(records: Sequence[Record], *, save_chunks: bool = True) -> pa.Table:
    """`requests.parquet` rows of `records`, with or without the time and tokens of each chunk.

    Made of buffers: Polars and its threads would take 20 MiB while requests are sent, and what makes Arrow arrays of
    Python's lists imports pandas where it is installed, 30 MiB.
    """
    columns = {field.name: _column(field.type, [getattr(r, field.name) for r in records]) for field in _SCHEMA}
    if save_chunks:
        columns["chunk_ns"] = _lists(pa.int64(), [r.chunk_ns for r in records])
        columns["chunk_tokens"] = _lists(pa.uint16(), [r.chunk_tokens for r in records])
    return pa.table(columns)


def _column(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    """A column of texts or numbers; None for a null."""
    if kind == pa.large_string():
        texts = [(value or "").encode() for value in values]
        return _array(kind, values, _ends(texts), b"".join(texts))
    return _array(kind, values, np.array([0 if v is None else v for v in values], kind.to_pandas_dtype()))


def _lists(inner: pa.DataType, values: Sequence["array[int] | None"]) -> pa.Array:
    """A column of lists of `inner`; None for a null."""
    flat = b"".join(b"" if of is None else of.tobytes() for of in values)
    ends = _ends([of or () for of in values])
    numbers = pa.Array.from_buffers(inner, int(ends[-1]), [None, pa.py_buffer(flat)])
    return _array(pa.large_list(inner), values, ends, children=[numbers])


def _ends(values: Sequence[Sized]) -> npt.NDArray[np.int64]:
    """Where each of `values` begins when they stand one behind the other, and where the last ends."""
    return np.cumsum([0, *map(len, values)], dtype=np.int64)


def _array(kind: pa.DataType, values: Sequence[Any], *buffers: Any, children: Sequence[pa.Array] = ()) -> pa.Array:
    """An array of `kind` with a null where one of `values` is None."""
    valid = np.packbits([value is not None for value in values], bitorder="little")
    return pa.Array.from_buffers(kind, len(values), [*map(pa.py_buffer, (valid, *buffers))], children=[*children])


class RecordStore:
    """Stores what the workers of a run have logged; memory is bounded by what a second brings."""

    def __init__(
        self,
        run_dir: Path,
        *,
        save_chunks: bool = True,
        measure_start_ns: int = 0,
        early: Container[int] = frozenset(),
    ) -> None:
        """Where the logs and the table are.

        What was due before `measure_start_ns` goes to the warm-up's own table, and requests of the ids in `early`.
        """
        self._run_dir, self._save_chunks = run_dir, save_chunks
        self._measure_start_ns, self._early = measure_start_ns, early
        (run_dir / "requests.parquet").mkdir(exist_ok=True)

    def store(self, *, rest: bool = False) -> int:
        """Store the files that are whole, or with the `rest` those too that a kill cut off.

        How many records were stored. Raises `OSError` when the table cannot be written.
        """
        return sum(self._store(path) for path in files(self._run_dir, cut_off=rest))

    def _store(self, path: Path) -> int:
        """Store one file as the part of its name, of two tables where it has the warm-up's end; and remove it."""
        records, stored = list(reqlog.read(path)), 0
        early = [record for record in records if self._in_warm_up(record)]
        late = [record for record in records if not self._in_warm_up(record)]
        for table, mine in (("warmup", early), ("requests", late)):
            # A part is renamed into place when it is whole: its log was not removed in time, and says nothing new.
            if mine and not (self._run_dir / f"{table}.parquet" / f"{path.stem}.parquet").exists():
                writer = PartWriter(self._run_dir, table, prefix=owner_of(path))
                writer.append(to_table(mine, save_chunks=self._save_chunks), number_of(path))
                stored += len(mine)
        path.unlink()
        return stored

    def _in_warm_up(self, record: Record) -> bool:
        return record.scheduled_ns < self._measure_start_ns or record.request_id in self._early

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
        """Store what is left, once the workers have ended, and remove what they were given.

        That first, and with it the reserve: on a full disk it makes room for what is still to be said.
        """
        shutil.rmtree(self._run_dir / shards.FOLDER, ignore_errors=True)
        await finish_in_thread(self._store_rest)
        _clear(self._run_dir)


def reserve(run_dir: Path) -> None:
    """Take room, beside the shards, for a manifest that says how a run ended whose disk had filled up."""
    (run_dir / shards.FOLDER / "reserve").write_bytes(os.urandom(_RESERVE_BYTES))  # no file system can make that less


def recover(run_dir: Path) -> int:
    """Store what a killed run's workers had logged; how many records that were.

    Raises `RunError` when `run_dir` is no run directory, `OSError` when it cannot be written.
    """
    stored = 0
    if files(run_dir, cut_off=True):
        manifest = read_manifest(run_dir)
        save_chunks = manifest.get("arguments", {}).get("save_chunks") is not False
        start_ns = manifest.get("measure_start_ns", 0)
        early = sent_again_early(run_dir, manifest)
        store = RecordStore(run_dir, save_chunks=save_chunks, measure_start_ns=start_ns, early=early)
        stored = store.store(rest=True)
    _clear(run_dir)
    return stored


def sent_again_early(run_dir: Path, manifest: Mapping[str, Any]) -> frozenset[int]:
    """Which requests are the warm-up's by the trace, however late they are sent: of a run that goes on, else none.

    One that was in flight when the run was cut short, behind its warm-up, is sent again then, but never measured.
    """
    warmup_ns = manifest.get("arguments", {}).get("warmup_ns")
    if not warmup_ns or len(manifest.get("stretches") or ()) < 2:
        return frozenset()
    batches = table_batches(run_dir, "trace", ["request_id", "arrival_ns"])
    return frozenset(i for rows in batches for i in rows.filter(pl.col("arrival_ns") < warmup_ns)["request_id"])


def left_over(run_dir: Path) -> int:
    """How many records are in logs that no part has yet: more than none after a kill."""
    stored = {
        path.stem for table in ("requests", "warmup") for path in (run_dir / f"{table}.parquet").glob("*.parquet")
    }
    return sum(sum(1 for _ in reqlog.read(path)) for path in files(run_dir, cut_off=True) if path.stem not in stored)


def _clear(run_dir: Path) -> None:
    for folder in (reqlog.FOLDER, shards.FOLDER):
        shutil.rmtree(run_dir / folder, ignore_errors=True)


def check_space(run_dir: Path, requests: int, output_tokens: int, *, save_chunks: bool) -> None:
    """Raise `ReplayError` when the records of `requests` will not fit beside what is on the disk."""
    tokens = output_tokens if save_chunks else 0
    need = _COPIES * (requests * _ROW_BYTES + tokens * _TOKEN_BYTES) + _SPARE_BYTES
    there = next(path for path in [run_dir.absolute(), *run_dir.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        hint = "; --no-save-chunks needs less" if save_chunks else ""
        raise ReplayError(
            f"{run_dir}: the run's records need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there; "
            f"free some space or give another -o{hint}"
        )
