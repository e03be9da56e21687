"""Simulated sensors show one history of power alike, in wall time and in virtual time, and however it is cut."""

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from replay.gpu.sim import SimBoard, SimGpus
from replay.sim.profile import ThermalModel, load_profile
from replay.sim.readings import Pieces, SensorBank
from replay.sim.sensors import (
    GPU_IDLE,
    SW_POWER_CAP,
    board_gain,
    noise,
    reach_ns,
    settled_c,
    update_ns,
    warmed_c,
)

MS = 1_000_000
START_NS = 500_000 * MS
HISTORY_NS = 10_000 * MS  # the board's, before its start
PROFILE = load_profile()
LATE = replace(
    PROFILE,
    sensor=replace(PROFILE.sensor, lag_ns=30 * MS, noise_rel=0.02, gain_error_rel=0.05),
    thermal=ThermalModel(ambient_c=25.5, resistance_c_per_w=0.05, time_constant_s=3.0),
)

change = st.tuples(
    st.integers(0, 400 * MS),  # until the next one
    st.floats(0, 800),
    st.one_of(st.none(), st.floats(210, 1980)),
    st.booleans(),
    st.booleans(),
)
histories = st.lists(change, min_size=1, max_size=40)


def pieces_of(profile, history):
    """The changes as pieces after 10 s of idling: unlocked, so an idle clock is the highest."""
    spans_ns, watts, clocks_mhz, capped, busy = zip(
        (HISTORY_NS, profile.power.idle_unloaded_w, None, False, False), *history, strict=True
    )
    edges_ns = START_NS - HISTORY_NS + np.concatenate([[0], np.cumsum(spans_ns)])
    clock_mhz = np.array([mhz or profile.clocks_mhz.max for mhz in clocks_mhz], float)
    return Pieces(edges_ns, np.array(watts, float), clock_mhz, np.array(capped), np.array(busy))


def bank(profile, gpus, seed=7):
    return SensorBank(
        gpus,
        profile.sensor,
        profile.thermal,
        seed=seed,
        start_ns=START_NS - HISTORY_NS,
        start_w=profile.power.idle_unloaded_w,
    )


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(0, 7), st.sampled_from([PROFILE, LATE]))
def test_virtual_readings_equal_those_of_the_board(history, gpu, profile):
    pieces = pieces_of(profile, history)
    shown = bank(profile, [gpu]).feed(pieces)[gpu]
    clock = {"now_ns": START_NS}
    with (
        tempfile.TemporaryDirectory() as folder,
        SimBoard.create(Path(folder) / "board", profile, seed=7, now_ns=lambda: clock["now_ns"]) as board,
    ):
        for start_ns, (_, watts, clock_mhz, capped, busy) in zip(pieces.edges_ns[1:-1], history, strict=True):
            board.set_power(gpu, int(start_ns), watts, clock_mhz=clock_mhz, capped=capped, busy=busy)
        gpus = SimGpus(Path(folder) / "board", now_ns=lambda: clock["now_ns"])
        for i in range(shown.sensor_ns.size):
            clock["now_ns"] = int(shown.sensor_ns[i])
            reading = gpus.read(gpu)
            for name in shown._fields[1:]:
                assert getattr(reading, name) == getattr(shown, name)[i], name
        gpus.close()
    assert shown.sensor_ns.size >= 85  # each update of 9 s at least


@settings(max_examples=60, deadline=None)
@given(histories, st.lists(st.integers(0, 41), max_size=8), st.sampled_from([PROFILE, LATE]))
def test_chunks_change_no_reading(history, cuts, profile):
    pieces = pieces_of(profile, history)
    whole = bank(profile, [1, 4]).feed(pieces)
    parts = bank(profile, [1, 4])
    found = {1: [], 4: []}
    ends = sorted({min(cut, pieces.watts.size) for cut in cuts} | {0, pieces.watts.size})
    for start, end in pairwise(ends):
        columns = (column[start:end] for column in pieces[1:])
        for gpu, readings in parts.feed(Pieces(pieces.edges_ns[start : end + 1], *columns)).items():
            found[gpu].append(readings)
    for gpu, readings in whole.items():
        for name in readings._fields:
            together = np.concatenate([getattr(part, name) for part in found[gpu]])
            assert together.tolist() == getattr(readings, name).tolist()


def test_every_update_is_read_once_from_when_the_windows_are_whole():
    pieces = pieces_of(LATE, [(2000 * MS, 300.0, None, False, True)])
    shown = bank(LATE, range(8)).feed(pieces)
    for gpu, readings in shown.items():
        assert set(np.diff(readings.sensor_ns).tolist()) == {100 * MS}
        assert (readings.sensor_ns[0] - LATE.sensor.phases_ns[gpu]) % (100 * MS) == 0
        assert 0 <= readings.sensor_ns[0] - reach_ns(LATE.sensor) - pieces.edges_ns[0] < 100 * MS
        assert 0 < pieces.edges_ns[-1] - (readings.sensor_ns[-1] - LATE.sensor.lag_ns) <= 100 * MS


def test_power_that_does_not_go_on_where_it_ended_is_refused():
    sensors = bank(PROFILE, [0])
    with pytest.raises(ValueError, match=f"goes on from {START_NS - HISTORY_NS} ns, not from 5 ns"):
        sensors.feed(Pieces(np.array([5, 9]), np.zeros(1), np.zeros(1), np.zeros(1, bool), np.zeros(1, bool)))


