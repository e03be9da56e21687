"""GPUs that fail in the middle of a run: the run goes on, ends whole, and says what is missing."""

import json
import subprocess
import sys

import polars as pl
import pytest

from replay.meters import Gauge
from replay.rundir import Run
from replay.show import lines
from replay.summary import summarize
from replay.tables import POWER

S = 1_000_000_000
MS = 1_000_000


@pytest.fixture
def running(driver, plain_server, make_trace, tmp_path, until):
    """Start `replay run` for 4 s on both GPUs of the fake driver, and return once it is sending."""
    trace = make_trace(tmp_path / "trace.parquet", [(i * 100, 60, 4) for i in range(40)])
    started = []

    def start(**settings):
        argv = [sys.executable, "-m", "replay.cli", "run", str(trace), "--engine", plain_server]
        argv += ["--gpus", "0,1", "--idle", "700ms", "-o", str(tmp_path / "run")]
        process = subprocess.Popen(
            argv, env=driver(**settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        manifest = tmp_path / "run" / "manifest.json"

        def state():
            assert process.poll() is None, process.communicate()
            return manifest.exists() and manifest.read_text() and json.loads(manifest.read_text())["state"]

        until(lambda: state() == "running", timeout_s=60)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_gpu_that_falls_off_the_bus_is_named_and_the_other_goes_on(running, tmp_path):
    power_file = tmp_path / "power"
    power_file.touch()
    process = running(power=power_file)
    start_ns = json.loads((tmp_path / "run" / "manifest.json").read_text())["measure_start_ns"]
    lost_ns = start_ns + 1_300 * MS
    power_file.write_text(f"1 {lost_ns} -1\n")
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    run = Run.open(tmp_path / "run")
    assert run.manifest["state"] == "complete"
    assert run.scan("requests").collect()["status"].unique().to_list() == ["ok"]
    power = run.scan("power").collect()
    end_ns = run.manifest["measure_end_ns"]
    values = ["power_instant_mw", "power_average_mw", "energy_mj", "sm_clock_mhz"]
    other, lost = (power.filter(pl.col("gpu") == gpu) for gpu in (0, 1))
    assert other["t_ns"].max() > end_ns
    assert other["t_ns"].diff().max() < S
    assert sum(other[value].null_count() for value in values) == 0
    after = lost.filter(pl.col("t_ns") > lost_ns + S)
    assert after.height > 0, "that it was polled in vain is on record"
    assert all(after[value].null_count() == after.height for value in values)
    alive = next(v for v in run.manifest["verdicts"] if v["name"] == "sensor_alive")
    assert alive["ok"] is False
    assert "GPU 1 was not read from 1." in alive["why"]
    assert "GPU 0" not in alive["why"]
    assert "\ninvalid: " in out
    summary = summarize(tmp_path / "run")
    assert (summary["energy_j"], summary["mean_power_w"]) == (None, None)
    assert summary["energy_why"].startswith("the energy counter of GPU 1 was read from 0.0 s to 1.")
    assert next(line for line in out.splitlines() if line.startswith("energy")).startswith("energy  not measured: ")


def test_a_counter_that_wraps_around_is_named_and_no_energy_is_made_of_it(running, tmp_path):
    # GPU 0 draws 103 W in the mean: its counter comes round every 1.5 s, within a run of 4 s twice at least.
    process = running(wrap_mj=1_500 * 103)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    run = Run.open(tmp_path / "run")
    assert run.manifest["state"] == "complete"
    agrees = next(v for v in run.manifest["verdicts"] if v["name"] == "counter_agrees")
    assert (agrees["ok"], agrees["value"]) == (False, None)
    assert agrees["why"].startswith("the energy counter of GPU 0 fell back (wrap-around or reset)")
    summary = summarize(tmp_path / "run")
    assert (summary["energy_j"], summary["mean_power_w"]) == (None, None)
    assert "energy  not measured: the energy counter of GPU 0 fell back (wrap-around or reset)" in out.splitlines()
    assert "energy  not measured: the energy counter of GPU 0 fell back (wrap-around or reset)" in lines(summary)


def power(gpu=0, **columns):
    """Readings each 25 ms for 10 s, 100 W by sample and counter."""
    t_ns = [i * 25 * MS for i in range(401)]
    data = {"t_ns": t_ns, "gpu": [gpu] * 401, "power_instant_mw": [100_000] * 401, "host": ["here"] * 401}
    data["energy_mj"] = [i * 2500 for i in range(401)]
    missing = {name: [None] * 401 for name in POWER.names() if name not in data}
    return pl.DataFrame({**data, **missing, **columns}, schema=POWER)


def judged(readings, gpus, end_ns=10 * S):
    gauge = Gauge(gpus, [(0, end_ns)], None)
    gauge.add(readings)
    return gauge


def test_a_polled_gpu_that_tells_nothing_is_not_read():
    cut = {
        "power_instant_mw": [100_000] * 201 + [None] * 200,
        "energy_mj": [*range(0, 201 * 2500, 2500)] + [None] * 200,
    }
    both = pl.concat([power(), power(1, **cut)])
    verdict = judged(both, [0, 1]).coverage()
    assert (verdict.ok, verdict.value) == (False, pytest.approx(0.5))
    assert verdict.why.endswith("; GPU 1 was not read from 5.0 s to 10.0 s of the run")
    assert judged(both, [0]).coverage().ok is True


@pytest.mark.parametrize("column", ["power_instant_mw", "power_average_mw", "energy_mj"])
def test_one_source_of_power_is_enough_to_be_read(column):
    none = dict.fromkeys(["power_instant_mw", "power_average_mw", "energy_mj"], [None] * 401)
    frame = power(**{**none, column: [1000] * 401})
    assert judged(frame, [0]).coverage().ok is True


def test_a_counter_that_falls_back_agrees_with_nothing():
    wrapped = [i * 2500 % 300_000 for i in range(401)]
    both = pl.concat([power(), power(1, energy_mj=wrapped)])
    verdict = judged(both, [0, 1]).counter()
    assert (verdict.ok, verdict.value) == (False, None)
    assert verdict.why.startswith("the energy counter of GPU 1 fell back")
    assert judged(both, [0, 1], 2 * S).counter().ok is True, "it had not yet, up to there"
