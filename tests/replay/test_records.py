"""Records: whole when their request ends, and never lost between a flush and the end of the run."""

import asyncio
import threading

import polars as pl
import pytest

from replay.client import Record
from replay.metrics import parse_metrics
from replay.records import RecordStore, to_frame
from replay.rundir import REQUESTS, REQUESTS_OPTIONAL, scan_table


def record(request_id, status="ok", tokens=3):
    row = Record(request_id, 0, 1000, 3, sent_ns=1001, status=status, output_tokens=tokens)
    row.chunk_ns, row.chunk_tokens = [5, 6], [1, 2]
    return row


@pytest.mark.parametrize("save_chunks", [True, False])
def test_a_frame_has_the_tables_columns_and_nulls_where_nothing_was_reached(save_chunks):
    frame = to_frame([record(7), Record(2**64 - 1, 0, 5, 9)], save_chunks=save_chunks)
    assert frame.schema == pl.Schema({**REQUESTS, **(REQUESTS_OPTIONAL if save_chunks else {})})
    assert frame["request_id"].to_list() == [7, 2**64 - 1]
    last = frame.row(1, named=True)
    reached = {
        "request_id",
        "instance",
        "scheduled_ns",
        "output_tokens_wanted",
        "status",
        "worker",
        "chunk_ns",
        "chunk_tokens",
    }
    assert {name for name, value in last.items() if value is not None} == reached & set(frame.columns)
    assert last["status"] == "aborted"


def test_the_store_counts_what_was_sent_ended_and_failed(tmp_path):
    store = RecordStore(tmp_path)
    rows = [record(1), record(2, "timeout", None), record(3)]
    for row in rows:
        store.start(row)
    for row in rows[:2]:
        store.end(row)
    assert (store.sent, store.ended, store.errors) == (3, 2, 1)
    assert store.output_tokens() == 6, "of the request in flight too"
    store.end(rows[2])
    assert store.output_tokens() == 6
    asyncio.run(store.flush())
    assert sorted(scan_table(tmp_path, "requests").collect()["request_id"]) == [1, 2, 3]


def test_a_flush_that_is_cancelled_midway_is_written_before_the_next(tmp_path):
    """The end of a run cancels the flush that is going on and flushes the rest: neither may overwrite the other."""
    store = RecordStore(tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    append = store._writer.append

    def slow_append(frame):
        inside.set()
        assert go_on.wait(20)
        append(frame)

    async def main():
        store._writer.append = slow_append
        store.start(first := record(1))
        store.end(first)
        flushing = asyncio.create_task(store.flush())
        await asyncio.to_thread(inside.wait)
        flushing.cancel()
        await asyncio.sleep(0.01)
        assert not flushing.done(), "it waits for the part that is being written"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        store.start(second := record(2))
        store.end(second)
        await store.flush()

    asyncio.run(main())
    assert scan_table(tmp_path, "requests").collect()["request_id"].to_list() == [1, 2]


def test_metrics_keep_samples_and_leave_out_histogram_cells():
    text = """# HELP x y
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m",engine="0"} 3.0
plain_total 1e3 1700000000
vllm:ttft_bucket{le="0.1"} 5
vllm:ttft_sum{engine="0"} NaN
process_created 5
broken{a="b"} oops
"""
    rows = parse_metrics(text)
    assert [row[:2] for row in rows] == [
        ("vllm:num_requests_running", 'model_name="m",engine="0"'), ("plain_total", ""), ("vllm:ttft_sum", 'engine="0"')
    ]  # fmt: skip
    assert [row[2] for row in rows[:2]] == [3.0, 1000.0]
