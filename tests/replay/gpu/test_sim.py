"""The simulated board keeps energy exactly, and shows it as a sensor would."""

import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.gpu.base import Sensor, open_gpus
from replay.gpu.sim import SimBoard, SimGpus
from replay.sim.profile import load_profile
from replay.sim.sensors import settled_c
from replay.verdicts import throttle_reasons
from tracegen.errors import GpuError

PROFILE = load_profile()
MS = 1_000_000
START_NS = 500_000 * MS
# Power constant before the sensor's present update shows whether a window is right to the nanosecond.
EXACT = replace(
    PROFILE,
    sensor=replace(
        PROFILE.sensor,
        period_ns=100 * MS,
        window_ns=25 * MS,
        lag_ns=0,
        average_window_ns=1000 * MS,
        noise_rel=0.0,
        phases_ns=(10 * MS, 70 * MS),
    ),
)


class Clock:
    def __init__(self, now_ns):
        self.now_ns = now_ns

    def __call__(self):
        return self.now_ns


@pytest.fixture
def clock():
    return Clock(START_NS)


@pytest.fixture
def board(tmp_path, clock):
    with SimBoard.create(tmp_path / "board", EXACT, now_ns=clock) as board:
        yield board


@pytest.fixture
def gpus(board, tmp_path, clock):
    gpus = SimGpus(tmp_path / "board", now_ns=clock)
    yield gpus
    gpus.close()


def idle_w():
    return PROFILE.power.idle_unloaded_w


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1000)), min_size=1, max_size=30),
    st.lists(st.integers(-(10**9), 4 * 10**10), min_size=1, max_size=10),
)
def test_energy_is_the_integral_of_power(changes, times_ns):
    with (
        tempfile.TemporaryDirectory() as folder,
        SimBoard.create(Path(folder) / "board", EXACT, now_ns=lambda: START_NS) as board,
    ):
        t_ns, history = START_NS, [(START_NS - 10**10, idle_w())]
        for gap_ns, watts in changes:
            t_ns += gap_ns
            board.set_power(3, t_ns, watts)
            history.append((t_ns, watts))
        ends_ns = [start for start, _ in history[1:]] + [10**18]
        for after_ns in times_ns:
            at_ns = START_NS + after_ns
            spans = zip(history, ends_ns, strict=True)
            expected_j = sum(watts * max(0, min(end, at_ns) - start) / 1e9 for (start, watts), end in spans)
            assert board.energy_j(3, at_ns) == pytest.approx(expected_j, rel=1e-12, abs=1e-9)


def test_the_ring_keeps_at_least_five_seconds_of_steps_and_refuses_older_times(board):
    for i in range(20_000):
        board.set_power(0, START_NS + i * 5 * MS, 100.0 if i % 2 else 300.0)
    now_ns = START_NS + 20_000 * 5 * MS
    total_j = board.energy_j(0, now_ns) - board.energy_j(0, now_ns - 6_000 * MS)
    assert total_j == pytest.approx(6 * 200.0, rel=1e-9)
    with pytest.raises(GpuError, match="does not reach back"):
        board.energy_j(0, START_NS)


def test_power_cannot_be_set_in_the_past(board):
    board.set_power(0, START_NS + 5, 100.0)
    with pytest.raises(ValueError, match="5 ns before its last change"):
        board.set_power(0, START_NS, 100.0)


def test_instant_power_is_the_mean_of_the_window_before_the_last_update(board, gpus, clock):
    update_ns = START_NS + 210 * MS  # GPU 0 updates at 10 ms past each 100
    board.set_power(0, update_ns - 10 * MS, 600.0)
    board.set_power(0, update_ns + 1, 50.0)
    for after_ns in (0, 40 * MS, 99 * MS):
        clock.now_ns = update_ns + after_ns
        reading = gpus.read(0)
        assert reading.power_instant_mw == round(1e3 * (15 * idle_w() + 10 * 600) / 25)
        assert reading.power_average_mw == round(1e3 * (990 * idle_w() + 10 * 600) / 1000)
        assert reading.energy_mj == int(1e3 * board.energy_j(0, update_ns))
    clock.now_ns = update_ns + 100 * MS
    assert gpus.read(0).power_instant_mw == 50_000


