"""NVML through the real pynvml, against a small driver library written in C (fake_nvml.c)."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.rundir import Run

MS = 1_000_000


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
        "sensor_ns": None,
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


def test_the_state_of_a_gpu(ask, tmp_path):
    (tmp_path / "clocks.log").write_text("0 W 450\n")
    states = ask("[asdict(gpus.state(gpu)) for gpu in (0, 1)]", processes="0:4194400:70000,0:4194401", used_mib="1:12")
    limits = {"power_limit_default_w": 700, "power_limit_range_w": [200, 700], "memory_total_mib": 81559, "mig": False}
    assert states[0] == limits | {
        "memory_used_mib": 70_000,
        "processes": [
            {"pid": 4194400, "name": "fake-4194400", "memory_mib": 70_000},
            {"pid": 4194401, "name": "fake-4194401", "memory_mib": None},
        ],
        "power_limit_w": 450,
    }
    assert states[1] == limits | {"memory_used_mib": 12, "processes": [], "power_limit_w": 700}
    assert ask("gpus.state(1).mig", "mig") is True


def test_a_process_is_called_by_its_command_if_it_can_be_seen(ask):
    me, unseen = os.getpid(), 4194304  # above any process id that Linux gives
    names = ask("[[p.pid, p.name] for p in gpus.state(0).processes]", processes=f"0:{unseen}:1,0:{me}:1")
    assert names[1] == [unseen, None]
    assert names[0][0] == me
    # What it was called with first, whichever way the tests were started.
    assert names[0][1].startswith(Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode())


def test_of_a_card_or_driver_that_tells_nothing_the_state_is_none(ask):
    nothing = {"mig": False, "memory_total_mib": None, "memory_used_mib": None, "processes": [], "power_limit_w": None}
    nothing |= {"power_limit_default_w": None, "power_limit_range_w": None}
    assert ask("asdict(gpus.state(0))", "bare") == nothing
    old = ask("asdict(gpus.state(0))", "old", processes="0:4194400:70000")
    # Its used memory would include what it keeps for itself.
    assert (old["mig"], old["memory_total_mib"], old["memory_used_mib"]) == (False, 81559, None)
    assert [process["pid"] for process in old["processes"]] == [4194400]
    assert old["power_limit_range_w"] == [200, 700]


def test_a_power_limit_is_set(ask, tmp_path):
    assert ask("[gpus.set_power_limit(1, 450.0), *(gpus.state(g).power_limit_w for g in (0, 1))]") == [None, 700, 450]
    assert (tmp_path / "clocks.log").read_text() == "1 W 450\n"


@pytest.mark.parametrize(
    ("mode", "expression", "message"),
    [
        ("denied", "gpus.lock_clock(0, 1200)", "the driver refused nvmlDeviceSetGpuLockedClocks: changing clocks"),
        ("denied", "gpus.unlock_clock(1)", "GPU 1: the driver refused nvmlDeviceResetGpuLockedClocks: changing clocks"),
        ("nocap", "gpus.set_power_limit(0, 400)", "changing power limits needs root or CAP_SYS_ADMIN; run with sudo"),
        ("", "gpus.set_power_limit(0, 100)", "GPU 0: nvmlDeviceSetPowerManagementLimit failed: "),
        ("bare", "gpus.set_power_limit(0, 400)", "GPU 0: nvmlDeviceSetPowerManagementLimit failed: "),
        ("lost", "gpus.read(0)", "GPU 0: nvmlDeviceGetFieldValues failed: GPU is lost: it fell off the bus"),
        ("lost", "asdict(gpus.state(1))", "GPU 1: nvmlDeviceGetMigMode failed: GPU is lost: it fell off the bus"),
        ("none", "0", "the NVIDIA driver lists no GPU; to run without one use --engine sim"),
        ("broken", "0", "no NVIDIA GPU can be reached (Driver Not Loaded); to run without one use --engine sim"),
        ("", "gpus.read(2)", "GPU 2 does not exist; this host has GPUs 0 to 1"),
        ("", "gpus.read(-1)", "GPU -1 does not exist"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_clear_line(ask, mode, expression, message):
    assert message in ask(expression, mode)


def polled(driver, seconds, **settings):
    """(before ns, after ns, instant mW, average mW, counter mJ) of GPU 1, as often as the driver answers."""
    script = f"""
import json, time
from replay.gpu.base import open_gpus
gpus, rows = open_gpus("nvml"), []
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    before = time.monotonic_ns()
    r = gpus.read(1)
    rows.append((before, time.monotonic_ns(), r.power_instant_mw, r.power_average_mw, r.energy_mj))
