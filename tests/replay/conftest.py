"""What the tests of replay share: traces, a run on the simulated engine, the command in a process of its own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.clock import now_ns
from replay.engines.process import free_port
from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.session import run
from replay.stamps import ANCILLARY_BYTES, ask_for_stamps
from tracegen.schema import TRACE, write_trace

MS = 1_000_000


@pytest.fixture(scope="session")
def kernel_stamps():
    """The kernel stamps what sockets receive: it begins to in its own time after a first socket asks for it."""
    deadline_s = time.monotonic() + 30
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as asking:
        peer, _ = server.accept()
        with peer:
            assert ask_for_stamps(asking)
            ancillary = []
            while not ancillary and time.monotonic() < deadline_s:
                peer.send(b"x")
                _, ancillary, _, _ = asking.recvmsg(10, ANCILLARY_BYTES)
            yield


@pytest.fixture(scope="session")
def make_trace():
    """Write a trace of the given (arrival ms, input tokens, output tokens) and return its path."""

    def make(path, rows, metadata=None, **columns):
        data = {
            "request_id": range(100, 100 + len(rows)),
            "arrival_ns": [row[0] * MS for row in rows],
            "input_tokens": [row[1] for row in rows],
            "output_tokens": [row[2] for row in rows],
        }
        frame = pl.DataFrame(data, schema=TRACE).with_columns(**columns)
        write_trace(frame, path, {"generator": "test", **(metadata or {})})
        return path

    return make


@pytest.fixture(scope="session")
def replay():
    """`replay.session.run` without a terminal; what it does, not how it looks."""

    def replay(trace, progress=None, **options):
        return asyncio.run(run(RunOptions(trace, **options), progress or QuietProgress()))

    return replay


@pytest.fixture(scope="session")
def sim_run(tmp_path_factory, make_trace, replay):
    """A complete run of 24 requests on the simulated engine, TP 8 locked at 1200 MHz; nobody writes into it."""
    folder = tmp_path_factory.mktemp("sim")
    rows = [(130 * i, 40 + 397 * (i % 7), 4 + 11 * (i % 5)) for i in range(24)]
    trace = make_trace(folder / "trace.parquet", rows)
    return replay(
        trace, engine="sim", tp=8, freq_mhz=1200, output=folder / "run", idle_ns=700 * MS, metadata={"why": "test"}
    )


@pytest.fixture
def command(tmp_path):
    """Start `replay ARGUMENTS` in a process (group) of its own; what still runs at the end is killed."""
    started = []

    def start(*arguments, env=None, **popen):
        argv = [sys.executable, "-m", "replay.cli", *map(str, arguments)]
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, **(env or {})},
            start_new_session=True, **{"stderr": subprocess.PIPE, **popen},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def sim_server(tmp_path_factory):
    """The URL of a simulated engine that is somebody else's."""
    folder = tmp_path_factory.mktemp("server")
    files = ["--board", str(folder / "board"), "--record", str(folder / "record"), "--served-model-name", "llama"]
    argv = [sys.executable, "-m", "replay.sim.server", *files, "--port", "0", "--exit-with-parent"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("SIMULATED engine")
    yield line.split()[-1]
    process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="session")
def plain_server():
    """The URL of a server that is somebody else's and not simulated, as far as it says (fake_vllm.py)."""
    port = free_port()
    argv = [sys.executable, str(Path(__file__).parent / "fake_vllm.py"), "serve", "org/model", "--port", str(port)]
    process = subprocess.Popen(argv)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Sending:
    """A load worker's path in this process, with one shard."""

    def __init__(self, kind, config):
        from replay.fastpath import FastPath
        from replay.generalpath import GeneralPath

        self._run_dir = config.path
        self._read, write = os.pipe()
        self._write = os.fdopen(write, "wb", buffering=0)  # a file: two threads may close it
        self.told = []
        self.path = {"fast": FastPath, "general": GeneralPath}[kind](config, self.told.append, stop_fd=self._read)

    def run(self, epoch_ns=None):
        """Send all; the records, in the order of their ends."""
        from replay.reqlog import files, read

        try:
            self.path.run(now_ns() + 20 * MS if epoch_ns is None else epoch_ns)
        finally:
            self.stop()
            os.close(self._read)
        return [record for path in files(self._run_dir, cut_off=True) for record in read(path)]

    def stop(self):
        """As when the replayer ends."""
        self._write.close()


@pytest.fixture
def send_rows(tmp_path_factory):
    """Make a path ("fast" or "general") ready to send (arrival ms, input, output tokens) rows to `url`."""

    def send_rows(kind, url, rows, *, columns=None, **options):
        from replay.cut import cut
        from replay.workload import Config

        folder = tmp_path_factory.mktemp("worker")
        data = {
            "request_id": range(42, 42 + len(rows)), "arrival_ns": [row[0] * MS for row in rows],
            "input_tokens": [row[1] for row in rows], "output_tokens": [row[2] for row in rows],
        }  # fmt: skip
        trace = pl.DataFrame(data, schema=TRACE).with_columns(**(columns or {}))
        urls = [url] if isinstance(url, str) else url
        routes = options.pop("routes", [0] * len(rows))
        config = Config(run_dir=str(folder), fast=kind == "fast", base_urls=urls, model="m", salt=1, **options)
        cut([trace], lambda _: np.array(routes), 1, folder, think_time=config.think_time)
        return Sending(kind, config)

    return send_rows