def test_each_gpu_updates_at_its_own_phase(board, gpus, clock):
    for gpu in (0, 1):
        board.set_power(gpu, START_NS, 500.0)
    clock.now_ns = START_NS + 169 * MS
    first, second = gpus.read(0), gpus.read(1)  # updated at 110 ms and at 70 ms
    assert first.energy_mj - second.energy_mj == pytest.approx(500 * 40, abs=1)


def test_lag_dates_the_window_back(tmp_path, clock):
    late = replace(EXACT, sensor=replace(EXACT.sensor, lag_ns=50 * MS))
    with SimBoard.create(tmp_path / "late", late, now_ns=clock) as board:
        board.set_power(0, START_NS + 160 * MS, 600.0)
        gpus = SimGpus(tmp_path / "late", now_ns=clock)
        clock.now_ns = START_NS + 210 * MS
        assert gpus.read(0).power_instant_mw == round(1e3 * idle_w())
        clock.now_ns = START_NS + 310 * MS
        assert gpus.read(0).power_instant_mw == 600_000
        assert gpus.sensors(0)["instant"] == Sensor(100 * MS, 25 * MS, 50 * MS)
        gpus.close()


def test_noise_belongs_to_the_update(tmp_path, clock):
    noisy = replace(EXACT, sensor=replace(EXACT.sensor, noise_rel=0.02))
    readings = {}
    for seed in (1, 1, 2):
        clock.now_ns = START_NS
        with SimBoard.create(tmp_path / "noisy", noisy, seed=seed, now_ns=clock):
            gpus = SimGpus(tmp_path / "noisy", now_ns=clock)
            values = []
            for _ in range(400):
                clock.now_ns += 50 * MS  # twice an update
                values.append(gpus.read(0).power_instant_mw)
            assert values[1::2][:-1] == values[2::2] or values[::2] == values[1::2], "re-reading shows the same"
            assert readings.setdefault(seed, values) == values
            gpus.close()
    assert readings[1] != readings[2]
    relative = [value / (1e3 * idle_w()) - 1 for value in readings[1][::2]]
    spread = (sum(value**2 for value in relative) / len(relative)) ** 0.5
    assert 0.015 < spread < 0.025


def test_a_sensor_does_not_update_beyond_what_its_writer_has_settled(board, gpus, clock):
    board.set_power(0, START_NS, 600.0, known_until_ns=START_NS + 205 * MS)
    clock.now_ns = START_NS + 230 * MS  # an update was due at 210, but the step after 205 ms is not yet known
    before = gpus.read(0)
    assert before.energy_mj == int(1e3 * board.energy_j(0, START_NS + 110 * MS))
    board.set_power(0, START_NS + 205 * MS, 100.0, known_until_ns=START_NS + 300 * MS)
    after = gpus.read(0)
    assert after.power_instant_mw == (600 * 20 + 100 * 5) * 1000 // 25
    clock.now_ns = START_NS + 5_000 * MS  # the writer has died
    assert gpus.read(0).energy_mj == int(1e3 * board.energy_j(0, START_NS + 3_910 * MS))


def test_clocks_are_shared_and_given_back(board, gpus):
    assert gpus.supported_clocks_mhz(0) == list(range(210, 1981, 15))
    gpus.lock_clock(2, 1200)
    assert (board.clock_mhz(2), gpus.read(2).sm_clock_mhz, board.clock_mhz(1)) == (1200, 1200, 1980)
    gpus.unlock_clock(2)
    assert (board.clock_mhz(2), gpus.read(2).sm_clock_mhz) == (1980, 1980)
    with pytest.raises(GpuError, match="cannot be locked to 1201 MHz; it supports 210 to 1980 MHz in steps of 15"):
        gpus.lock_clock(2, 1201)
    assert board.clock_mhz(2) == 1980


