"""A run that is cut short, in every way: what was measured stays, and nothing stays behind."""

import contextlib
import os
import signal
from pathlib import Path

import polars as pl
import pytest

from analysis.energy import attribute
from replay.records import recover
from replay.rundir import Run, has_table

SHORT, LONG = (0, 50, 3), (0, 200, 9000)


@pytest.fixture
def start(command, make_trace, tmp_path, until):
    """Start a run on the simulated engine; it is given in the middle: eight requests have ended, four are in flight."""
    rows = [*[(i * 100, 50, 3) for i in range(8)], *[(800 + i, 200, 9000) for i in range(4)], (600_000, 10, 1)]
    trace = make_trace(tmp_path / "trace.parquet", rows)
    run_dir = tmp_path / "run"

    def start(idle="0s", **popen):
        options = ("--engine", "sim", "--tp", "8", "--freq", "1200", "--idle", idle, "-o", run_dir)
        process = command("run", trace, *options, **popen)
        until(lambda: process.poll() is not None or under_way(run_dir))
        assert process.poll() is None
        return process, run_dir

    return start


def under_way(run_dir):
    """Whether the eight short requests are on record and the engine says that it runs the four long ones."""
    if not (has_table(run_dir, "requests") and has_table(run_dir, "server_metrics")):
        return False
    if Run.open(run_dir).scan("requests").collect().height < 8:
        return False  # a part is written each second: the first may hold only some of the eight
    metrics = Run.open(run_dir).scan("server_metrics").collect()
    running = metrics.filter(pl.col("name").str.ends_with("num_requests_running"))["value"]
    return not running.is_empty() and running[-1] == 4


def read_all(terminal):
    """All that was written to a terminal, until the last writer has gone."""
    shown = b""
    with contextlib.suppress(OSError):  # Linux tells the end of a terminal by an error
        while data := os.read(terminal, 65536):
            shown += data
    os.close(terminal)
    return shown.decode()


def statuses(run):
    return dict(run.scan("requests").collect()["status"].value_counts().iter_rows())


def test_ctrl_c_writes_the_run_in_order(start, processes):
    process, run_dir = start(idle="700ms")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "SIMULATED  interrupted: 8 of 13 requests ok" in out
    run = Run.open(run_dir)
    assert run.manifest["state"] == "interrupted"
    assert statuses(run) == {"ok": 8, "aborted": 4}
    aborted = run.scan("requests").filter(pl.col("status") == "aborted").collect()
    assert aborted["done_ns"].null_count() == 4
    assert aborted["first_token_ns"].null_count() == 0
    assert aborted["output_tokens"].min() > 0
    assert run.manifest["requests"] == {"planned": 13, "sent": 12, "ended": 12}
    answered = next(v for v in run.manifest["verdicts"] if v["name"] == "error_rate")
    assert answered["why"] == "8 of 13 requests ok: 4 aborted, 1 not sent"
    assert processes(run_dir) == []
    summary = attribute(run).summary
    total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(start, processes, until):
    terminal, stderr = os.openpty()
    process, run_dir = start(stderr=stderr)
    os.close(stderr)
    assert processes(run_dir), "engine, sampler and clock holder carry the directory's name"
    process.send_signal(signal.SIGINT)
    until(lambda: Run.open(run_dir).manifest["state"] != "running" or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    shown = read_all(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "ended at once; 'replay check' says what is on record" in shown.splitlines()[-1]
    # The holder restores the clocks before it ends (test_clocks.py); the board goes with the run.
    until(lambda: not processes(run_dir))
    assert Run.open(run_dir).manifest["state"] == "interrupted"
    assert Run.open(run_dir).scan("requests").collect().height >= 8


def test_sigkill_leaves_a_readable_run_and_no_process(start, processes, until):
    process, run_dir = start()
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not processes(run_dir))
    run = Run.open(run_dir)
    assert run.manifest["state"] == "running"
    assert (run_dir / "requests.parquet").is_dir(), "still in parts"
    assert statuses(run) == {"ok": 8}
    for table in ("steps", "segments", "power", "server_metrics", "trace"):
        assert run.scan(table).collect().height > 0
    assert recover(run_dir) == 4, "what was in flight"
    assert statuses(run) == {"ok": 8, "aborted": 4}
    known = run.scan("segments").collect()["request_id"].unique().to_list()
    assert set(known) >= set(run.scan("requests").collect()["request_id"])


def test_an_engine_that_dies_fails_the_run_and_keeps_it(start, processes):
    process, run_dir = start()
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in processes(run_dir)}
    (engine,) = [pid for pid, argv in words.items() if b"replay.sim.server" in argv and b"replay.leash" not in argv]
    os.kill(engine, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    run = Run.open(run_dir)
    assert run.manifest["state"] == "failed"
    assert statuses(run) == {"ok": 8, "stream_error": 4}
    assert not run.has("truth"), "the engine's last steps are lost, so what they cost is not known"
    assert "failed: 8 of 13 requests ok" in out
    assert out.splitlines()[-3].startswith("invalid: the run failed: the server ended while requests were sent")
    assert processes(run_dir) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_leaves_nothing(command, make_trace, tmp_path, until, processes, number):
    trace = make_trace(tmp_path / "trace.parquet", [SHORT])
    run_dir = tmp_path / "run"
    process = command("run", trace, "--engine", "sim", "--tp", "8", "--freq", "1200", "--idle", "30s", "-o", run_dir)
    until((run_dir / "server.log").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert not run_dir.exists()
    assert processes(run_dir) == []


def test_a_signal_while_the_sampler_starts_leaves_nothing(command, make_trace, tmp_path, until, processes):
    trace = make_trace(tmp_path / "trace.parquet", [SHORT])
    run_dir = tmp_path / "run"
    process = command("run", trace, "--engine", "sim", "--tp", "8", "-o", run_dir)
    until(lambda: processes(run_dir / ".board"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
    until(lambda: not processes(run_dir / ".board"))
    assert not run_dir.exists()
