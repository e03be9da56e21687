"""The energy curve: what sensors showed, and nothing between the lines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.load import GpuData
from analysis.timeline import GpuTimeline, read_timeline


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
        ([0, 20, 10, 30, 40, 50], "decreases"),
        ([5, 5, 5, 5, 5, 5], "does not move"),
        ([0, 10, 20, np.nan, np.nan, np.nan], "does not cover the window"),
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
        ((30.0, 99.0), "stands still from 30 s on, in a window of 60 s"),
        ((-9.0, 30.0), "first moves 30 s into the window of 60 s"),
        ((20.0, 24.0), "stands still for 4 s at 20 s"),
    ],
)
def test_a_frozen_counter_gives_way_to_the_samples_and_no_joule_is_made_up(frozen_s, why):
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
