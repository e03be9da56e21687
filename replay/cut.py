"""Cut a trace into the shards that load workers send, and say how many workers it takes."""

import os
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.shards import FOLDER, NONE, ROW, hashes_path, shard_path
from tracegen.errors import ReplayError

WORKER_RPS = 1000.0  # what one worker sends with a core to itself and half of it to spare (docs/benchmarks.md)
WORKER_STREAMS = 5000.0  # likewise, where each stream has ten tokens a second
GENERAL_SHARE = 3.0  # times the fast path's CPU time: 1.6 at 200 requests/s, and the less that waits the more
_TOKEN_S = 0.05  # taken for a server's time between two tokens, where streams are counted before a run
_WINDOW_NS = 10**9
_SPARE_FILES = 128  # descriptors beside the streams: the log, pipes, connections opened ahead
_SLICE_ROWS = 1 << 16  # written at once
_CELLS = 1 << 16  # half a MiB of counts, for a trace of 18 hours to the second
Route = Callable[[pl.DataFrame], npt.NDArray[np.int64]]
_DTYPE = np.dtype(
    {
        "names": ["request_id", "arrival", "think", "parent", "input", "output", "priority", "hashes", "instance"],
        "formats": ["<u8", "<i8", "<i8", "<u8", "<u4", "<u4", "<i4", "<u4", "<i2"],
        "offsets": [0, 8, 16, 24, 32, 36, 40, 44, 48],
        "itemsize": ROW.size,
    }
)


class Load(NamedTuple):
    """What a trace asks of who sends it."""

    requests: int = 0
    rps: float = 0.0  # the most requests in a second
    streams: float = 0.0  # about how many are open at once at most


class Peak:
    """The load of a trace, batch by batch; what is held are a second's requests and the streams that are open.

    A stream is taken to last 50 ms a token: nobody knows before the server has answered.
    """

    def __init__(self) -> None:
        self._requests, self._rps, self._streams = 0, 0, 0
        self._recent_ns = np.zeros(0, np.int64)  # arrivals within the last second
        self._ends_ns = np.zeros(0, np.int64)  # of the streams that are open, in order

    @property
    def load(self) -> Load:
        """So far."""
        return Load(self._requests, self._rps / (_WINDOW_NS / 1e9), float(self._streams))

    def add(self, arrival_ns: npt.NDArray[np.int64], output_tokens: npt.NDArray[np.int64]) -> None:
        """The requests that come next, in order."""
        if not arrival_ns.size:
            return
        self._requests += arrival_ns.size
        near_ns = np.concatenate([self._recent_ns, arrival_ns])
        upto = np.searchsorted(near_ns, near_ns + _WINDOW_NS, "left")
        self._rps = max(self._rps, int((upto - np.arange(near_ns.size)).max()))
        self._recent_ns = near_ns[near_ns > near_ns[-1] - _WINDOW_NS]
        ends_ns = arrival_ns + (output_tokens * (_TOKEN_S * 1e9)).astype(np.int64)
        open_ = self._ends_ns.size
        self._ends_ns = np.sort(np.concatenate([self._ends_ns, ends_ns]))
        closed = np.searchsorted(self._ends_ns, arrival_ns, "left")
        self._streams = max(self._streams, int((open_ + np.arange(1, arrival_ns.size + 1) - closed).max()))
        self._ends_ns = self._ends_ns[self._ends_ns >= arrival_ns[-1]]


