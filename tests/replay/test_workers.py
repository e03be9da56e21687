"""Load workers as the replayer sees them: several share a trace, and one that is killed fails the run in order."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.plan import RunOptions
from replay.rundir import Run
from replay.tally import Histogram, Tally
from replay.workers import yielding
from tracegen.errors import ReplayError

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(scope="module")
def shared(make_trace, replay, tmp_path_factory, sim_server):
    folder = tmp_path_factory.mktemp("shared")
    trace = make_trace(folder / "trace.parquet", [(i * 10, 20, 3) for i in range(40)])
    return Run.open(replay(trace, engine=sim_server, output=folder / "run", workers=2))


def test_workers_send_by_turns_from_one_epoch(shared):
    requests = shared.scan("requests").collect().sort("scheduled_ns")
    assert requests["worker"].to_list() == [0, 1] * 20
    assert requests["status"].unique().to_list() == ["ok"]
    trace = shared.scan("trace").collect()
    start_ns = shared.manifest["measure_start_ns"]
    assert (requests["scheduled_ns"] == start_ns + trace["arrival_ns"]).all()
    assert [entry["worker"] for entry in shared.manifest["workers"]] == [0, 1]
    assert shared.manifest["requests"] == {"planned": 40, "sent": 40, "ended": 40}


@linux
def test_the_manifest_says_how_exact_the_clients_times_are(kernel_stamps, shared):
    error = shared.manifest["client_error"]
    assert error["source"] == "kernel stamps"
    assert 0 < error["ttft_ms"]["p50"] <= error["ttft_ms"]["p99"] <= error["ttft_ms"]["max"]
    assert error["read_delay_ms"]["p50"] >= 0
    assert (error["unstamped"], error["shared"], error["wall_clock_steps"]) == (0, 0, 0)


def test_a_worker_that_is_killed_fails_the_run_and_keeps_what_was_recorded(
    command, make_trace, tmp_path, sim_server, processes, until
):
    rows = [*[(i * 50, 20, 3) for i in range(10)], (600_000, 20, 3), (600_000, 20, 3)]
    trace = make_trace(tmp_path / "trace.parquet", rows)
    run_dir = tmp_path / "run"
    process = command("run", trace, "--engine", sim_server, "--workers", 2, "-o", run_dir)
    until(lambda: len(list((run_dir / "requests.parquet").glob("*.parquet"))) >= 2)
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in processes(run_dir)}
    (worker,) = [pid for pid, argv in words.items() if b"replay.worker" in argv and argv[-2] == b"1"]
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    run = Run.open(run_dir)
    assert run.manifest["state"] == "failed"
    assert run.manifest["failure"].startswith("load worker 1 ended by signal 9")
    assert run.scan("requests").collect()["status"].to_list() == ["ok"] * 10
    assert processes(run_dir) == []


def test_a_disk_that_fills_up_under_a_worker_ends_the_run_in_one_line(
    make_trace, replay, tmp_path, sim_server, monkeypatch
):
    full = tmp_path / "full"
    full.mkdir()
    code = "import errno, replay.reqlog as r\ndef write(self):\n raise OSError(errno.ENOSPC, 'full')\n"
    (full / "sitecustomize.py").write_text(code + "r.RequestLog.write = write\n")
    monkeypatch.setenv("PYTHONPATH", str(full))
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 3), (60_000, 20, 3)])
    with pytest.raises(ReplayError, match=r"cannot be written \(No space left on device\); the run ended early"):
        replay(trace, engine=sim_server, output=tmp_path / "run")
    assert Run.open(tmp_path / "run").manifest["state"] == "failed"


@pytest.mark.parametrize("closed", [{"max_concurrency": 3}, {"max_rate_rps": 2.0}, {"router": "least-loaded"}])
def test_what_counts_all_requests_needs_one_worker(make_trace, replay, tmp_path, sim_server, closed):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 3)] * 4)
    with pytest.raises(ReplayError, match="--workers 2 with a cap or --router least-loaded"):
        replay(trace, engine=sim_server, output=tmp_path / "run", workers=2, **closed)
    assert not (tmp_path / "run").exists()


def test_a_server_whose_name_leads_nowhere_leaves_no_run(make_trace, replay, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 3)])
    with pytest.raises(ReplayError):
        replay(trace, engine="http://no.such.host.invalid:1", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@linux
def test_ten_thousand_streams_with_too_few_files_are_refused_before_anything_is_asked(command, make_trace, tmp_path):
    import resource

    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 500)] * 10_000)
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))  # noqa: E731 - the child's own
    options = ("--engine", "http://127.0.0.1:1", "--workers", "1", "-o", tmp_path / "run")
    process = command("run", trace, *options, preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "about 10,000 streams at once are expected, and" in line
    assert "a process may open 4,096 files here: raise that (ulimit -n, LimitNOFILE)" in line
    assert not (tmp_path / "run").exists()


def test_options_of_the_load_are_checked(make_trace, replay, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 3)])
    with pytest.raises(ReplayError, match="--endpoint talk: use one of completions, chat"):
        replay(trace, engine="sim", endpoint="talk")
    assert RunOptions(trace).workers is None


DURATIONS = st.lists(st.integers(0, 10**12), min_size=1, max_size=50)


@given(DURATIONS, DURATIONS, st.floats(0.01, 1.0))
def test_a_histograms_quantile_is_within_a_bin_of_the_true_one(first, second, q):
    histogram, other = Histogram(), Histogram()
    for value in first:
        histogram.add(value)
    for value in second:
        other.add(value)
    histogram.merge(Histogram.from_list(other.as_list()))
    ordered = sorted(first + second)
    found = histogram.quantile_ns(q)
    upto = sum(value <= found for value in ordered) / len(ordered)
    below = sum(value < found / 1.05 for value in ordered) / len(ordered)
    assert upto >= q * (1 - 1e-9), "a share q lies at or below it"
    assert below <= q or found <= 1000, "and it is no more than a bin above the least such"
    assert histogram.summary_ms()["max"] == max(ordered) / 1e6


def test_a_message_fits_into_one_write_to_a_pipe():
    import msgspec

    from replay.stream import Record

    tally = Tally()
    for i in range(1000):
        record = Record(i, 0, 0, 5, sent_ns=10**12, first_token_ns=10**13)
        tally.send(record)
        tally.first_token(record)
    streams = [Record(i, 0, 0, 5) for i in range(1000)]
    for record in streams:
        record.chunk_ns.extend([0, 10**13])
    assert len(msgspec.json.encode(tally.message(streams))) < 4096


@linux
def test_the_replayer_yields_while_requests_are_sent_and_not_after():
    before = os.sched_getscheduler(0)
    with yielding():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before
