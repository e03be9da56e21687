"""What is held in memory depends on the streams in flight, not on how long a run is."""

import asyncio
import gc
import subprocess
import sys
import tracemalloc
from array import array

import polars as pl
import pytest

from replay import compaction, session
from replay.compaction import compact
from replay.cut import cut
from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.records import RecordStore
from replay.reqlog import RequestLog
from replay.router import Router
from replay.rundir import Run, table_batches
from replay.shards import read_rows
from replay.stream import Record
from replay.tally import Tally
from replay.workload import FOREVER_NS, Config, Workload
from tracegen.schema import TRACE

CHUNKS = 200


def send_all(run_dir, requests):
    """What a worker does for `requests`, ten in flight at a time; the most that Python's objects took, in bytes."""
    columns = [range(requests), range(0, 1000 * requests, 1000), [20] * requests, [5] * requests]
    trace = pl.DataFrame(columns, schema=TRACE)
    (run_dir / f"{requests}").mkdir()
    config = Config(run_dir=str(run_dir / f"{requests}"), base_urls=["http://x"], model="m", salt=1)
    cut([trace], Router("session", 1).assign, 1, config.path, think_time=False)
    del trace, columns
    tracemalloc.start()
    work, tally, in_flight = Workload(config, read_rows(config.path, 0)), Tally(), []
    log = RequestLog(config.path, 0, save_chunks=True)
    while work.due_ns() < FOREVER_NS or in_flight:
        if work.due_ns() < FOREVER_NS:
            in_flight.append(work.pop())
            in_flight[-1].record.sent_ns = 1
            tally.send(in_flight[-1].record)
        if len(in_flight) == 10 or work.due_ns() == FOREVER_NS:
            record = in_flight.pop(0).record
            record.chunk_ns.extend(range(5))
            tally.end(record)
            log.add(record)
            work.ended(record, 2)
        if tally.ended % 500 == 0:
            log.write()
            tally.message([job.record for job in in_flight])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tally.ended == requests
    return most


def test_a_worker_holds_as_much_for_a_trace_ten_times_as_long(tmp_path):
    assert send_all(tmp_path, 20_000) < 1.2 * send_all(tmp_path, 2_000)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A run of so many seconds, fifty requests each; the first request of all ends last."""

    def make(seconds):
        run_dir = tmp_path_factory.mktemp("run")
        store = RecordStore(run_dir)
        for second in range(seconds):
            log = RequestLog(run_dir, 0, save_chunks=True)
            first = [0] if second == seconds - 1 else []
            for number in [*first, *range(1 + 50 * second, 51 + 50 * second)]:
                times = array("q", range(number, number + CHUNKS))
                log.add(
                    Record(
                        number, 0, number, CHUNKS, status="ok", chunk_ns=times, chunk_tokens=array("H", [1] * CHUNKS)
                    )
                )
            log.write()
            log.close()
            store.store()
        return run_dir

    return make


def test_the_table_is_put_together_from_a_few_parts_at_a_time_however_long_the_run(make_run, monkeypatch):
    concat, most = compaction._concat, []

    def spy(frames):
        rows = concat(frames)
        most[-1] = max(most[-1], rows.height)
        return rows

    monkeypatch.setattr(compaction, "_concat", spy)
    monkeypatch.setattr(compaction, "_GROUP_BYTES", 300_000)
    for seconds in (20, 200):
        most.append(0)
        run_dir = make_run(seconds)
        compact(run_dir, "requests", ["scheduled_ns", "request_id"])
        assert Run(run_dir, {}).scan("requests").collect()["scheduled_ns"].to_list() == list(range(50 * seconds + 1))
    assert most[1] == most[0] < 400
    batches = [batch.height for batch in table_batches(run_dir, "requests", ["request_id", "chunk_ns"])]
    assert max(batches) <= most[1], "and it is read as it was written"
    assert len(batches) > 20


def test_the_trace_is_not_kept_while_it_is_sent(make_trace, tmp_path, sim_server, monkeypatch):
    kept = []

    async def look(*_, **__):
        frames = [found for found in gc.get_objects() if isinstance(found, pl.DataFrame)]
        kept.append([frame.columns for frame in frames if frame.height == 37 and "arrival_ns" in frame.columns])
        await asyncio.Event().wait()

    monkeypatch.setattr(session, "show", look)
    trace = make_trace(tmp_path / "trace.parquet", [(10 * i, 20, 2) for i in range(37)])
    asyncio.run(session.run(RunOptions(trace, engine=sim_server, output=tmp_path / "run"), QuietProgress()))
    assert kept == [[]]


def test_allocators_are_chosen_before_what_allocates_is_loaded():
    lines = [
        "import sys",
        "import replay.cli",
        "assert not {'polars', 'pyarrow'} & set(sys.modules)",
        "replay.cli.give_back_freed_memory()",
        "import pyarrow",
        "print(pyarrow.default_memory_pool().backend_name)",
    ]
    said = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert said.stdout == "system\n"
