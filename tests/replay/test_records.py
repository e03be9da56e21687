"""Records: whole when their request ends, and never lost between the worker and the end of the run."""

import asyncio
import errno
import os
import threading

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import reqlog
from replay.compaction import compact
from replay.metrics import parse_metrics
from replay.records import RecordStore, check_space, left_over, recover, to_table
from replay.reqlog import RequestLog, files, pack, unpack
from replay.rundir import scan_table, write_manifest
from replay.stream import Record
from replay.tables import REQUESTS, REQUESTS_OPTIONAL, STATUSES
from tracegen.errors import ReplayError

COUNTS = st.none() | st.integers(0, 2**32 - 1)
TIMES = st.none() | st.integers(0, 2**62)


def record(request_id, status="ok", tokens=3):
    row = Record(request_id, 0, 1000, 3, sent_ns=1001, status=status, output_tokens=tokens)
    row.chunk_ns.extend([5, 6])
    row.chunk_tokens.extend([1, 2])
    return row


def log(run_dir, *records, worker=0, whole=True):
    """Log `records` as a worker does; not `whole`: it was killed then."""
    written = RequestLog(run_dir, worker, save_chunks=True)
    for row in records:
        written.add(row)
    written.write()
    if whole:
        written.close()


def stored(run_dir):
    return scan_table(run_dir, "requests").collect()["request_id"].to_list()


@pytest.mark.parametrize("save_chunks", [True, False])
def test_a_frame_has_the_tables_columns_and_nulls_where_nothing_was_reached(save_chunks):
    frame = pl.DataFrame(to_table([record(7), Record(2**64 - 1, 0, 5, 9)], save_chunks=save_chunks))
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


@given(
    st.builds(
        Record, st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**62), st.integers(0, 2**32 - 1),
        sent_ns=TIMES, headers_ns=TIMES, first_token_ns=TIMES, last_token_ns=TIMES, done_ns=TIMES, input_tokens=COUNTS,
        output_tokens=COUNTS, cached_tokens=COUNTS, status=st.sampled_from(STATUSES),
        http_status=st.none() | st.integers(100, 999), error=st.none() | st.text(min_size=1),
        worker=st.integers(0, 2**16 - 1),
    ),
    st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**16 - 1)), max_size=5),
    st.booleans(),
)  # fmt: skip
def test_a_record_comes_out_of_its_frame_as_it_went_in(row, chunks, counted):
    row.chunk_ns.extend(at for at, _ in chunks)
    row.chunk_tokens.extend(count for _, count in chunks)
    if not counted:
        row.chunk_tokens = None
    (read,), rest = unpack(pack(row))
    assert rest == 0
    assert to_table([read]).equals(to_table([row]))


def test_the_log_knows_every_status():
    assert reqlog._STATUSES == STATUSES


def test_a_log_cut_off_anywhere_gives_the_records_before():
    frames = [pack(record(i)) for i in range(3)]
    data = b"".join(frames)
    for size in range(len(data)):
        records, rest = unpack(data[:size])
        whole = sum(size >= len(b"".join(frames[: n + 1])) for n in range(3))
        assert [r.request_id for r in records] == list(range(whole))
        assert rest == size - len(b"".join(frames[:whole]))


def test_a_byte_that_flipped_ends_the_log_there():
    frames = [pack(record(i)) for i in range(3)]
    damaged = bytearray(b"".join(frames))
    damaged[len(frames[0]) + 30] ^= 1
    assert [r.request_id for r in unpack(bytes(damaged))[0]] == [0]


def test_a_log_that_cannot_be_opened_for_want_of_files_is_written_later(tmp_path, monkeypatch):
    written = RequestLog(tmp_path, 0, save_chunks=True)
    written.add(record(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
        written.write()
    written.write()
    written.close()
    RecordStore(tmp_path).store()
    assert stored(tmp_path) == [1]


def test_what_is_whole_is_stored_once_and_the_rest_at_the_end(tmp_path):
    log(tmp_path, record(1), record(2))
    log(tmp_path, record(3), whole=False)
    log(tmp_path, record(4), worker=1)
    store = RecordStore(tmp_path)
    assert store.store() == 3
    assert sorted(stored(tmp_path)) == [1, 2, 4]
    assert store.store() == 0
    asyncio.run(store.close())
    assert sorted(stored(tmp_path)) == [1, 2, 3, 4]
    assert not (tmp_path / reqlog.FOLDER).exists()


def test_a_kill_leaves_what_can_be_recovered_and_nothing_twice(tmp_path):
    write_manifest(tmp_path, {"arguments": {"save_chunks": True}})
    log(tmp_path, record(1), record(2))
    (whole,) = files(tmp_path)
    data = whole.read_bytes()
    RecordStore(tmp_path).store()
    whole.write_bytes(data)  # killed between storing a file and removing it
    log(tmp_path, record(3), record(4), whole=False)
    (open_,) = [path for path in files(tmp_path, cut_off=True) if path != whole]
    open_.write_bytes(open_.read_bytes()[:-1])  # killed while it was written
    assert left_over(tmp_path) == 1
    assert recover(tmp_path) == 1
    assert sorted(stored(tmp_path)) == [1, 2, 3]
    assert (left_over(tmp_path), recover(tmp_path)) == (0, 0)
    log(tmp_path, record(5))  # the run goes on
    RecordStore(tmp_path).store()
    assert sorted(stored(tmp_path)) == [1, 2, 3, 5]


def test_a_store_that_is_cancelled_midway_is_written_before_the_rest(tmp_path, monkeypatch):
    """The end of a run cancels the storing that is going on and stores the rest: neither may overwrite the other."""
    store = RecordStore(tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    read = reqlog.read

    def slow_read(path):
        inside.set()
        assert go_on.wait(20)
        return read(path)

    async def main():
        log(tmp_path, record(1))
        monkeypatch.setattr(reqlog, "read", slow_read)
        monkeypatch.setattr("replay.records._FLUSH_S", 0.01)
        storing = asyncio.create_task(store.store_forever())
        await asyncio.to_thread(inside.wait)
        storing.cancel()
        await asyncio.sleep(0.01)
        assert not storing.done(), "it waits for the part that is being written"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await storing
        log(tmp_path, record(2))
        await store.close()

    asyncio.run(main())
    assert stored(tmp_path) == [1, 2]


@given(st.lists(st.lists(st.integers(0, 20), max_size=6), max_size=5))
def test_the_whole_table_is_sorted_and_loses_nothing(tmp_path_factory, seconds):
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "requests.parquet").mkdir()
    rows = []
    for number, due in enumerate(seconds):
        new = [Record(len(rows) + i, 0, at, 1) for i, at in enumerate(due)]
        rows += new
        log(run_dir, *new, worker=number % 2)
    RecordStore(run_dir).store(rest=True)
    compact(run_dir, "requests", ["scheduled_ns", "request_id"])
    if not rows:
        return
    assert (run_dir / "requests.parquet").is_file()
    table = scan_table(run_dir, "requests").collect()
    assert table.rows() == pl.DataFrame(to_table(rows)).sort("scheduled_ns", "request_id").rows()


def test_a_disk_that_is_too_small_is_told_before_the_start(tmp_path):
    with pytest.raises(ReplayError, match=r"need about [\d,.]+ GB, and [\d,.]+ GB are free"):
        check_space(tmp_path / "none" / "yet", 3000, 3000 * 2**32, save_chunks=True)
    check_space(tmp_path, 3000, 3000 * 2**32, save_chunks=False)


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
