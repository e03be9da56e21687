"""Window and lag of a sensor from the run itself: a known sensor over known steps."""

import numpy as np
import pytest

from analysis.load import GpuData
from analysis.sensors import disagreement, estimate_of, with_estimated
from analysis.steps import Steps
from analysis.timeline import Estimate, GpuTimeline, read_timeline

END_S = 90.0


def engine() -> Steps:
    """Steps of random work, some of it prefill, with pauses."""
    rng = np.random.default_rng(4)
    prefill = np.where(rng.random(2500) < 0.25, rng.integers(50, 500, 2500), 0).astype(float)
    decode = 20 + 15 * np.sin(np.arange(2500) / 60)
    span_s = 0.015 + 1.2e-4 * prefill + 2e-4 * decode
    start_s = np.cumsum(span_s + 0.001) - span_s
    start_s += 3 * np.floor(np.arange(2500) / 500)
    work = np.stack([prefill, decode, 700 * decode, prefill**2 / 2], axis=1)
    nothing = np.zeros((2500, 4))
    fields = {"start_s": start_s, "end_s": start_s + span_s, "measured_s": span_s, "work": work}
    optional = {"unlisted_work": nothing}
    return Steps(**fields, **{k: v for k, v in optional.items() if k in Steps.__annotations__}, **_rest(fields))


def _rest(fields) -> dict:
    """Whatever else steps have, as plain as can be."""
    plain = {}
    for name, kind in Steps.__annotations__.items():
        if name not in fields and name != "unlisted_work":
            plain[name] = True if kind in {bool, "bool"} else np.zeros(fields["start_s"].size)
    return plain


STEPS = engine()


def sensed(window_s: float, lag_s: float, *, dated: bool = True, source: str = "instant", told=None) -> GpuData:
    """A sensor of 0.1 s that shows the mean power of `window_s` that ended `lag_s` ago, with 2 % noise."""
    prefill, decode, context, _ = STEPS.work.T
    step_w = 180 + 0.4 * prefill + 2 * decode + 2e-3 * context
    edges_s = np.concatenate([[-10.0], np.stack([STEPS.start_s, STEPS.end_s], axis=1).ravel(), [END_S + 50]])
    watts = np.full(edges_s.size - 1, 100.0)
    watts[1::2] = step_w
    joules = np.concatenate([[0.0], np.cumsum(watts * np.diff(edges_s))])
    t_s = np.arange(-2, END_S + 1, 0.023)
    update = np.floor((t_s - 0.037) / 0.1).astype(int)
    sensor_s = update * 0.1 + 0.037
    end_s = sensor_s - lag_s
    noise = 1 + 0.02 * np.random.default_rng(5).standard_normal(update.max() - update.min() + 1)
    shown_w = (np.interp(end_s, edges_s, joules) - np.interp(end_s - window_s, edges_s, joules)) / window_s
    shown_w *= noise[update - update.min()]
    nothing = np.full(t_s.size, np.nan)
    return GpuData(
        host="node",
        gpu=0,
        t_s=t_s,
        sensor_s=sensor_s if dated else nothing,
        instant_w=shown_w if source == "instant" else nothing,
        average_w=shown_w if source == "average" else nothing,
        counter_j=nothing,
        idle_before_w={},
        idle_after_w={},
        sensors={source: told} if told else {},
    )


@pytest.mark.parametrize(
    ("window_s", "lag_s", "dated", "source"),
    [
        (0.025, 0.06, True, "instant"),
        (0.1, 0.03, True, "instant"),
        (0.1, 0.03, False, "instant"),
        (1.0, 0.0, True, "instant"),
        (1.0, 0.05, False, "average"),
    ],
)
def test_a_run_tells_window_and_lag_of_its_sensor(window_s, lag_s, dated, source):
    found = estimate_of(sensed(window_s, lag_s, dated=dated, source=source), STEPS)
    assert isinstance(found, Estimate), found
    assert found.source == source
    assert found.window_s == pytest.approx(window_s, abs=max(0.006, 0.05 * window_s))
    assert found.lag_s == pytest.approx(lag_s, abs=max(0.006, 0.05 * window_s))
    assert found.r2 > 0.8


def test_the_windows_of_an_untold_sensor_are_those_that_the_run_tells():
    gpu = sensed(0.025, 0.06)
    line = read_timeline(gpu, END_S)
    assert isinstance(line, GpuTimeline)
    better = with_estimated(gpu, line, STEPS)
    assert isinstance(better.estimate, Estimate)
    assert np.median(better.windows.end_s - better.windows.start_s) == pytest.approx(0.025, abs=0.006)
    assert better.curve is line.curve


def test_a_told_sensor_is_taken_at_its_word():
    gpu = sensed(0.025, 0.0, told={"period_ns": 1e8, "window_ns": 5e7, "lag_ns": 0})
    line = read_timeline(gpu, END_S)
    assert isinstance(line, GpuTimeline)
    assert with_estimated(gpu, line, STEPS) is line


def test_a_manifest_that_is_off_is_found_out_and_one_that_is_right_is_not():
    wrong = sensed(0.1, 0.06, told={"period_ns": 1e8, "window_ns": 1e8, "lag_ns": 0})
    said = disagreement(wrong, estimate_of(wrong, STEPS))
    assert said is not None
    assert "lag 0 ms" in said
    right = sensed(0.1, 0.06, told={"period_ns": 1e8, "window_ns": 1e8, "lag_ns": 6e7})
    assert disagreement(right, estimate_of(right, STEPS)) is None


def test_power_that_does_not_follow_the_steps_tells_nothing():
    gpu = sensed(0.1, 0.0)
    noise_w = np.random.default_rng(6).uniform(100, 600, gpu.t_s.size)
    noisy = GpuData(**{**vars(gpu), "instant_w": noise_w})
    assert isinstance(estimate_of(noisy, STEPS), str)
