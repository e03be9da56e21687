"""Cut a trace into the shards that load workers send, and say how many workers it takes."""

import os
import resource
from contextlib import ExitStack
from pathlib import Path

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
_DTYPE = np.dtype(
    {
        "names": ["request_id", "arrival", "think", "parent", "input", "output", "priority", "hashes", "instance"],
        "formats": ["<u8", "<i8", "<i8", "<u8", "<u4", "<u4", "<i4", "<u4", "<i2"],
        "offsets": [0, 8, 16, 24, 32, 36, 40, 44, 48],
        "itemsize": ROW.size,
    }
)


def peak_load(trace: pl.DataFrame) -> tuple[float, float]:
    """The most requests in a second of `trace`, and about how many streams are open at once at most.

    A stream is taken to last 50 ms a token: nobody knows before the server has answered.
    """
    arrival = trace["arrival_ns"].to_numpy()
    ends = np.searchsorted(arrival, arrival + _WINDOW_NS, "left")
    rps = float((ends - np.arange(len(arrival))).max(initial=0)) / (_WINDOW_NS / 1e9)
    last = np.sort(arrival + (trace["output_tokens"].to_numpy() * (_TOKEN_S * 1e9)).astype(np.int64))
    streams = np.arange(1, len(arrival) + 1) - np.searchsorted(last, arrival, "left")
    return rps, float(streams.max(initial=0))


def worker_count(trace: pl.DataFrame, *, fast: bool, one: bool, asked: int | None) -> int:
    """How many workers send `trace`: as many as asked, else as its load needs and this process has cores.

    `one`: what was asked for (a cap, a router) needs all requests in one place.
    """
    if asked is not None:
        return min(asked, max(1, trace.height))
    if one:
        return 1
    rps, streams = peak_load(trace)
    need = max(rps / WORKER_RPS, streams / WORKER_STREAMS) * (1.0 if fast else GENERAL_SHARE)
    return max(1, min(int(np.ceil(need)), len(os.sched_getaffinity(0)), trace.height))


def check_descriptors(trace: pl.DataFrame, workers: int, max_concurrency: int | None) -> None:
    """Let this process and its workers open as many files as they may; raise `ReplayError` where that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return
    streams = min(peak_load(trace)[1], max_concurrency or np.inf) / workers
    if streams + _SPARE_FILES > hard:
        where = f" in each of {workers} workers" if workers > 1 else ""
        raise ReplayError(
            f"about {streams:,.0f} streams at once are expected{where}, and a process may open "
            f"{hard:,} files here: raise that (ulimit -n, LimitNOFILE), or use more --workers or --max-concurrency"
        )


def cut(trace: pl.DataFrame, routes: npt.NDArray[np.int64], workers: int, run_dir: Path, *, think_time: bool) -> None:
    """Write the shard of each worker: row i goes to worker i modulo `workers`.

    With `think_time` all turns of a session go to where its first one goes, for each waits for the one before.
    """
    (run_dir / FOLDER).mkdir(exist_ok=True)
    turns = think_time and {"parent_id", "think_ns"} <= set(trace.columns)
    if turns:
        here = trace["parent_id"].is_in(trace["request_id"].implode())
        trace = trace.with_columns(pl.when(here).then(pl.col("think_ns")).fill_null(NONE))
    whose = _whose(trace, workers, think_time=think_time)
    with ExitStack() as stack:
        files = [
            [stack.enter_context(path(run_dir, worker).open("wb")) for path in (shard_path, hashes_path)]
            for worker in range(workers)
        ]
        for at in range(0, trace.height, _SLICE_ROWS):
            part = trace[at : at + _SLICE_ROWS]
            rows = _rows(part, routes[at : at + _SLICE_ROWS], turns=turns)
            for worker, (shard, hashes) in enumerate(files):
                mine = whose[at : at + _SLICE_ROWS] == worker
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


def _whose(trace: pl.DataFrame, workers: int, *, think_time: bool) -> npt.NDArray[np.int64]:
    """The worker of each row."""
    turn = np.arange(trace.height) % workers
    if not think_time or "session_id" not in trace.columns:
        return turn
    turns = pl.DataFrame({"session": trace["session_id"], "turn": turn})
    first = pl.when(pl.col("session").is_null()).then("turn").otherwise(pl.col("turn").first().over("session"))
    return turns.select(first).to_series().to_numpy()


def ramped(arrival_ns: npt.NDArray[np.int64], ramp_ns: int) -> npt.NDArray[np.int64]:
    """When requests are due whose rate rises linearly from nothing to the trace's own over `ramp_ns`, then stays so.

    What the trace sends up to t is sent up to w, where t = w² / 2R for w < R = `ramp_ns`, and t = w - R/2 after: the
    rate at w is w/R of the trace's, nobody is left out, and gaps after the ramp are the trace's.
    """
    rising = np.sqrt(2.0 * ramp_ns * arrival_ns).astype(np.int64)
    return np.where(arrival_ns < ramp_ns / 2, rising, arrival_ns + ramp_ns // 2)
