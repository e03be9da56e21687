"""The energy curve: what sensors showed, and nothing between the lines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.counter import WRAPS_J
from analysis.load import GpuData
from analysis.timeline import NOTHING_KNOWN, GpuTimeline, read_timeline


def gpu(t_s, *, sensor_s=None, instant_w=None, average_w=None, counter_j=None, sensors=None) -> GpuData:
    t_s = np.asarray(t_s, dtype=float)
    nothing = np.full(t_s.size, np.nan)

    def column(values):
        return nothing if values is None else np.asarray(values, dtype=float)

    return GpuData(
        host="node",
        gpu=0,
        t_s=t_s,
        sensor_s=column(sensor_s),
        instant_w=column(instant_w),
        average_w=column(average_w),
        counter_j=column(counter_j),
        idle_before_w={},
        idle_after_w={},
        sensors=sensors or {},
    )


def timeline(data: GpuData, duration_s: float) -> GpuTimeline:
    line = read_timeline(data, duration_s)
    assert isinstance(line, GpuTimeline), line
    return line


def test_values_hold_back_and_no_trapezoid_is_drawn_over_unchanged_ones():
    t_s = np.arange(0, 10.11, 0.1)
    watts = np.where(t_s > 10.05, 500.0, 100.0)
    assert timeline(gpu(t_s, instant_w=watts), 10.1).curve.between(0, 10.1) == pytest.approx(1050.0)


def test_a_dropped_stretch_belongs_to_the_reading_that_ended_it():
    line = timeline(gpu([0, 0.1, 10.1], sensor_s=[0, 0.1, 10.1], instant_w=[100, 100, 500]), 10.1)
    assert line.curve.between(0.1, 10.1) == pytest.approx(5000.0)


def test_a_sensor_dated_by_changes_of_its_value_repeated_it_in_between():
    t_s = np.arange(0, 10.11, 0.1)
    watts = np.where(t_s > 10.05, 500.0, 100.0)
    changed_s = np.where(t_s > 10.05, 10.1, 0.0)
    sensors = {"instant": {"period_ns": 1e8, "window_ns": 2.5e7, "lag_ns": 0}}
    line = timeline(gpu(t_s, sensor_s=changed_s, instant_w=watts, sensors=sensors), 10.1)
    assert line.curve.between(0, 10.1) == pytest.approx(1050.0)


@pytest.mark.parametrize(
    ("counter_j", "why"),
    [
        ([5, 5, 5, 5, 5, 5], "does not move"),
        ([0, 10, 20, np.nan, np.nan, np.nan], "has no readings for 3 s at 2 s"),
        (None, "has no readings"),
    ],
)
def test_an_unsound_counter_gives_way_to_the_samples_and_says_why(counter_j, why):
    line = timeline(gpu(range(6), instant_w=[10.0] * 6, counter_j=counter_j), 5.0)
    assert line.curve.source == "instant"
    assert line.why == why
    assert line.curve.between(0, 5) == pytest.approx(50.0)


SENSORS = {"instant": {"period_ns": 1e8, "window_ns": 2.5e7, "lag_ns": 0}}


def polled(duration_s=20.0):
    """Polls every 23 ms of a sensor that updates every 100 ms, 37 ms after the full tenth."""
    t_s = np.arange(0, duration_s, 0.023)
    sensor_s = np.floor((t_s - 0.037) / 0.1) * 0.1 + 0.037
    return t_s, sensor_s, 200 + 100 * np.sin(sensor_s)


def test_first_polls_without_a_sensor_time_leave_the_others_dated():
    t_s, sensor_s, watts = polled()
    undated = np.where((t_s < 0.1) | (np.arange(t_s.size) % 50 == 7), np.nan, sensor_s)  # as the sampler begins
    line = timeline(gpu(t_s, sensor_s=undated, instant_w=watts, sensors=SENSORS), 19.0)
    exact = np.unique(sensor_s)
    off_s = np.abs(line.windows.end_s[:, None] - exact[None, :]).min(axis=1)
    assert off_s.max() < 1e-9
    assert line.windows.end_s.size > 0.95 * exact.size
    np.testing.assert_allclose(line.windows.watts, 200 + 100 * np.sin(line.windows.end_s), rtol=1e-6)
    all_dated = timeline(gpu(t_s, sensor_s=sensor_s, instant_w=watts, sensors=SENSORS), 19.0)
    assert line.curve.between(1, 18) == pytest.approx(all_dated.curve.between(1, 18), rel=2e-3)


def test_too_few_dates_are_as_good_as_none():
    t_s, sensor_s, watts = polled()
    few = gpu(t_s, sensor_s=np.where(t_s > 18, sensor_s, np.nan), instant_w=watts, sensors=SENSORS)
    assert timeline(few, 19.0).windows.end_s.size > 150  # all changes, not the last second's


@pytest.mark.parametrize(
    ("frozen_s", "why"),
    [
        ((25.0, 99.0), "stands still for 35 s at 25 s"),
        ((-9.0, 35.0), "does not move for 35 s at 0 s"),
        ((10.0, 45.0), "stands still for 35 s at 10 s"),
    ],
)
def test_a_counter_frozen_most_of_the_time_gives_way_to_the_samples(frozen_s, why):
    t_s = np.arange(-2, 61, 0.1)
    true_j = 100 * (t_s + 2)
    counter_j = np.where((t_s > frozen_s[0]) & (t_s < frozen_s[1]), 100 * (max(frozen_s[0], -2) + 2), true_j)
    watts = np.where(t_s > 30, 500.0, 100.0)
    line = timeline(gpu(t_s, counter_j=np.maximum.accumulate(counter_j), instant_w=watts), 60.0)
    assert line.curve.source == "instant"
    assert line.why == why
    assert line.curve.between(0, 60) == pytest.approx(30 * 100 + 30 * 500, rel=0.01)


def test_a_counter_that_stands_still_outside_the_window_is_sound():
    t_s = np.arange(-20, 61, 0.1)
    line = timeline(gpu(t_s, counter_j=100 * np.maximum(t_s + 3, 0), instant_w=np.full(t_s.size, 100.0)), 60.0)
    assert line.curve.source == "counter"


def test_nulls_between_readings_leave_the_counter_sound():
    t_s = np.arange(0, 20, 0.1)
    counter_j = 100 * t_s
    counter_j[50:60] = np.nan
    line = timeline(gpu(t_s, counter_j=counter_j, instant_w=np.full(t_s.size, 90.0)), 19.0)
    assert line.curve.source == "counter"
    assert line.curve.between(1, 18) == pytest.approx(1700, rel=1e-3)
    assert line.mismatch_rel == pytest.approx(-0.1, abs=0.01)


def test_average_power_is_better_than_nothing_and_nothing_is_said_in_words():
    assert timeline(gpu([0, 1, 2], average_w=[10, 10, 10]), 2.0).curve.source == "average"
    reason = read_timeline(gpu([0, 1, 2]), 2.0)
    assert isinstance(reason, str)
    assert "power_instant_mw" in reason


@given(st.lists(st.floats(50, 700), min_size=3, max_size=30), st.integers(0, 24))
@settings(deadline=None)
def test_a_counter_read_at_any_phase_is_off_by_less_than_one_update(watts, phase):
    edges_s = np.arange(len(watts) + 1) * 0.7
    joules = np.concatenate([[0.0], np.cumsum(np.array(watts) * 0.7)])
    polls_s = np.arange(-0.5, edges_s[-1] + 0.5, 0.025) + phase / 1000
    shown_j = np.interp(np.floor(polls_s / 0.1) * 0.1, edges_s, joules)
    line = timeline(gpu(polls_s, counter_j=shown_j), float(edges_s[-1]))
    times = np.linspace(0.2, edges_s[-1] - 0.2, 50)
    true_j = np.interp(times, edges_s, joules)
    bound_j = 0.15 * max(watts)
    assert np.all(np.abs(line.curve.at(times) - line.curve.at(times[:1]) - true_j + true_j[0]) <= 2 * bound_j)
    assert np.all(np.diff(line.curve.at(times)) >= 0)


@pytest.mark.parametrize("hole", [(9.1, 10.0), (5.0, 9.95), (0.05, 0.9), (4.0, 5.5)])
def test_a_hole_in_the_polls_counts_once(hole):
    """A counter of 100 W that updates every 0.1 s, polled every 23 ms but for the hole."""
    polls_s = np.arange(-0.5, 10.0, 0.023)
    polls_s = np.append(polls_s[(polls_s < hole[0]) | (polls_s > hole[1])], 10.0)
    counter_j = 100.0 * np.floor((polls_s + 1.0) * 10) / 10
    line = timeline(gpu(polls_s, counter_j=counter_j), 10.0)
    assert line.curve.source == "counter" or line.why is not None
    assert line.curve.between(0, 10) == pytest.approx(1000.0, abs=11.0), "one update at either end"


def test_a_hole_moves_no_energy_in_time():
    polls_s = np.append(np.arange(-0.5, 5.0, 0.023), np.arange(5.9, 11.0, 0.023))
    counter_j = 100.0 * np.floor((polls_s + 1.0) * 10) / 10
    curve = timeline(gpu(polls_s, counter_j=counter_j), 10.0).curve
    for a, b in ((0, 4), (4, 5), (5, 6), (6, 10), (5.2, 5.8)):
        assert curve.between(a, b) == pytest.approx(100.0 * (b - a), abs=11.0)


END_S = 120.0
FAULT_S = 60.0


def course(seed: int = 0):
    """A load of random steps: times and joules used up to them."""
    rng = np.random.default_rng(seed)
    edges_s = np.arange(-10.0, END_S + 10, 0.5)
    joules = np.concatenate([[0.0], np.cumsum(rng.uniform(100, 650, edges_s.size - 1) * 0.5)])
    return edges_s, joules


def metered(spoil, *, samples=True, gain=1.03):
    """The timeline of a GPU whose counter is `spoil(t_s, joules)`, and the joules really used between two times."""
    edges_s, joules = course()
    t_s = np.arange(-3, END_S + 3, 0.023)
    counter_j = np.interp(np.floor((t_s - 0.061) / 0.1) * 0.1 + 0.061, edges_s, joules)
    sensor_s = np.floor((t_s - 0.037) / 0.1) * 0.1 + 0.037
    watts = gain * (np.interp(sensor_s, edges_s, joules) - np.interp(sensor_s - 0.1, edges_s, joules)) / 0.1
    readings = {"sensor_s": sensor_s, "instant_w": watts} if samples else {}
    line = timeline(gpu(t_s, counter_j=spoil(t_s, counter_j), sensors=SENSORS, **readings), END_S)
    return line, lambda a, b: float(np.interp(b, edges_s, joules) - np.interp(a, edges_s, joules))


def held(t_s, counter_j, a, b):
    return np.where((t_s > a) & (t_s < b), counter_j[np.searchsorted(t_s, a)], counter_j)


def after(t_s, counter_j, at):
    """The counter's joules at the first reading after `at`."""
    return counter_j[np.searchsorted(t_s, at)]


