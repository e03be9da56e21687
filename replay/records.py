"""The records of requests: what is in flight, what has ended, flushed to the run directory every second."""

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

import polars as pl

from replay.client import Record
from replay.rundir import REQUESTS, REQUESTS_OPTIONAL, PartWriter

_SCHEMA = pl.Schema({**REQUESTS, **REQUESTS_OPTIONAL})
_FLUSH_S = 1.0
_RECENT = 1000  # requests that the live figures look back on


async def finish_in_thread(write: Callable[[], None]) -> None:
    """Run `write` in a thread. A caller that is cancelled still waits for its end: two writers would race."""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


def to_frame(records: list[Record], *, save_chunks: bool = True) -> pl.DataFrame:
    """`requests.parquet` rows of `records`, with or without the time and tokens of each chunk."""
    schema = _SCHEMA if save_chunks else REQUESTS
    rows = [tuple(getattr(record, name) for name in schema) for record in records]
    return pl.DataFrame(rows, schema=schema, orient="row")


class RecordStore:
    """Takes each record when its request ends; memory is bounded by what a second brings."""

    def __init__(self, run_dir: Path, *, save_chunks: bool = True) -> None:
        self._save_chunks = save_chunks
        self._writer = PartWriter(run_dir, "requests")
        self._waiting: list[Record] = []
        self.sent = 0
        self.ended = 0
        self.errors = 0
        self._tokens_ended = 0
        self._open: set[Record] = set()
        self.recent: deque[Record] = deque(maxlen=_RECENT)

    def start(self, record: Record) -> None:
        """Take a request that is being sent."""
        self.sent += 1
        self._open.add(record)
        self.recent.append(record)

    def end(self, record: Record) -> None:
        """Take an ended request."""
        self.ended += record in self._open  # a cap may have held it back until the end
        self.errors += record.status != "ok"
        self._tokens_ended += record.output_tokens or 0
        self._open.discard(record)
        self._waiting.append(record)

    def output_tokens(self) -> int:
        """Output tokens that have come so far, of requests in flight too."""
        return self._tokens_ended + sum(record.output_tokens or 0 for record in self._open)

    async def flush(self) -> None:
        """Write what has ended since the last flush, off the event loop."""
        records, self._waiting = self._waiting, []
        if records:
            await finish_in_thread(lambda: self._writer.append(to_frame(records, save_chunks=self._save_chunks)))

    async def flush_forever(self) -> None:
        """Flush once a second until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush()
