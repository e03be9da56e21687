"""The log that a load worker keeps of its requests: records of those that have ended, written a few times a second.

`RUN/requests.log/worker000-000042.log` is a file of frames, called `.open` while it is written, about a second. The
replayer turns whole files into parts of `requests.parquet` and removes them; what is left after a kill is recovered
(`replay.records`). A frame is its length and CRC-32 (both UInt32, little endian) and a record; one that was cut off by
a kill ends the file.
"""

import errno
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from replay.stream import Record
from replay.timerfd import NS_PER_S, now_ns

FOLDER = "requests.log"
_STATUSES = ("ok", "http_error", "stream_error", "connect_error", "timeout", "aborted", "length_mismatch")
_CODES = {status: code for code, status in enumerate(_STATUSES)}
_FRAME = struct.Struct("<II")  # length, CRC-32
# request_id, four counts, six times, http_status, instance, worker, status, chunk tokens known, chunks, bytes of error.
# What was never reached is -1.
_HEAD = struct.Struct("<Q4q6qiHHBBII")
_FILE_NS = NS_PER_S
_OPEN, _WHOLE = ".open", ".log"


def pack(record: Record, *, save_chunks: bool = True) -> bytes:
    """The frame of `record`."""
    error = b"" if record.error is None else record.error.encode()
    chunks = len(record.chunk_ns) if save_chunks else 0
    counts = record.chunk_tokens if save_chunks else None
    head = _HEAD.pack(
        record.request_id,
        record.output_tokens_wanted,
        *(
            -1 if value is None else value
            for value in (
                record.input_tokens, record.output_tokens, record.cached_tokens, record.scheduled_ns, record.sent_ns,
                record.headers_ns, record.first_token_ns, record.last_token_ns, record.done_ns, record.http_status,
            )
        ),
        record.instance, record.worker, _CODES[record.status], counts is not None, chunks, len(error),
    )  # fmt: skip
    times = record.chunk_ns.tobytes() if chunks else b""
    body = b"".join((head, error, times, b"" if counts is None else counts.tobytes()))
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def unpack(data: bytes) -> tuple[list[Record], int]:
    """The records of the whole frames in `data`, and how many bytes behind them are none."""
    records, at = [], 0
    while len(data) - at >= _FRAME.size:
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(body) < max(length, _HEAD.size) or zlib.crc32(body) != crc:
            break
        records.append(_record(body))
        at += _FRAME.size + length
    return records, len(data) - at


def _record(body: bytes) -> Record:
    request_id, wanted, *rest = _HEAD.unpack_from(body)
    *reached, instance, worker, code, counted, chunks, error_bytes = rest
    got, out, cached, scheduled, sent, headers, first, last, done, http = (None if v < 0 else v for v in reached)
    times_at = _HEAD.size + error_bytes
    counts_at = times_at + 8 * chunks
    times, counts = array("q", body[times_at:counts_at]), array("H", body[counts_at:]) if counted else None
    return Record(
        request_id, instance, scheduled or 0, wanted, sent, headers, first, last, done, got, out, cached,
        _STATUSES[code], http, body[_HEAD.size : times_at].decode() if error_bytes else None, worker, times, counts,
    )  # fmt: skip


class RequestLog:
    """Appends records to a worker's log."""

    def __init__(self, run_dir: Path, worker: int, *, save_chunks: bool) -> None:
        """Make the folder in `run_dir`. Files are numbered on from what an earlier worker of that number left."""
        self._folder, self._worker, self._save_chunks = run_dir / FOLDER, worker, save_chunks
        self._folder.mkdir(exist_ok=True)
        self._frames: list[bytes] = []
        self._close_ns = 0
        stored = (run_dir / "requests.parquet").glob(f"{_name(worker)}-*.parquet")
        logs = self._folder.glob(f"{_name(worker)}-*")
        self._number = 1 + max((number_of(path) for path in [*logs, *stored]), default=-1)
        self._file = -1
        self._path = self._folder

    def add(self, record: Record) -> None:
        """Take an ended request."""
        self._frames.append(pack(record, save_chunks=self._save_chunks))

    def write(self) -> None:
        """Write what was taken. Raises `OSError` when that cannot be."""
        if now_ns() >= self._close_ns:
            self.close()
        if not self._frames:
            return
        if self._file < 0:
            self._path = self._folder / f"{_name(self._worker)}-{self._number:06d}{_OPEN}"
            try:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:  # streams have taken them all: one will end
                    return
                raise
            self._number += 1
            self._close_ns = now_ns() + _FILE_NS
        data = b"".join(self._frames)
        written = os.write(self._file, data)
        while written < len(data):  # the disk is nearly full: the next write says so
            written += os.write(self._file, data[written:])
        self._frames.clear()

    def close(self) -> None:
        """Close the file; what is added from now on goes to another."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.rename(self._path.with_suffix(_WHOLE))


def files(run_dir: Path, *, cut_off: bool = False) -> list[Path]:
    """The log's whole files in `run_dir`, and those that were `cut_off` by a kill, in the order written."""
    endings = {_WHOLE, _OPEN} if cut_off else {_WHOLE}
    return sorted(path for path in (run_dir / FOLDER).glob("worker*-*") if path.suffix in endings)


def _name(worker: int) -> str:
    return f"worker{worker:03d}"


def number_of(path: Path) -> int:
    """Which of its worker's files `path` is."""
    return int(path.stem.rpartition("-")[2])


def owner_of(path: Path) -> str:
    """Whose file `path` is: its name in front of the number."""
    return path.stem.rpartition("-")[0]


def read(path: Path) -> Iterator[Record]:
    """The records in a file of the log, up to where a kill cut it off."""
    yield from unpack(path.read_bytes())[0]
