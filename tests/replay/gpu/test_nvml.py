"""NVML through the real pynvml, against a small driver library written in C (fake_nvml.c)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from replay.rundir import Run

MS = 1_000_000


@pytest.fixture
def ask(driver):
    """Run `expression` on open GPUs in a process that finds the fake driver; its value, or the error's text."""

    def ask(expression, mode=""):
        script = f"""
import json
from dataclasses import asdict
from replay.gpu.base import open_gpus
from tracegen.errors import GpuError
try:
    gpus = open_gpus("nvml")
    print(json.dumps({expression}))
    gpus.close()
except GpuError as error:
    print(json.dumps(str(error)))
"""
        argv = [sys.executable, "-c", script]
        done = subprocess.run(argv, env=driver(mode), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_devices_and_their_published_sensors(ask):
    devices, sensors = ask("[[asdict(d) for d in gpus.devices()], {k: asdict(s) for k, s in gpus.sensors(1).items()}]")
    assert devices == [{"gpu": i, "uuid": f"GPU-fake-{i}", "name": "NVIDIA H100 80GB HBM3"} for i in (0, 1)]
    assert sensors["instant"] == {"period_ns": 100 * MS, "window_ns": 25 * MS, "lag_ns": 0}
    assert sensors["average"]["window_ns"] == 1000 * MS


def test_a_reading_takes_instant_and_average_power_from_their_own_fields(ask):
    reading = ask("asdict(gpus.read(1))")
    assert 150_000 <= reading.pop("power_instant_mw") <= 156_000
    energy_j = reading.pop("energy_mj") / 1e3
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert energy_j == pytest.approx(uptime_s * 153, rel=0.01)
    assert reading == {
        "power_average_mw": 153_000,
        "sm_clock_mhz": 1980,
        "mem_clock_mhz": 2619,
        "temperature_c": 41,
        "utilization": 55,
        "throttle_reasons": 2,
    }


def test_what_a_gpu_does_not_have_is_none(ask):
    assert set(ask("asdict(gpus.read(0))", "bare").values()) == {None}
    assert ask("gpus.sensors(0)", "bare") == {}
    assert ask("gpus.supported_clocks_mhz(0)", "bare") == []


def test_a_driver_without_power_fields_gives_the_average(ask):
    assert ask("[gpus.read(0).power_instant_mw, gpus.read(0).power_average_mw]", "old") == [None, 103_000]


def test_supported_clocks_ascend_on_their_grid(ask):
    assert ask("gpus.supported_clocks_mhz(0)") == list(range(210, 1981, 15))


def test_clocks_are_locked_and_given_back(ask, tmp_path):
    assert ask("[gpus.lock_clock(1, 1200), gpus.read(1).sm_clock_mhz, gpus.read(0).sm_clock_mhz]") == [None, 1200, 1980]
    assert ask("[gpus.unlock_clock(1), gpus.read(1).sm_clock_mhz]") == [None, 1980]
    assert (tmp_path / "clocks.log").read_text() == "1 1200\n1 0\n"


@pytest.mark.parametrize(
    ("mode", "expression", "message"),
    [
        ("denied", "gpus.lock_clock(0, 1200)", "the driver refused nvmlDeviceSetGpuLockedClocks: changing clocks"),
        ("lost", "gpus.read(0)", "failed: GPU is lost"),
        ("none", "0", "the NVIDIA driver lists no GPU; to run without one use --engine sim"),
        ("broken", "0", "no NVIDIA GPU can be reached (Driver Not Loaded); to run without one use --engine sim"),
        ("", "gpus.read(2)", "GPU 2 does not exist; this host has GPUs 0 to 1"),
        ("", "gpus.read(-1)", "GPU -1 does not exist"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_clear_line(ask, mode, expression, message):
    assert message in ask(expression, mode)


def test_without_the_library_the_error_names_the_way_out():
    script = "from replay.gpu.base import open_gpus; open_gpus('nvml')"
    env = {**os.environ, "LD_LIBRARY_PATH": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 0:
        pytest.skip("this host has NVIDIA's own library")
    assert "to run without one use --engine sim" in done.stderr


@pytest.fixture
def attached(driver, plain_server, make_trace, tmp_path):
    """Run `replay run` against a running server, on the GPUs of the fake driver."""
    trace = make_trace(tmp_path / "trace.parquet", [(i * 40, 60, 4) for i in range(20)])

    def run(*arguments, mode=""):
        argv = [sys.executable, "-m", "replay.cli", "run", str(trace), "--engine", plain_server, *arguments]
        argv += ["--gpus", "0,1", "--idle", "700ms", "-o", str(tmp_path / "run")]
        return subprocess.run(argv, env=driver(mode), capture_output=True, text=True, timeout=120, check=False)

    return run


def test_a_run_locks_reads_and_gives_the_clocks_back(attached, tmp_path):
    done = attached("--freq", "1207")
    assert done.returncode == 0, done.stderr
    assert "--freq 1207: not a clock of this GPU; locking the nearest, 1200 MHz" in done.stderr
    assert "SIMULATED" not in done.stdout + done.stderr
    assert (tmp_path / "clocks.log").read_text().splitlines() in (
        [["0 1200", "1 1200", *rest] for rest in (["0 0", "1 0"], ["1 0", "0 0"])]
    )
    run = Run.open(tmp_path / "run")
    instance = run.manifest["instances"][0]
    assert (run.manifest["engine"], run.manifest["state"]) == ("attached", "complete")
    assert (instance["freq_mhz"], instance["freq_asked_mhz"], instance["gpus"]) == (1200, 1207, [0, 1])
    assert [gpu["uuid"] for gpu in run.manifest["gpus"]] == ["GPU-fake-0", "GPU-fake-1"]
    power = run.scan("power").collect()
    assert power["sm_clock_mhz"].unique().to_list() == [1200]
    for gpu, watts in ((0, 103.0), (1, 153.0)):
        entry = run.manifest["gpus"][gpu]
        for idle in (entry["idle_power_w"], entry["idle_power_after_w"]):
            assert idle["counter"] == pytest.approx(watts, rel=0.03)
            assert idle["instant"] == pytest.approx(watts, rel=0.03)
        dated = power.filter(pl.col("gpu") == gpu)["sensor_ns"].drop_nulls()
        polls = power.filter(pl.col("gpu") == gpu)["t_ns"]
        # The fake's sensors update on whole tenths of a second of this very clock.
        off_ns = (dated + 20 * MS) % (100 * MS) - 20 * MS
        assert 0 <= off_ns.median() <= polls.diff().median()
    verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
    assert verdicts["clocks_held"] is True
    assert verdicts["counter_agrees"] is not None
    assert verdicts["steps_complete"] is None
    assert not run.has("truth")


@pytest.mark.parametrize(
    ("mode", "freq", "message"),
    [
        ("denied", "1200", "needs root or CAP_SYS_ADMIN"),
        ("denied1", "1200", "needs root or CAP_SYS_ADMIN"),
        ("", "5000", "--freq 5000: GPU 0 supports SM clocks from 210 to 1980 MHz"),
        ("bare", "1200", "GPU 0 lists no supported SM clocks; run without --freq"),
        ("lost", "1200", "GPU is lost"),
        ("none", "1200", "lists no GPU"),
    ],
)
def test_clocks_that_cannot_be_had_end_the_run_before_it_starts(attached, tmp_path, mode, freq, message):
    done = attached("--freq", freq, mode=mode)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1)
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    log = tmp_path / "clocks.log"
    last = dict(line.split() for line in log.read_text().splitlines()) if log.exists() else {}
    assert set(last.values()) <= {"0"}, "what was locked is given back"


def test_a_gpu_that_does_not_exist_is_named(driver, plain_server, make_trace, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 10, 2)])
    argv = [
        sys.executable,
        "-m",
        "replay.cli",
        "run",
        str(trace),
        "--engine",
        plain_server,
        "--gpus",
        "1,2",
        "-o",
        "run",
    ]
    done = subprocess.run(argv, env=driver(), capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: GPU 2 does not exist: this host has 2 (--tp 2, --gpus)"
    assert not (tmp_path / "run").exists()