gpus.close()
print(json.dumps(rows))
"""
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, env=driver(**settings), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_the_fakes_sensors_show_what_their_settings_say(driver, tmp_path):
    """The probe and the sampler are held against this fake, so it is held against arithmetic itself."""
    start_ns = time.monotonic_ns() - 2_000 * MS
    edges_ns = [start_ns + i * 131 * MS for i in range(200)]
    levels_mw = [200_000 if i % 2 else 600_000 for i in range(200)]
    changes = tmp_path / "power"
    changes.write_text("".join(f"1 {t} {mw}\n" for t, mw in zip(edges_ns, levels_mw, strict=True)))

    # Millijoules from the first edge to each edge: power is steady in between.
    counted_mj = np.concatenate([[0], np.cumsum(np.array(levels_mw[:-1]) * 0.131)])

    def energy_mj(t_ns):
        return np.interp(t_ns - start_ns, np.array(edges_ns) - start_ns, counted_mj)

    def shown(t_ns, period_ns, lag_ns, window_ns):
        end_ns = (t_ns - 7 * MS) // period_ns * period_ns + 7 * MS - lag_ns
        return (energy_mj(end_ns) - energy_mj(end_ns - window_ns)) / (window_ns / 1e9)

    sensor = {"period_ms": 40, "window_ms": 30, "lag_ms": 12.5, "phase_ms": 7, "counter_ms": 20, "counter_mj": 50}
    rows = polled(driver, 1.0, power=changes, **sensor)
    seen = set()
    for before_ns, after_ns, instant_mw, average_mw, counter_mj in rows:
        seen.add(instant_mw)
        for value, settings in ((instant_mw, (40 * MS, 12.5 * MS, 30 * MS)), (average_mw, (40 * MS, 0, 1000 * MS))):
            # An update between the two times may have come before or after the value was read.
            assert min(abs(value - shown(t, *settings)) for t in (before_ns, after_ns)) <= 1
        assert counter_mj % 50 == 0
    assert len(seen) > 5
    first, last = rows[0], rows[-1]
    true_mj = energy_mj(last[1]) - energy_mj(first[1])
    assert last[4] - first[4] == pytest.approx(true_mj, abs=600_000 * 0.02 + 50)
    assert (last[4] - first[4]) > 0.8 * true_mj


def test_the_fakes_counter_wraps_around_and_a_gpu_can_be_lost_in_time(driver, ask, tmp_path):
    counters = [row[4] for row in polled(driver, 0.8, wrap_mj=40_000)]
    assert max(counters) < 40_000
    assert any(b < a for a, b in pairwise(counters))
    now_ns = time.monotonic_ns()
    assert ask("0", lost=f"1:{now_ns}").startswith("GPU 1: nvmlDeviceGetHandleByIndex failed: GPU is lost: it fell off")
    assert ask("gpus.read(1).temperature_c", lost=f"1:{now_ns + 600 * 1000 * MS}") == 41
    power = tmp_path / "power"
    power.touch()
    lose = f"open({str(power)!r}, 'w').write('1 1 -1\\n')"
    assert ask(f"[{lose}, gpus.read(0).temperature_c]", power=power) == [7, 40]
    power.write_text("")
    assert "GPU 1: nvmlDeviceGetFieldValues failed: GPU is lost" in ask(f"[{lose}, gpus.read(1)]", power=power)


def test_the_fake_has_as_many_gpus_as_it_is_told(ask):
    assert ask("[d.gpu for d in gpus.devices()]", gpus=8) == list(range(8))


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
        ("lost", "1200", "GPU 0: nvmlDeviceGetMigMode failed: GPU is lost: it fell off the bus"),
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


def test_a_run_under_a_power_cap_restores_the_limit_that_was_there(attached, tmp_path):
    (tmp_path / "clocks.log").write_text("1 W 600\n")
    done = attached("--power-cap", "400")
    assert done.returncode == 0, done.stderr
    set_first, restored = ["1 W 600", "0 W 400", "1 W 400"], ["0 W 700", "1 W 600"]
    lines = (tmp_path / "clocks.log").read_text().splitlines()
    assert (lines[:3], sorted(lines[3:])) == (set_first, restored)
    instance = Run.open(tmp_path / "run").manifest["instances"][0]
    assert (instance["power_cap_w"], instance["freq_mhz"]) == (400, None)


@pytest.mark.parametrize(
    ("mode", "watts", "message"),
    [
        ("", "100", "--power-cap 100: GPU 0 takes 200 to 700 W; choose a cap in this range"),
        ("bare", "400", "--power-cap 400: GPU 0 takes no power cap; run without --power-cap"),
        ("nocap", "400", "changing power limits needs root or CAP_SYS_ADMIN"),
    ],
)
def test_a_cap_that_cannot_be_had_ends_the_run_before_it_starts(attached, tmp_path, mode, watts, message):
    done = attached(*([] if mode == "bare" else ["--freq", "1200"]), "--power-cap", watts, mode=mode)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not (tmp_path / "run").exists()
    log = tmp_path / "clocks.log"
    assert not log.exists() or log.read_text() == "0 1200\n0 0\n", "the clock that was locked already is given back"


def test_a_clock_that_is_throttled_is_named(attached, tmp_path):
    done = attached("--freq", "1200", mode="throttled")
    assert done.returncode == 0, done.stderr
    held = next(v for v in Run.open(tmp_path / "run").manifest["verdicts"] if v["name"] == "clocks_held")
    assert (held["ok"], held["value"]) == (False, 0.0)
    assert held["why"].endswith("; software power cap")


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


def test_the_drivers_version_is_told_where_there_is_one(ask):
    assert ask("gpus.driver_version()") == "999.1.fake"
    assert ask("gpus.driver_version()", "old") is None
