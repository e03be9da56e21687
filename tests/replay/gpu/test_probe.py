"""What is found out about sensors is what they are: on arrays, on a simulated board, and through NVML and CUDA."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from replay.gpu.base import GpuInfo, GpuProcess, Reading
from replay.gpu.probe import Polls, evaluate, probe, probe_gpus
from replay.gpu.sensor_fit import find_changes, find_period, fit_window
from replay.gpu.sensor_profiles import lines
from replay.gpu.sim import SimBoard, SimGpus
from replay.sim.hardware import load_profile
from tracegen.errors import GpuError

MS = 1_000_000
S = 1_000_000_000
INFO = GpuInfo(0, "GPU-1", "NVIDIA Test")


@dataclass(frozen=True)
class Truth:
    """A sensor and a card, in s; power in W."""

    period: float = 0.1
    window: float = 0.025
    lag: float = 0.0
    phase: float = 0.0
    noise: float = 0.0  # of each update, relative
    rise: float = 0.0  # time constant of power behind the load
    jitter: float = 0.0  # of the moment an update shows, of the period
    low: float = 100.0
    high: float = 600.0


def square_wave(rng, seconds, first_s=2.0):
    """Load (m, 2) in ns, first a warm-up."""
    switches = [(first_s, first_s + 0.5)]
    while switches[-1][1] < first_s + seconds:
        on_s = switches[-1][1] + rng.uniform(0.06, 0.4)
        switches.append((on_s, on_s + rng.uniform(0.06, 0.4)))
    return np.round(np.array(switches) * S).astype(np.int64)


def energy(truth, switches_ns, until_s):
    """Times in s, and true energy in J up to them, on a grid of 0.1 ms, by Euler's method."""
    t_s = np.arange(-4.0, until_s, 1e-4)
    load = np.zeros(t_s.size)
    for on_s, off_s in switches_ns / S:
        load[(t_s >= on_s) & (t_s < off_s)] = 1.0
    if truth.rise:
        level = 0.0
        for i, target in enumerate(load.tolist()):
            level += (target - level) * 1e-4 / truth.rise
            load[i] = level
    watts = truth.low + (truth.high - truth.low) * load
    return t_s, np.concatenate([[0.0], np.cumsum(watts[:-1]) * 1e-4])


def shown(truth, polls_s, t_s, e_j, rng):
    """What polls see, mW: each update the mean over its window."""
    updates_s = np.arange(-2, polls_s[-1] / truth.period + 2) * truth.period + truth.phase
    end_s = updates_s - truth.lag
    watts = (np.interp(end_s, t_s, e_j) - np.interp(end_s - truth.window, t_s, e_j)) / truth.window
    watts *= 1 + truth.noise * rng.standard_normal(watts.size)
    seen_s = updates_s + truth.jitter * truth.period * rng.standard_normal(watts.size)
    return np.round(watts * 1e3)[np.searchsorted(seen_s, polls_s, side="right") - 1]


def watch(truth, seed=0, seconds=15.0, poll_s=0.001):
    """Changes seen and the load that caused them."""
    rng = np.random.default_rng(seed)
    switches_ns = square_wave(rng, seconds)
    polls_s = np.cumsum(rng.uniform(0.7, 1.3, round((seconds + 4) / poll_s)) * poll_s)
    value = shown(truth, polls_s, *energy(truth, switches_ns, polls_s[-1]), rng)
    polls_ns = np.round(polls_s * S).astype(np.int64)
    return find_changes(polls_ns - 50_000, polls_ns + 50_000, value), switches_ns


