"""The commands about GPUs, and runs on power that another meter tells, as a user types them."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from analysis.energy import attribute
from replay.gpu.sensor_profiles import load_profile
from replay.rundir import Run


@pytest.fixture
def replay_command(tmp_path):
    """Run `replay ARGUMENTS` in an environment."""

    def run(*arguments, env):
        argv = [sys.executable, "-m", "replay.cli", *map(str, arguments)]
        env = env | {"XDG_CONFIG_HOME": str(tmp_path / "config"), "COLUMNS": "200"}
        return subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_clocks_show_says_how_each_gpu_runs(replay_command, driver):
    env = driver(processes=f"1:{os.getpid()}:3000")
    done = replay_command("clocks", "show", env=env)
    assert done.returncode == 0, done.stderr
    head, first, second = done.stdout.splitlines()
    assert head.split()[:2] == ["GPU", "name"]
    assert "1,980 MHz" in first
    assert "210-1980" in first
    assert "700 W" in first
    assert str(os.getpid()) in second
    document = json.loads(replay_command("clocks", "show", "--json", env=env).stdout)
    assert [(gpu["gpu"], gpu["sm_clock_mhz"], gpu["power_limit_w"]) for gpu in document] == [
        (0, 1980, 700), (1, 1980, 700)
    ]  # fmt: skip


def test_clocks_reset_gives_back_what_others_left(replay_command, driver, tmp_path):
    (tmp_path / "clocks.log").write_text("0 1200\n1 1410\n1 W 300\n")
    done = replay_command("clocks", "reset", env=driver())
    assert done.returncode == 0, done.stderr
    assert "GPU 0: the SM clock is the driver's" in done.stdout
    assert "GPU 1: the power limit is the default again, 700 W (it was 300 W)" in done.stdout
    assert (tmp_path / "clocks.log").read_text().splitlines()[3:] == ["0 0", "1 0", "1 W 700"]
    only = replay_command("clocks", "reset", "--gpus", "1", env=driver())
    assert "GPU 0" not in only.stdout
    refused = replay_command("clocks", "reset", env=driver("denied1"))
    assert refused.returncode == 2
    assert "GPU 0: the SM clock is the driver's" in refused.stdout, "one that refuses does not stop the others"
    assert "root" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_a_driver_they_say_so(replay_command):
    for arguments in (["clocks", "show"], ["clocks", "reset"], ["probe"]):
        done = replay_command(*arguments, env={**os.environ, "LD_LIBRARY_PATH": "/nonexistent"})
        if done.returncode == 0:
            pytest.skip("this host has a GPU")
        assert done.returncode == 2
        assert done.stderr.startswith("error: no NVIDIA GPU can be reached")


def test_a_probe_is_what_later_runs_go_by(replay_command, driver, plain_server, make_trace, tmp_path):
    done = replay_command("probe", "--gpus", "0", "--no-load", "--seconds", "2", "--idle", "1s", env=driver())
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H100 80GB HBM3 (GPU-fake-0), probed" in done.stdout
    os.environ["XDG_CONFIG_HOME"], before = str(tmp_path / "config"), os.environ.get("XDG_CONFIG_HOME")
    try:
        profile = load_profile("GPU-fake-0", "NVIDIA H100 80GB HBM3")
    finally:
        os.environ.pop("XDG_CONFIG_HOME")
        if before is not None:
            os.environ["XDG_CONFIG_HOME"] = before
    assert profile.instant.period_ns == pytest.approx(100_000_000, rel=0.01)
    trace = make_trace(tmp_path / "trace.parquet", [(0, 10, 2)])
    run = replay_command(
        "run", trace, "--engine", plain_server, "--gpus", "0", "--idle", "0s", "-o", "run", env=driver()
    )
    assert run.returncode == 0, run.stderr
    gpus = Run.open(tmp_path / "run").manifest["gpus"]
    assert gpus[0]["sensors_source"].startswith("probed ")
    assert gpus[0]["sensors"]["instant"]["period_ns"] == profile.instant.period_ns
    assert gpus[1]["sensors_source"].startswith("published for ")


def test_a_run_reads_an_external_meters_log(replay_command, plain_server, make_trace, tmp_path):
    meter, stop = tmp_path / "meter.csv", threading.Event()
    meter.write_text("time,gpu0_w,gpu1_w\n")

    def log():
        while not stop.wait(0.02):
            with meter.open("a") as file:
                file.write(f"{time.time():.6f},150.0,90.0\n")

    writer = threading.Thread(target=log)
    writer.start()
    try:
        time.sleep(0.2)
        trace = make_trace(tmp_path / "trace.parquet", [(i * 30, 10, 2) for i in range(30)])
        arguments = ["--engine", plain_server, "--gpus", "0", "--power", f"csv:{meter}", "--idle", "1s", "-o", "run"]
        done = replay_command("run", trace, *arguments, env=dict(os.environ))
    finally:
        stop.set()
        writer.join()
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert [gpu["uuid"] for gpu in run.manifest["gpus"]] == ["csv:meter.csv:gpu0_w", "csv:meter.csv:gpu1_w"]
    assert run.manifest["gpus"][0]["idle_power_w"]["instant"] == pytest.approx(150.0)
    summary = attribute(run).summary
    seconds = summary["window"]["duration_s"]
    assert summary["measured_j"] == pytest.approx(150.0 * seconds, rel=0.05)
    total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)


def test_a_run_reads_an_exporter(replay_command, plain_server, make_trace, tmp_path):
    began_s = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            who = 'gpu="0",UUID="GPU-x",modelName="NVIDIA H100"'
            energy_mj = round((time.monotonic() - began_s) * 200_000)
            text = f"DCGM_FI_DEV_POWER_USAGE{{{who}}} 200\nDCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{who}}} {energy_mj}\n"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        trace = make_trace(tmp_path / "trace.parquet", [(i * 30, 10, 2) for i in range(30)])
        power = f"prometheus:http://127.0.0.1:{server.server_port}/metrics"
        arguments = ["--engine", plain_server, "--gpus", "0", "--power", power, "--idle", "1s", "-o", "run"]
        done = replay_command("run", trace, *arguments, env=dict(os.environ))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert run.manifest["gpus"][0]["uuid"] == "GPU-x"
    power = run.scan("power").collect()
    assert power["power_average_mw"].drop_nulls().unique().to_list() == [200_000]
    assert power["power_instant_mw"].null_count() == power.height
    assert run.manifest["gpus"][0]["idle_power_w"]["counter"] == pytest.approx(200.0, rel=0.02)


def test_a_meter_that_is_not_there_is_one_line(replay_command, plain_server, make_trace, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 10, 2)])
    for power, message in (("csv:none.csv", "none.csv"), ("prometheus:http://127.0.0.1:9/metrics", "127.0.0.1:9")):
        arguments = ["--engine", plain_server, "--gpus", "0", "--power", power, "-o", "run"]
        done = replay_command("run", trace, *arguments, env=dict(os.environ))
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