def test_a_gpu_at_work_shows_the_clock_that_it_runs_at_and_an_idle_one_its_lock(board, gpus, clock):
    gpus.lock_clock(0, 1980)
    board.set_power(0, START_NS, 700.0, clock_mhz=1500.4, capped=True, busy=True)
    board.set_power(0, START_NS + 1000 * MS, 600.0, clock_mhz=1830.0, busy=True)
    board.set_power(0, START_NS + 2000 * MS, 100.0)
    seen = []
    for after_ms in (0, 999, 1999, 2999):
        clock.now_ns = START_NS + after_ms * MS
        reading = gpus.read(0)
        seen.append((reading.sm_clock_mhz, throttle_reasons(reading.throttle_reasons)))
    assert seen == [(1980, []), (1500, ["software power cap"]), (1830, []), (1980, [])]


def test_a_new_lock_shows_on_an_idle_gpu_before_its_sensors_update(board, gpus):
    before = gpus.read(0)
    gpus.lock_clock(0, 1200)
    assert gpus.read(0) == replace(before, sm_clock_mhz=1200)


def test_utilization_is_the_share_of_the_last_second_in_which_a_step_ran(board, gpus, clock):
    start_ns = START_NS + 10 * MS  # of an update of GPU 0
    for at_ms, busy in ((0, True), (200, False), (400, True), (500, False)):
        board.set_power(0, start_ns + at_ms * MS, 300.0, busy=busy)
    for after_ms, percent in ((0, 0), (100, 10), (500, 30), (1000, 30), (1100, 20), (1500, 0)):
        clock.now_ns = start_ns + after_ms * MS
        assert gpus.read(0).utilization == percent


def test_temperature_settles_where_power_and_cooling_say(board, gpus, clock):
    thermal = EXACT.thermal
    cold_c, hot_c = (round(settled_c(watts, thermal)) for watts in (idle_w(), 700.0))
    assert gpus.read(0).temperature_c == cold_c
    board.set_power(0, START_NS, 700.0, busy=True)
    clock.now_ns = START_NS + round(thermal.time_constant_s * 1e9)
    assert board.temperature_c(0, clock.now_ns) == pytest.approx(
        settled_c(700.0, thermal) - (700.0 - idle_w()) * thermal.resistance_c_per_w / math.e
    )
    clock.now_ns += round(9 * thermal.time_constant_s * 1e9)
    assert gpus.read(0).temperature_c == hot_c


def test_devices_say_that_they_are_simulated(board, tmp_path):
    gpus = open_gpus(f"sim:{tmp_path / 'board'}")
    devices = gpus.devices()
    gpus.close()
    assert [device.gpu for device in devices] == list(range(8))
    assert {device.name for device in devices} == {"Simulated NVIDIA H100 80GB HBM3"}
    assert devices[3].uuid == "SIM-GPU-3"


def test_reading_a_board_that_another_process_writes_never_meets_a_torn_change(tmp_path):
    script = f"""
from replay.gpu.sim import SimBoard
board = SimBoard({str(tmp_path / "board")!r})
for i in range(1, 60_000):
    board.set_power(0, {START_NS} + i * 1000, 250.0)
"""
    with SimBoard.create(tmp_path / "board", EXACT, now_ns=lambda: START_NS) as board:
        board.set_power(0, START_NS, 250.0)
        start_j = board.energy_j(0, START_NS)
        writer = subprocess.Popen([sys.executable, "-c", script])
        reads = 0
        while writer.poll() is None or not reads:
            # Beyond the last change by far: the energy is the same whichever changes have been seen.
            assert board.energy_j(0, START_NS + 10**9) - start_j == pytest.approx(250.0, rel=1e-9)
            reads += 1
        assert writer.returncode == 0
        assert board.energy_j(0, START_NS + 10**9) - start_j == pytest.approx(250.0, rel=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no simulated board"), (b"", "no simulated board"), (b"x" * 9000, "not a simulated board")],
)
def test_a_file_that_is_no_board_is_refused(tmp_path, content, message):
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GpuError, match=message) as caught:
        SimGpus(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["read", "sensors", "supported_clocks_mhz", "unlock_clock"])
def test_a_gpu_that_does_not_exist_is_refused(gpus, call):
    with pytest.raises(GpuError, match="GPU 8 does not exist; the simulated node has GPUs 0 to 7"):
        getattr(gpus, call)(8)


def test_a_board_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GpuError, match=r"cannot make a simulated board there \(File exists\)"):
        SimBoard.create(tmp_path / "file" / "board", PROFILE)