class Due:
    """How many requests are due by a moment, to a second, or to 1/65,536 of a trace that is longer."""

    def __init__(self, last_ns: int) -> None:
        """`last_ns`: when the last one is due."""
        self.last_ns, self.requests = last_ns, 0
        self._cell_ns = max(_WINDOW_NS, last_ns // _CELLS + 1)
        self._upto = np.zeros(last_ns // self._cell_ns + 2, np.int64)

    def add(self, arrival_ns: npt.NDArray[np.int64]) -> None:
        """More requests."""
        self.requests += arrival_ns.size
        cells = arrival_ns // self._cell_ns + 1
        self._upto += np.cumsum(np.bincount(cells, minlength=self._upto.size))

    def noting(self, batches: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The `batches` of a trace, whose requests are added as they pass."""
        for batch in batches:
            self.add(batch["arrival_ns"].to_numpy())
            yield batch

    def by(self, t_ns: int) -> int:
        """How many are due by `t_ns`, from the trace's zero."""
        return int(np.interp(t_ns / self._cell_ns, np.arange(self._upto.size), self._upto))


def worker_count(load: Load, *, fast: bool, one: bool, asked: int | None) -> int:
    """How many workers send `load`: as many as asked, else as its load needs and this process has cores.

    `one`: what was asked for (a cap, a router) needs all requests in one place.
    """
    if asked is not None:
        return min(asked, max(1, load.requests))
    if one:
        return 1
    need = max(load.rps / WORKER_RPS, load.streams / WORKER_STREAMS) * (1.0 if fast else GENERAL_SHARE)
    return max(1, min(int(np.ceil(need)), len(os.sched_getaffinity(0)), load.requests))


def check_descriptors(load: Load, workers: int, max_concurrency: int | None) -> None:
    """Let this process and its workers open as many files as they may; raise `ReplayError` where that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return
    streams = min(load.streams, max_concurrency or np.inf) / workers
    if streams + _SPARE_FILES > hard:
        where = f" in each of {workers} workers" if workers > 1 else ""
        raise ReplayError(
            f"about {streams:,.0f} streams at once are expected{where}, and a process may open "
            f"{hard:,} files here: raise that (ulimit -n, LimitNOFILE), or use more --workers or --max-concurrency"
        )


def cut(batches: Iterable[pl.DataFrame], route: Route, workers: int, run_dir: Path, *, think_time: bool) -> None:
    """Write the shard of each worker: row i of the trace in `batches` goes to worker i modulo `workers`.

    `route` says which instance each row of a batch is for; batches come in order. With `think_time` all turns of a
    session go to where its first one goes, for each waits for the one before. Then the trace is held as a whole: a
    turn does not wait for one that nobody sends.
    """
    (run_dir / FOLDER).mkdir(exist_ok=True)
    if think_time:
        batches = [_with_waits(pl.concat(batches))]
    row = 0
    with ExitStack() as stack:
        files = [
            [stack.enter_context(path(run_dir, worker).open("wb")) for path in (shard_path, hashes_path)]
            for worker in range(workers)
        ]
        for batch in batches:
            every, row = _whose(batch, row, workers, think_time=think_time), row + batch.height
            routes = route(batch)
            for at in range(0, batch.height, _SLICE_ROWS):
                part, whose = batch[at : at + _SLICE_ROWS], every[at : at + _SLICE_ROWS]
                _write(part, _rows(part, routes[at : at + _SLICE_ROWS], turns=think_time), whose, files)


def _with_waits(trace: pl.DataFrame) -> pl.DataFrame:
    """`trace` with `think_ns` where a turn waits for another one of the trace, and `NONE` elsewhere."""
    if not {"parent_id", "think_ns"} <= set(trace.columns):
        return trace.with_columns(think_ns=pl.lit(NONE, pl.Int64), parent_id=pl.lit(None, pl.UInt64))
    here = trace["parent_id"].is_in(trace["request_id"].implode())
    return trace.with_columns(pl.when(here).then(pl.col("think_ns")).fill_null(NONE))


def _write(
    part: pl.DataFrame, rows: npt.NDArray[np.void], whose: npt.NDArray[np.int64], files: Sequence[Sequence[BinaryIO]]
) -> None:
    """Append rows of the trace, and as `rows` of shards, to those that they go to."""
    for worker, (shard, hashes) in enumerate(files):
        mine = whose == worker
        shard.write(rows[mine].tobytes())
        if "prefix_hashes" in part.columns:
            own = part["prefix_hashes"].filter(pl.Series(mine)).explode().drop_nulls()
            hashes.write(own.to_numpy().astype("<u8").tobytes())


def _rows(trace: pl.DataFrame, routes: npt.NDArray[np.int64], *, turns: bool) -> npt.NDArray[np.void]:
    """The rows of shards that some rows of a trace are; `turns`: of which some wait for others."""
    rows = np.zeros(trace.height, _DTYPE)
    for name, column in (
        ("request_id", "request_id"), ("arrival", "arrival_ns"), ("input", "input_tokens"), ("output", "output_tokens")
    ):  # fmt: skip
        rows[name] = trace[column].to_numpy()
    rows["think"], rows["instance"] = NONE, routes
    if turns:
        rows["think"], rows["parent"] = trace["think_ns"].to_numpy(), trace["parent_id"].fill_null(0).to_numpy()
    if "priority" in trace.columns:
        rows["priority"] = trace["priority"].fill_null(0).to_numpy()
    if "prefix_hashes" in trace.columns:
        rows["hashes"] = trace["prefix_hashes"].list.len().fill_null(0).to_numpy()
    return rows


def _whose(trace: pl.DataFrame, first: int, workers: int, *, think_time: bool) -> npt.NDArray[np.int64]:
    """The worker of each row; `first` rows came before."""
    turn = np.arange(first, first + trace.height) % workers
    if not think_time or "session_id" not in trace.columns:
        return turn
    turns = pl.DataFrame({"session": trace["session_id"], "turn": turn})
    theirs = pl.when(pl.col("session").is_null()).then("turn").otherwise(pl.col("turn").first().over("session"))
    return turns.select(theirs).to_series().to_numpy()


def ramped(arrival_ns: npt.NDArray[np.int64], ramp_ns: int) -> npt.NDArray[np.int64]:
    """When requests are due whose rate rises linearly from nothing to the trace's own over `ramp_ns`, then stays so.

    What the trace sends up to t is sent up to w, where t = w² / 2R for w < R = `ramp_ns`, and t = w - R/2 after: the
    rate at w is w/R of the trace's, nobody is left out, and gaps after the ramp are the trace's.
    """
    rising = np.sqrt(2.0 * ramp_ns * arrival_ns).astype(np.int64)
    return np.where(arrival_ns < ramp_ns / 2, rising, arrival_ns + ramp_ns // 2)