FAULTS = {
    "restarts": (lambda t, c: np.where(t > FAULT_S, c - after(t, c, FAULT_S), c), "starts again", 70.0),
    "stands still and counts on": (lambda t, c: held(t, c, 40, 52), "stands still", 1.0),
    "stops and goes on": (
        lambda t, c: np.where(t < 52, held(t, c, 40, 52), c - after(t, c, 52) + after(t, c, 40)),
        "stands still",
        120.0,
    ),
    "is not read": (lambda t, c: np.where((t > 40) & (t < 52), np.nan, c), "is not read", 1.0),
    "leaps": (lambda t, c: np.where(t > FAULT_S, c + 9e5, c), "leaps", 70.0),
    "stops for good": (lambda t, c: held(t, c, 90, 999), "stands still", 200.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_counter_missed_comes_from_the_samples_at_the_counters_level_and_is_reported(fault):
    spoil, word, bound_j = FAULTS[fault]
    line, used_j = metered(spoil)
    assert line.curve.source == "counter"
    assert line.curve.between(0, END_S) == pytest.approx(used_j(0, END_S), abs=bound_j + 40)  # and an update's worth
    assert line.patches
    for patch in line.patches:
        assert word in patch.why
        assert patch.joules == pytest.approx(line.curve.between(patch.start_s, patch.end_s))
        assert patch.joules == pytest.approx(used_j(patch.start_s, patch.end_s), abs=bound_j + 40)
    assert line.mismatch_rel == pytest.approx(0.03, abs=0.01)
    assert np.all(np.diff(line.curve.e_j) >= 0)


@pytest.mark.parametrize("name", WRAPS_J)
def test_a_counter_of_few_bits_wraps_without_losing_a_joule(name):
    sound, used_j = metered(lambda _, c: c)

    def wrapped(t_s, counter_j):
        return np.mod(counter_j - after(t_s, counter_j, FAULT_S), WRAPS_J[name])

    line, _ = metered(wrapped)
    assert line.curve.source == "counter"
    assert not line.patches
    assert any(name in text for text in line.said)
    assert line.curve.between(0, END_S) == pytest.approx(sound.curve.between(0, END_S), abs=1e-3)
    assert sound.curve.between(0, END_S) == pytest.approx(used_j(0, END_S), abs=40)


@pytest.mark.parametrize("off_j", [-500.0, 900.0])
def test_one_value_out_of_line_is_left_out(off_j):
    def spiked(t_s, counter_j):
        return np.where(counter_j == after(t_s, counter_j, FAULT_S), counter_j + off_j, counter_j)

    line, used_j = metered(spiked)
    assert not line.patches
    assert line.said
    assert line.curve.between(0, END_S) == pytest.approx(used_j(0, END_S), abs=40)


def test_without_samples_the_power_around_a_fault_goes_on():
    line, used_j = metered(FAULTS["stops and goes on"][0], samples=False)
    (patch,) = line.patches
    assert "from the power around it" in patch.why
    assert line.curve.between(0, END_S) == pytest.approx(used_j(0, END_S), rel=0.03)


def test_a_peer_gives_the_course_where_a_gpu_has_no_samples():
    t_s = np.arange(-3, 60, 0.1)
    watts = np.where((t_s > 25) & (t_s < 28), 500.0, 100.0)
    joules = np.cumsum(watts) * 0.1
    alone = gpu(t_s, counter_j=np.where((t_s > 20) & (t_s < 30), np.nan, joules))
    line = read_timeline(alone, 60.0, peers=[gpu(t_s, instant_w=watts * 1.5)])
    assert isinstance(line, GpuTimeline)
    assert line.curve.between(20, 30) == pytest.approx(2200, abs=60)
    assert line.curve.between(25, 28) == pytest.approx(1500, abs=60)


def test_readings_twice_and_out_of_order_change_nothing():
    t_s, sensor_s, watts = polled()
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(t_s.size), 2))
    shuffled = gpu(t_s[rows], sensor_s=sensor_s[rows], instant_w=watts[rows], sensors=SENSORS)
    plain = timeline(gpu(t_s, sensor_s=sensor_s, instant_w=watts, sensors=SENSORS), 19.0)
    assert timeline(shuffled, 19.0).curve.between(1, 18) == pytest.approx(plain.curve.between(1, 18))


