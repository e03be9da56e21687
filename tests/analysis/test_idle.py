"""Idle power: from the baselines, or from the run's own rest; by clock where that was changed."""

import numpy as np
import pytest

from analysis.idle import UNKNOWN_REL, idle_power
from analysis.load import GpuData
from analysis.steps import Steps
from analysis.summary import _alike
from analysis.timeline import Curve
from tracegen.errors import AnalysisError

END_S = 100.0


def gpu(before=None, after=None) -> GpuData:
    none = np.zeros(0)
    return GpuData("node", 0, none, none, none, none, none, before or {}, after or {}, {})


def steps(*spans) -> Steps:
    """An instance that works in `spans`, a step of 50 ms after the other."""
    start_s = np.concatenate([np.arange(a, b, 0.05) for a, b in spans])
    one = np.ones(start_s.size)
    work = np.zeros((start_s.size, 4))
    return Steps(start_s, start_s + 0.05, 0.05 * one, one, one, one, work, 0 * one, work, timed=True)


def curve(*levels) -> Curve:
    """The power of (until_s, watts), one after the other."""
    until_s, watts = np.array([0.0, *(t for t, _ in levels)]), np.array([w for _, w in levels])
    return Curve("counter", until_s, np.concatenate([[0.0], np.cumsum(watts * np.diff(until_s))]))


def idle(baseline, course, *instances, changes_s=()):
    return idle_power(baseline, "counter", course, instances, END_S, "run", changes_s=changes_s)


def test_between_two_baselines_it_goes_in_a_straight_line():
    found = idle(gpu({"counter": 90.0}, {"counter": 100.0}), curve((END_S, 400.0)), steps((0, END_S)))
    np.testing.assert_allclose(found.at(np.array([0.0, 50.0, 100.0]), END_S), [90.0, 95.0, 100.0])
    assert found.se_w == pytest.approx(5.0)
    assert found.why is None


def test_without_a_baseline_only_the_time_counts_in_which_no_instance_works():
    course = curve((20.0, 400.0), (40.0, 300.0), (60.0, 80.0), (END_S, 400.0))
    first, second = steps((0, 20), (60, END_S)), steps((10, 40))  # the GPU rests from 40 to 60 s alone
    found = idle(gpu(), course, first, second)
    assert found.before_w == found.after_w == pytest.approx(80.0)
    assert "19.5 s" in str(found.why)


def test_an_unused_gpu_is_measured_all_the_time():
    assert idle(gpu(), curve((END_S, 61.0))).before_w == pytest.approx(61.0)


def test_a_run_without_baseline_and_rest_is_refused():
    with pytest.raises(AnalysisError, match="idle_power_w"):
        idle(gpu(), curve((END_S, 400.0)), steps((0, END_S)))


def test_idle_power_jumps_with_the_clock_and_is_measured_where_no_baseline_is():
    course = curve((30.0, 400.0), (40.0, 400.0), (50.0, 85.0), (END_S, 300.0))
    baselines = gpu({"counter": 100.0}, {"counter": 70.0})
    found = idle(baselines, course, steps((0, 40), (50, END_S)), changes_s=(30.0, 60.0))
    np.testing.assert_allclose(
        found.at(np.array([0.0, 29.0, 31.0, 59.0, 61.0, 99.0]), END_S), [100, 100, 85, 85, 70, 70]
    )
    assert found.se_w == pytest.approx(UNKNOWN_REL * 85.0)
    assert found.why is None


def test_a_clock_whose_idle_power_nobody_measured_is_named():
    found = idle(gpu({"counter": 100.0}), curve((END_S, 400.0)), steps((0, END_S)), changes_s=(30.0,))
    np.testing.assert_allclose(found.at(np.array([10.0, 90.0]), END_S), [100.0, 100.0])
    assert "from 30 s on was not measured" in str(found.why)


def test_a_baseline_that_the_runs_own_rest_contradicts_is_less_certain_by_as_much_and_says_so():
    course = curve((40.0, 400.0), (60.0, 100.0), (END_S, 400.0))
    working = steps((0, 40), (60, END_S))
    sound, odd = (idle(gpu({"counter": w}, {"counter": w}), course, working) for w in (101.0, 130.0))
    assert sound.why is None
    assert odd.before_w == 130.0
    assert odd.se_w == pytest.approx(30.0)
    assert "is 130.0 W, but 20 s without a request show 100.0 W" in odd.why


def test_what_is_said_of_each_gpu_is_one_line_where_only_figures_differ():
    said = [
        "gpu 0: told 113.5 W, but 47 s show 73.7 W",
        "gpu 1: told 98 W, but 47 s show 73.8 W",
        "gpu 2: nothing told; gpu 2: nothing shown",
    ]
    assert _alike(said) == [
        "gpu 0, gpu 1: told 98 to 113.5 W, but 47 s show 73.7 to 73.8 W",
        "gpu 2: nothing told; nothing shown",
    ]
