"""Shards: every row goes to one worker, and comes out there when it is due."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import cut as cut_module
from replay.cut import Due, Load, Peak, check_descriptors, cut, worker_count
from replay.router import Router
from replay.shards import read_rows
from replay.stream import Record
from replay.workload import FOREVER_NS, Config, RateLimit, Workload, plain_http, through_proxies
from tracegen.errors import ReplayError
from tracegen.schema import TRACE

S = 10**9
U64 = st.integers(0, 2**64 - 1)


def trace(arrival_ns, output_tokens=10, **columns):
    data = {
        "request_id": range(len(arrival_ns)), "arrival_ns": arrival_ns, "input_tokens": [5] * len(arrival_ns),
        "output_tokens": [output_tokens] * len(arrival_ns),
    }  # fmt: skip
    return pl.DataFrame(data, schema=TRACE).with_columns(**columns)


@settings(max_examples=30)
@given(st.integers(1, 4), st.lists(st.tuples(st.lists(U64, max_size=3), st.none() | st.integers(-5, 5)), max_size=12))
def test_the_shards_together_are_the_trace(tmp_path_factory, workers, rows):
    folder = tmp_path_factory.mktemp("run")
    hashes = pl.Series([row[0] for row in rows], dtype=pl.List(pl.UInt64))
    priority = pl.Series([row[1] for row in rows], dtype=pl.Int32)
    frame = trace([i * S for i in range(len(rows))], prefix_hashes=hashes, priority=priority)
    cut(frame.iter_slices(5), Router("round-robin", 2).assign, workers, folder, think_time=False)
    shards = [list(read_rows(folder, worker)) for worker in range(workers)]
    assert [len(shard) for shard in shards] == [len(range(w, len(rows), workers)) for w in range(workers)]
    back = sorted((row for shard in shards for row in shard), key=lambda row: row.request_id)
    assert [(list(row.hashes), row.priority) for row in back] == [(own, level or 0) for own, level in rows]
    assert [(r.request_id, r.arrival_ns, r.instance) for r in back] == [(i, i * S, i % 2) for i in range(len(rows))]


def config(folder, **options):
    return Config(run_dir=str(folder), base_urls=["http://x"], model="m", salt=1, **options)


def turns():
    """Two sessions of three turns and a request of its own, by turns in time."""
    frame = trace([i * S for i in range(7)])
    return frame.with_columns(
        session_id=pl.Series([0, 1, 0, 1, 0, 1, None], dtype=pl.UInt64),
        parent_id=pl.Series([None, None, 0, 1, 2, 3, None], dtype=pl.UInt64),
        think_ns=pl.Series([None, None, 2 * S, 2 * S, 3 * S, None, None], dtype=pl.Int64),
    )


def test_a_turn_is_due_after_its_think_time_and_keeps_to_its_sessions_worker(tmp_path):
    cut([turns()], Router("session", 1).assign, 2, tmp_path, think_time=True)
    shards = [[row.request_id for row in read_rows(tmp_path, worker)] for worker in range(2)]
    assert shards == [[0, 2, 4, 6], [1, 3, 5]]
    work = Workload(config(tmp_path, think_time=True), read_rows(tmp_path, 0))
    work.begin(100 * S)
    assert work.due_ns() == 100 * S
    first = work.pop()
    assert work.due_ns() == 106 * S, "the turns wait"
    work.ended(first.record, 101 * S)
    assert work.due_ns() == 103 * S
    second = work.pop()
    assert (second.row.request_id, second.record.scheduled_ns) == (2, 103 * S)
    assert work.pop().row.request_id == 6
    assert work.due_ns() == FOREVER_NS
    work.ended(second.record, 110 * S)
    assert (work.due_ns(), work.pop().row.request_id, work.due_ns()) == (113 * S, 4, FOREVER_NS)


def test_without_think_times_turns_come_at_their_arrivals(tmp_path):
    cut([turns()], Router("session", 1).assign, 1, tmp_path, think_time=False)
    work = Workload(config(tmp_path), read_rows(tmp_path, 0))
    work.begin(0)
    due = []
    while work.due_ns() != FOREVER_NS:
        due.append(work.due_ns())
        work.ended(Record(work.pop().row.request_id, 0, 0, 1), 0)
    assert due == [i * S for i in range(7)]


def test_a_turn_whose_turn_before_is_not_sent_comes_at_its_arrival(tmp_path):
    cut([turns().slice(2)], Router("session", 1).assign, 1, tmp_path, think_time=True)
    work = Workload(config(tmp_path, think_time=True), read_rows(tmp_path, 0))
    work.begin(0)
    assert (work.due_ns(), work.pop().row.request_id) == (2 * S, 2)


def test_what_is_made_ahead_is_bounded_whatever_the_trace(tmp_path):
    cut([trace([0] * 2000)], Router("session", 1).assign, 1, tmp_path, think_time=False)
    work = Workload(config(tmp_path), read_rows(tmp_path, 0))
    while work.make_ahead():
        pass
    assert len(work._ready) <= 256
    work.begin(0)
    assert len({work.pop().row.request_id for _ in range(2000)}) == 2000


def load(frame, rows=100):
    peak = Peak()
    for part in frame.iter_slices(rows):
        peak.add(part["arrival_ns"].to_numpy(), part["output_tokens"].to_numpy().astype(np.int64))
    return peak.load


def test_the_peak_load_counts_the_fullest_second_and_streams_of_50_ms_a_token():
    assert load(trace([0, 0, S - 1, S, 5 * S])) == (5, 3.0, 2.0)
    assert load(trace([i * S for i in range(20)], output_tokens=100)).streams == 6.0, "5 s each, one a second"
    assert load(trace([])) == Load()


@given(st.lists(st.integers(0, 5 * S), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 60))
def test_no_cut_into_batches_changes_the_peak_load(times, rows, output_tokens):
    whole = trace(sorted(times), output_tokens=output_tokens)
    assert load(whole, rows) == load(whole)
    ends = [t + output_tokens * S // 20 for t in sorted(times)]
    opened = [sum(a <= t <= b for a, b in zip(sorted(times), ends, strict=True)) for t in times]
    assert load(whole).streams <= max(opened)
    assert load(whole).rps == max(sum(t <= other < t + S for other in times) for t in times)


def test_what_is_due_is_told_to_a_second_however_long_the_trace():
    for last_s in (1, 90, 10**7):
        times = np.linspace(0, last_s * S, 1001).astype(np.int64)
        due = Due(int(times[-1]))
        for at in range(0, 1001, 100):
            due.add(times[at : at + 100])
        assert (due.by(-S), due.by(times[-1] * 2), due.requests) == (0, 1001, 1001)
        assert due.by(int(times[-1]) // 2) == pytest.approx(501, abs=max(2, 1001 / last_s))
        assert due._upto.size < 70_000


def test_as_many_workers_as_the_load_needs_and_cores_there_are(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    fast = {"fast": True, "one": False, "asked": None}
    assert worker_count(load(trace([0])), **fast) == 1
    assert worker_count(load(trace([0] * 2500)), **fast) == 3
    assert worker_count(load(trace([0] * 50_000)), **fast) == 4
    assert worker_count(load(trace([0] * 50_000)), **{**fast, "one": True}) == 1
    assert worker_count(load(trace([0] * 900)), **{**fast, "fast": False}) == 3
    assert worker_count(load(trace([0] * 10)), **{**fast, "asked": 7}) == 7
    assert worker_count(load(trace([0] * 3)), **{**fast, "asked": 7}) == 3, "none without a request"


def test_too_few_files_are_told_before_the_start(monkeypatch):
    allowed = []
    monkeypatch.setattr(cut_module.resource, "getrlimit", lambda _: (1024, 10_000))
    monkeypatch.setattr(cut_module.resource, "setrlimit", lambda _, limits: allowed.append(limits))
    many = Load(10_000, 10_000.0, 10_000.0)
    with pytest.raises(
        ReplayError, match=r"about 10,000 streams at once are expected, and a process may open 10,000 files"
    ):
        check_descriptors(many, 1, None)
    check_descriptors(many, 2, None)
    check_descriptors(many, 1, 500)
    assert set(allowed) == {(10_000, 10_000)}, "what the system lets it have, it takes"


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:8000/base", True),
        ("https://x", False),
        ("http://me:word@x", False),
    ],
)
def test_the_fast_path_speaks_plain_http_alone(url, plain):
    assert plain_http(url) is plain
    assert through_proxies(url) is url.startswith("https:")


def test_the_limit_on_the_rate_spaces_requests_and_saves_up_no_burst():
    limit = RateLimit(4.0)
    gone = []
    for due_ns in [0, 0, 0, 10 * S, 10 * S]:
        t_ns = max(due_ns, limit.next_ns)
        limit.take(t_ns)
        gone.append(t_ns)
    assert gone == [0, S // 4, S // 2, 10 * S, 10 * S + S // 4]