@pytest.mark.parametrize("absurd_w", [0.0, 65_535.0])
def test_readings_that_cannot_be_true_are_named_and_left_out(absurd_w):
    t_s = np.arange(-2, 21, 0.1)
    watts = np.where(np.arange(t_s.size) % 40 == 7, absurd_w, 300.0)
    line = timeline(gpu(t_s, instant_w=watts), 20.0)
    assert line.said
    assert line.curve.between(0, 20) == pytest.approx(6000, rel=1e-6)


def test_a_sensor_that_stops_is_replaced_by_the_other_at_its_own_level():
    t_s = np.arange(-3, 61, 0.1)
    watts = np.where(t_s > 40, 500.0, 200.0)
    line = timeline(gpu(t_s, instant_w=np.where(t_s > 30, np.nan, watts), average_w=0.9 * watts), 60.0)
    assert line.curve.source == "instant"
    assert any("power_average_mw" in patch.why for patch in line.patches)
    assert line.curve.between(0, 60) == pytest.approx(40 * 200 + 20 * 500, rel=0.03)


def test_an_average_over_a_second_is_dated_by_the_middle_of_its_window():
    t_s = np.arange(-3, 61, 0.1)
    true_j = 100 * t_s + 400 * np.clip(t_s - 30, 0, None)
    average_w = (true_j - np.interp(t_s - 1, t_s, true_j)) / 1.0
    average_w[t_s < -2] = 100.0
    line = timeline(gpu(t_s, average_w=average_w), 60.0)
    assert line.curve.between(0, 30) == pytest.approx(3000, abs=60)
    assert line.curve.between(5, 55) == pytest.approx(25 * 100 + 25 * 500, rel=0.002)


@given(st.integers(20, 100), st.booleans())
@settings(deadline=None, max_examples=15)
def test_slabs_agree_with_the_whole(cut_s, restarts):
    edges_s, joules = course(1)
    t_s = np.arange(-3, END_S + 3, 0.05)
    counter_j = np.interp(np.floor(t_s / 0.1) * 0.1, edges_s, joules)
    if restarts:
        counter_j = np.where(t_s > FAULT_S, counter_j - after(t_s, counter_j, FAULT_S), counter_j)
    whole = timeline(gpu(t_s, counter_j=counter_j), END_S).curve
    known = NOTHING_KNOWN
    for a, b in ((0.0, float(cut_s)), (float(cut_s), END_S)):
        near = (t_s > a - 3) & (t_s < b + 3)
        line = read_timeline(gpu(t_s[near], counter_j=counter_j[near]), b, a, known=known)
        assert isinstance(line, GpuTimeline)
        known += line.survey
        times = np.linspace(a, b, 200)
        off_j = line.curve.at(times) - line.curve.at(times[:1]) - whole.at(times) + whole.at(times[:1])
        assert np.abs(off_j).max() < (25.0 if restarts else 1e-6)