def any_truth(seed):
    """Period 15 to 200 ms, window 8 ms to 1.2 s, lag to 100 ms, any phase, with noise and without."""
    rng = np.random.default_rng([seed, 1])
    period = rng.uniform(0.015, 0.2)
    return Truth(
        period=period,
        window=float(np.exp(rng.uniform(np.log(0.008), np.log(1.2)))),
        lag=float(rng.choice([0.0, rng.uniform(0, 0.1)])),
        phase=rng.uniform(0, period),
        noise=float(rng.choice([0.0, 0.005, 0.02])),
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_sensor_is_found_or_refused(seed):
    # Bounds: the period to 0.1 %, window and lag to 3 ms and 2 % of the window, whatever the sensor.
    truth = any_truth(seed)
    changes, switches_ns = watch(truth, seed, poll_s=(0.001, 0.003)[seed % 2])
    assert find_period(changes).period_ns == pytest.approx(truth.period * S, rel=1e-3)
    fit = fit_window(changes, switches_ns)
    if isinstance(fit, str):
        assert switches_ns.size * truth.window / truth.period < 10  # so few windows can be expected to hold a switch
        assert "watch for longer (--seconds)" in fit
        return
    assert fit.window_s == pytest.approx(truth.window, abs=0.003, rel=0.02)
    assert fit.lag_s == pytest.approx(truth.lag, abs=0.003 + 0.02 * truth.window)
    assert (fit.low, fit.high) == pytest.approx((truth.low * 1e3, truth.high * 1e3), rel=0.05)
    assert fit.r2 > 0.95


@pytest.mark.parametrize("noise", [0.0, 0.02])  # without noise all error is that of polling
def test_standard_errors_are_of_the_size_of_the_errors(noise):
    truth = Truth(window=0.05, lag=0.03, phase=0.037, noise=noise)
    fits = [fit_window(*watch(truth, seed, poll_s=0.003)) for seed in range(10)]
    for errors, told in (
        ([fit.window_s - truth.window for fit in fits], [fit.window_se_s for fit in fits]),
        ([fit.lag_s - truth.lag for fit in fits], [fit.lag_se_s for fit in fits]),
    ):
        ratio = np.sqrt(np.mean(np.square(errors))) / np.mean(told)
        assert 0.3 < ratio < 2.5


def test_changes_seen_late_are_left_out():
    # Polls that were held up for 30 ms, as on a busy host, tell little of when an update came.
    truth = Truth(window=0.03, phase=0.01)
    rng = np.random.default_rng(3)
    switches_ns = square_wave(rng, 20.0)
    gaps_s = np.where(rng.random(20_000) < 0.02, 0.03, 0.001)
    polls_s = np.cumsum(gaps_s)[: np.searchsorted(np.cumsum(gaps_s), 23.0)]
    value = shown(truth, polls_s, *energy(truth, switches_ns, 24.0), rng)
    polls_ns = np.round(polls_s * S).astype(np.int64)
    changes = find_changes(polls_ns, polls_ns, value)
    assert (changes.high_ns - changes.low_ns).max() < 10 * MS
    assert len(changes) > 0.4 * (np.diff(value) != 0).sum()
    fit = fit_window(changes, switches_ns)
    assert fit.window_s == pytest.approx(truth.window, abs=0.001)
    assert fit.lag_s == pytest.approx(0.0, abs=0.001)


def test_a_card_that_follows_its_load_slowly_is_no_longer_window():
    truth = Truth(window=0.025, lag=0.02, rise=0.04, noise=0.005)
    fit = fit_window(*watch(truth, seconds=20.0))
    assert fit.rise_s == pytest.approx(truth.rise, rel=0.15)
    assert fit.window_s == pytest.approx(truth.window, abs=0.006)
    assert fit.lag_s == pytest.approx(truth.lag, abs=0.004)
    # A long window tells lag from rise only when it is told the rise.
    average = replace(truth, window=1.0, noise=0.01)
    fit = fit_window(*watch(average, seconds=20.0), rise_s=truth.rise)
    assert fit.rise_s == truth.rise
    assert fit.lag_s == pytest.approx(truth.lag, abs=0.01)
    assert fit.window_s == pytest.approx(1.0, rel=0.02)


def test_repeated_values_do_not_lengthen_the_period():
    # Without noise a sensor shows nothing new on plateaus: fewer than half of the updates are seen.
    truth = Truth(period=0.02, window=0.01, phase=0.007)
    changes, _ = watch(truth)
    assert np.median(np.diff(changes.at_ns)) > 1.5 * truth.period * S
    assert find_period(changes).period_ns == pytest.approx(truth.period * S, rel=1e-3)


def test_the_spread_is_that_of_the_updates():
    for jitter in (0.02, 0.06):
        changes, _ = watch(Truth(noise=0.02, jitter=jitter), seconds=20.0)
        period = find_period(changes)
        assert period.period_ns == pytest.approx(0.1 * S, rel=5e-3)
        assert period.spread_ns == pytest.approx(jitter * 2**0.5 * 0.1 * S, rel=0.35)  # of a difference of two updates


def test_what_cannot_be_told_says_why():
    changes, switches_ns = watch(Truth(noise=0.02))
    few = find_changes(changes.low_ns[:9], changes.high_ns[:9], np.arange(9.0))
    assert find_period(few) == "its value changed 8 times, and 12 are needed"
    assert "20 are needed" in fit_window(few, switches_ns)
    polls_ns = np.arange(200) * MS
    every_poll = find_changes(polls_ns, polls_ns + 10_000, np.arange(200.0))
    assert find_period(every_poll) == "it changes at nearly every poll, 1 ms apart"
    rng = np.random.default_rng(0)
    random_ns = np.cumsum(rng.exponential(50 * MS, 300)).astype(np.int64)
    irregular = replace(changes, low_ns=random_ns, high_ns=random_ns + MS, value=np.arange(300.0))
    assert find_period(irregular) == "its value changes at no regular distance"


def test_a_sensor_that_does_not_follow_the_load_is_refused():
    changes, _ = watch(Truth(noise=0.02), seed=1)
    others_ns = square_wave(np.random.default_rng(2), 15.0)
    assert "90 % are needed" in fit_window(changes, others_ns)
    # Half of the power is someone else's.
    changes, switches_ns = watch(Truth(noise=0.4))
    assert "90 % are needed" in fit_window(changes, switches_ns)
    upside_down, switches_ns = watch(Truth(low=600.0, high=100.0))
    assert fit_window(upside_down, switches_ns) == "it fell when load went on"


def polls_of(truth, average=None, counter_period_s=0.02, counter_mj=7, seconds=12.0, with_load=True):
    """A whole probe: 2 s at rest, then the square wave; its polls, when it was at rest, and the load."""
    rng = np.random.default_rng(5)
    switches_ns = square_wave(rng, seconds)
    polls_s = np.cumsum(rng.uniform(0.7, 1.3, round((seconds + 4) * 1000)) * 1e-3)
    t_s, e_j = energy(truth, switches_ns if with_load else switches_ns[:0], polls_s[-1])
    counted = np.floor(np.interp(np.floor(polls_s / counter_period_s) * counter_period_s, t_s, e_j) * 1e3 / counter_mj)
    end_ns = np.round(polls_s * S).astype(np.int64)
    polls = Polls(
        begin_ns=end_ns - 300_000,
        end_ns=end_ns,
        instant_mw=shown(truth, polls_s, t_s, e_j, rng),
        average_mw=shown(average or replace(truth, window=1.0, noise=0.0), polls_s, t_s, e_j, rng),
        energy_mj=counted * counter_mj,
    )
    return polls, (0, 2 * S), switches_ns if with_load else switches_ns[:0]


def test_a_whole_probe():
    truth = Truth(window=0.025, lag=0.01, phase=0.033, noise=0.01)
    polls, idle_ns, switches_ns = polls_of(truth)
    profile = evaluate(polls, INFO, idle_ns, switches_ns)
    assert (profile.uuid, profile.name, profile.polls, profile.read_ns) == ("GPU-1", "NVIDIA Test", 16_000, 300_000)
    assert profile.instant.period_ns == pytest.approx(100 * MS, rel=1e-3)
    assert profile.instant.window_ns == pytest.approx(25 * MS, abs=3 * MS)
    assert profile.instant.lag_ns == pytest.approx(10 * MS, abs=3 * MS)
    assert profile.average.window_ns == pytest.approx(1000 * MS, rel=0.02)
    assert profile.counter.period_ns == pytest.approx(20 * MS, rel=1e-3)
    assert profile.counter.resolution_mj == 7
    assert profile.counter.smallest_step_mj == pytest.approx(2000, abs=10)  # 100 W for 20 ms
    assert [profile.idle_power_w[source] for source in ("instant", "counter")] == pytest.approx(
        [100.0, 100.0], rel=0.01
    )
    assert profile.counter_over_average == pytest.approx(1.0, abs=0.02)
    assert profile.counter_over_instant == pytest.approx(1.0, abs=3 * profile.counter_over_instant_se)
    assert profile.reasons == {}
    # A card that follows slowly: the average alone would take that for a lag.
    slow = replace(truth, rise=0.04)
    polls, idle_ns, switches_ns = polls_of(slow, average=replace(slow, window=1.0, noise=0.02))
    slow_profile = evaluate(polls, INFO, idle_ns, switches_ns)
    assert slow_profile.instant.rise_ns == slow_profile.average.rise_ns == pytest.approx(40 * MS, rel=0.2)
    assert slow_profile.average.lag_ns == pytest.approx(10 * MS, abs=15 * MS)
    text = "\n".join(lines(profile))
    assert "sees 2" in text
    assert "in multiples of 7 mJ" in text


def test_a_counter_of_another_gain_shows():
    polls, idle_ns, switches_ns = polls_of(Truth(window=0.1))
    profile = evaluate(replace(polls, energy_mj=np.floor(polls.energy_mj * 1.1)), INFO, idle_ns, switches_ns)
    assert profile.counter_over_instant == pytest.approx(1.1, abs=0.02)


def test_without_load_everything_else_is_measured():
    truth = Truth(noise=0.01)
    polls, idle_ns, none_ns = polls_of(truth, average=replace(truth, window=1.0, noise=0.001), with_load=False)
    profile = evaluate(polls, INFO, idle_ns, none_ns)
    for sensor in (profile.instant, profile.average):
        assert sensor.period_ns == pytest.approx(100 * MS, rel=2e-3)
        assert (sensor.window_ns, sensor.lag_ns, sensor.r2) == (None, None, None)
    assert profile.counter.period_ns == pytest.approx(20 * MS, rel=1e-3)
    assert profile.counter_over_instant == pytest.approx(1.0, abs=0.01)
    assert profile.reasons == {f"{name} window and lag": "not measured without load" for name in ("instant", "average")}
    assert "  instant window and lag: not measured without load" in lines(profile)


def test_sensors_that_are_missing_stay_none():
    polls, idle_ns, switches_ns = polls_of(Truth())
    nothing = np.full(polls.begin_ns.size, np.nan)
    bare = replace(polls, instant_mw=nothing, average_mw=nothing, energy_mj=nothing)
    profile = evaluate(bare, INFO, idle_ns, switches_ns)
    assert profile.instant.period_ns is profile.average.period_ns is profile.counter.period_ns is None
    assert profile.counter_over_instant is profile.counter_over_average is None
    assert profile.idle_power_w == {}
    assert {"instant", "average", "counter", "idle by instant", "idle by counter"} == set(profile.reasons)
    still = replace(polls, energy_mj=np.full(polls.begin_ns.size, 5.0))
    frozen = evaluate(still, INFO, idle_ns, switches_ns)
    assert frozen.reasons["counter"] == "it does not move"
    wrapped = evaluate(replace(polls, energy_mj=polls.energy_mj % 100_000), INFO, idle_ns, switches_ns)
    assert wrapped.counter_over_instant is None
    assert wrapped.reasons["counter over instant"] == "the counter decreased"


PROFILE = load_profile()
SENSOR = replace(
    PROFILE.sensor,
    period_ns=80 * MS,
    window_ns=50 * MS,
    lag_ns=15 * MS,
    average_window_ns=400 * MS,
    noise_rel=0.005,
    phases_ns=(13 * MS,),
)


class BoardLoad:
    """Draws 500 W on a simulated board's GPU."""

    def __init__(self, board, gpu):
        self.board, self.gpu = board, gpu

    def burn(self, duration_ns):
        start_ns = time.monotonic_ns()
        self.board.set_power(self.gpu, start_ns, 500.0)
        time.sleep(duration_ns / S)
        end_ns = time.monotonic_ns()
        self.board.set_power(self.gpu, end_ns, 80.0)
        return start_ns, end_ns


@pytest.fixture
def board(tmp_path):
    with SimBoard.create(tmp_path / "board", replace(PROFILE, sensor=SENSOR)) as board:
        yield board


@pytest.fixture
def gpus(board, tmp_path):
    gpus = SimGpus(tmp_path / "board")
    yield gpus
    gpus.close()


def test_the_simulated_board_is_found_out(board, gpus):
    said = []
    profile = probe(gpus, 2, BoardLoad(board, 2), idle_s=1.0, seconds=6.0, say=said.append)
    assert profile.uuid == "SIM-GPU-2"
    assert profile.instant.period_ns == pytest.approx(80 * MS, rel=5e-3)
    assert profile.instant.window_ns == pytest.approx(50 * MS, abs=6 * MS)
    assert profile.instant.lag_ns == pytest.approx(15 * MS, abs=6 * MS)
    assert profile.average.window_ns == pytest.approx(400 * MS, rel=0.05)
    assert profile.idle_power_w["instant"] == pytest.approx(profile.idle_power_w["counter"], rel=0.02)
    assert len(said) == 2


class Scripted:
    """GPUs of which a test says how they stand and what they read."""

    def __init__(self, read, *, mig=False, processes=()):
        self._state = SimpleNamespace(mig=mig, processes=processes)
        self._read = read

    def devices(self):
        return [INFO]

    def state(self, gpu):
        return self._state

    def read(self, gpu):
        return self._read()


def test_a_gpu_that_others_use_has_no_idle_power():
    start_s = time.monotonic()

    def read():
        tick = int((time.monotonic() - start_s) * 50)
        return Reading(power_instant_mw=100_000 + tick % 7, energy_mj=2000 * tick)

    alone = probe(Scripted(read), 0, None, idle_s=0.5, seconds=0.5)
    assert alone.idle_power_w["counter"] == pytest.approx(100, rel=0.1)
    shared = probe(Scripted(read, processes=(GpuProcess(4711, "train", None),)), 0, None, idle_s=0.5, seconds=0.5)
    assert shared.idle_power_w == {}
    assert "4711" in shared.reasons["idle"]


def test_what_cannot_be_probed_is_one_line(gpus, tmp_path):
    with pytest.raises(GpuError, match="GPU 0 is split into MIG instances"):
        probe(Scripted(Reading, mig=True), 0, None)
    with pytest.raises(GpuError, match="GPU 9 does not exist; this host has 0, 1, 2, 3, 4, 5, 6, 7"):
        probe(gpus, 9, None)
    with pytest.raises(GpuError, match=r"one file holds one GPU's profile.*--gpus"):
        probe_gpus(f"sim:{tmp_path / 'board'}", [0, 1], output=tmp_path / "x.toml")


def test_a_gpu_lost_while_it_is_watched_ends_the_probe():
    polls = iter(range(40))

    def read():
        if next(polls, None) is None:
            raise GpuError("GPU 0 fell off the bus")
        return Reading()

    with pytest.raises(GpuError, match="fell off the bus"):
        probe(Scripted(read), 0, None, idle_s=3600.0, seconds=3600.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sensors")]


def test_a_load_that_fails_ends_the_probe():
    class Broken:
        def burn(self, duration_ns):
            raise GpuError("no kernel")

    with pytest.raises(GpuError, match="no kernel"):
        probe(Scripted(Reading), 0, Broken(), idle_s=0.05, seconds=3600.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sensors")]


@pytest.fixture
def at_the_boundary(driver, cuda_library, tmp_path):
    """Run `script` where pynvml finds a driver whose window is 50 ms late by 20 ms, and ctypes finds CUDA."""

    def run(script):
        power = tmp_path / "power"
        power.write_text("1 0 100000\n")
        env = driver()
        env |= {
            "LD_LIBRARY_PATH": f"{cuda_library}{os.pathsep}{env['LD_LIBRARY_PATH']}",
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "FAKE_NVML_POWER": str(power),
            "FAKE_NVML_WINDOW_MS": "50",
            "FAKE_NVML_LAG_MS": "20",
            "FAKE_NVML_PHASE_MS": "37",
            "FAKE_NVML_COUNTER_MS": "20",
            "FAKE_NVML_COUNTER_MJ": "5",
        }
        argv = [sys.executable, "-c", script]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_published_window_that_is_wrong_is_found_through_nvml_and_cuda(at_the_boundary):
    script = """
import json
from dataclasses import asdict
from replay.gpu.base import open_gpus
from replay.gpu.load import CudaLoad
from replay.gpu.probe import probe
from replay.gpu.sensor_profiles import known_sensors, save_profile
gpus = open_gpus("nvml")
with CudaLoad("GPU-ab000000-0000-0000-0000-000000000001") as load:
    profile = probe(gpus, 1, load, idle_s=1.0, seconds=6.0)
published = gpus.sensors(1)
save_profile(profile)
sensors, source = known_sensors(gpus.devices()[1], published)
other, other_source = known_sensors(gpus.devices()[0], published)
assert other == published
sensors, published = ({k: asdict(s) for k, s in found.items()} for found in (sensors, published))
print(json.dumps([sensors, source, published, other_source, asdict(profile)]))
"""
    sensors, source, published, other_source, profile = at_the_boundary(script)
    assert published["instant"] == {"period_ns": 100 * MS, "window_ns": 25 * MS, "lag_ns": 0}
    assert sensors["instant"]["period_ns"] == pytest.approx(100 * MS, rel=5e-3)
    assert sensors["instant"]["window_ns"] == pytest.approx(50 * MS, abs=6 * MS)
    assert sensors["instant"]["lag_ns"] == pytest.approx(20 * MS, abs=6 * MS)
    assert sensors["average"]["window_ns"] == pytest.approx(1000 * MS, rel=0.05)
    assert source == f"probed {profile['probed'][:10]} on this GPU"
    assert other_source == "published for NVIDIA H100 80GB HBM3"
    assert [profile["idle_power_w"][source] for source in ("instant", "counter")] == pytest.approx([100, 100], rel=0.02)
    assert profile["counter"]["resolution_mj"] % 5 == 0
    assert profile["counter"]["period_ns"] == pytest.approx(20 * MS, rel=5e-3)
    assert profile["instant"]["on_w"] == pytest.approx(600, rel=0.05)


def test_without_load_a_probed_period_goes_with_the_published_window(at_the_boundary):
    script = """
import json
from dataclasses import asdict
from replay.gpu.base import open_gpus
from replay.gpu.probe import probe_gpus
from replay.gpu.sensor_profiles import known_sensors
[(profile, path)] = probe_gpus("nvml", [0], with_load=False, idle_s=0.5, seconds=2.0)
gpus = open_gpus("nvml")
sensors, source = known_sensors(gpus.devices()[0], gpus.sensors(0))
print(json.dumps([asdict(sensors["instant"]), source, str(path)]))
"""
    instant, source, path = at_the_boundary(script)
    assert instant["period_ns"] == pytest.approx(100 * MS, rel=5e-3)
    assert (instant["window_ns"], instant["lag_ns"]) == (25 * MS, 0)
    assert "on this GPU; instant window and lag" in source
    assert path.endswith("config/wattrace/gpus/NVIDIA-H100-80GB-HBM3-GPU-fake-0.toml")


def test_probing_all_gpus_writes_a_profile_each(board, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = probe_gpus(f"sim:{tmp_path / 'board'}", with_load=False, idle_s=0.0, seconds=0.05)
    assert [profile.uuid for profile, _ in found] == [f"SIM-GPU-{i}" for i in range(8)]
    assert len({path for _, path in found}) == 8
    assert all(path.is_file() for _, path in found)