def test_windows_average_and_the_counter_adds_up_what_was_drawn():
    exact = replace(PROFILE, sensor=replace(PROFILE.sensor, noise_rel=0.0))
    rng = np.random.default_rng(3)
    spans_ns, watts = rng.integers(1 * MS, 80 * MS, 300), rng.uniform(60, 700, 300)
    pieces = pieces_of(exact, [(int(s), w, 1200.0, False, True) for s, w in zip(spans_ns, watts, strict=True)])
    shown = bank(exact, [5]).feed(pieces)[5]
    grid_ns = np.arange(pieces.edges_ns[0], pieces.edges_ns[-1], MS // 10)
    drawn_w = pieces.watts[np.searchsorted(pieces.edges_ns, grid_ns, "right") - 1]  # by brute force, every 0.1 ms
    for i in range(shown.sensor_ns.size):
        end_ns = shown.sensor_ns[i]
        for name, window_ns in (("power_instant_mw", 25 * MS), ("power_average_mw", 1000 * MS)):
            inside = (grid_ns >= end_ns - window_ns) & (grid_ns < end_ns)
            assert getattr(shown, name)[i] / 1e3 == pytest.approx(drawn_w[inside].mean(), rel=0.02)
        assert shown.energy_mj[i] / 1e3 == pytest.approx(drawn_w[grid_ns < end_ns].sum() * 1e-4, rel=1e-3)


def test_limits_are_named():
    history = [(500 * MS, 700.0, 1500.0, True, True), (500 * MS, 650.0, 1830.0, False, True)]
    shown = bank(PROFILE, [0]).feed(pieces_of(PROFILE, history))[0]
    reasons = {0: set(), 1: set(), -1: set()}
    for at_ns, bits in zip(shown.sensor_ns, shown.throttle_reasons, strict=True):
        reasons[-1 if at_ns < START_NS else int((at_ns - START_NS) // (500 * MS))].add(int(bits))
    assert reasons == {-1: {GPU_IDLE}, 0: {SW_POWER_CAP}, 1: {0}}


def test_noise_is_standard_normal_and_of_its_own_for_each_seed_gpu_and_update():
    updates = np.arange(5_000_000_000, 5_000_100_000)
    series = [noise(seed, gpu, updates) for seed, gpu in ((0, 0), (0, 1), (1, 0), (2**70 + 1, 3))]
    series.append(noise(0, 0, updates + 1))
    for values in series:
        assert kstest(values, "norm").pvalue > 0.01
        assert abs(np.mean(values**4) - 3) < 0.15  # five standard deviations
    correlations = np.corrcoef(series)[np.triu_indices(len(series), 1)]
    assert abs(correlations).max() < 4 / np.sqrt(updates.size)


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**16), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_noise_does_not_depend_on_what_else_is_asked_for(seed, gpu, updates):
    together = noise(seed, gpu, np.array(updates))
    assert together.tolist() == [float(noise(seed, gpu, np.array([update]))[0]) for update in updates]
    assert np.isfinite(together).all()


def test_a_boards_gain_is_its_own_and_within_the_error():
    gains = np.array([board_gain(seed, gpu, 0.05) for seed in range(250) for gpu in range(8)])
    assert kstest(gains, "uniform", (0.95, 0.1)).pvalue > 0.01
    assert board_gain(1, 1, 0.0) == 1.0


def test_gain_scales_power_and_counter_alike_and_no_other_sensor():
    history = [(3000 * MS, 400.0, 1200.0, False, True)]
    exact = replace(PROFILE, sensor=replace(PROFILE.sensor, noise_rel=0.0))
    true = bank(exact, [2]).feed(pieces_of(exact, history))[2]
    skewed = replace(exact, sensor=replace(exact.sensor, gain_error_rel=0.05))
    shown = bank(skewed, [2]).feed(pieces_of(skewed, history))[2]
    gain = board_gain(7, 2, 0.05)
    assert abs(gain - 1) > 0.001
    for name in ("power_instant_mw", "power_average_mw", "energy_mj"):
        assert getattr(shown, name) == pytest.approx(gain * getattr(true, name), abs=1)
    for name in ("sm_clock_mhz", "temperature_c", "utilization", "throttle_reasons"):
        assert getattr(shown, name).tolist() == getattr(true, name).tolist()


@given(st.floats(0, 100), st.floats(0, 800), st.floats(1e6, 1e11), st.floats(0.01, 0.99))
def test_temperature_follows_its_differential_equation(start_c, watts, elapsed_ns, part):
    thermal = LATE.thermal
    whole_c = warmed_c(start_c, watts, elapsed_ns, thermal)
    middle_c = warmed_c(start_c, watts, part * elapsed_ns, thermal)
    assert warmed_c(middle_c, watts, (1 - part) * elapsed_ns, thermal) == pytest.approx(whole_c, abs=1e-9)
    slope_c_per_s = (warmed_c(start_c, watts, 1e3, thermal) - start_c) / 1e-6
    expected = (settled_c(watts, thermal) - start_c) / thermal.time_constant_s
    assert slope_c_per_s == pytest.approx(expected, abs=1e-4)


def test_updates_happen_at_each_gpus_own_phase():
    sensor = PROFILE.sensor
    assert [int(update_ns(np.array([3]), gpu, sensor)[0]) for gpu in (0, 1)] == [
        3 * sensor.period_ns + phase for phase in sensor.phases_ns[:2]
    ]
