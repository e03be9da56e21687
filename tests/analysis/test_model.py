"""The step model: what it finds on laws that it can express, and what its prices add up to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.blocks import balance, cut_blocks
from analysis.model import ActivityModel, LinearModel, fit_model
from analysis.steps import Steps
from analysis.timeline import Windows

LINEAR_S = np.array([0.02, 1e-4, 3e-5, 2e-7, 1e-8])
LINEAR_J = np.array([60.0, 0.05, 0.02, 1e-5, 1e-6])


def made_steps(seconds, n: int = 600, seed: int = 0, *, timed: bool = True) -> Steps:
    """Steps of random work without gaps; `seconds` gives their durations."""
    rng = np.random.default_rng(seed)
    prefill = rng.integers(1, 512, n) * (rng.random(n) < 0.4)
    decode = rng.integers(1, 64, n)
    work = np.stack([prefill, decode, decode * rng.integers(10, 3000, n), prefill * rng.integers(1, 4000, n)], axis=1)
    work = work.astype(float)
    span_s = seconds(work)
    end_s = np.cumsum(span_s)
    none, ones = np.zeros(n), np.ones(n)
    return Steps(end_s - span_s, end_s, span_s, ones, np.arange(n) * 1.0, ones, work, none, 0 * work, timed)


def linear_s(work):
    return LINEAR_S[0] + work @ LINEAR_S[1:]


def windows_of(steps: Steps, watts: np.ndarray, idle_w: float) -> tuple[Windows, np.ndarray]:
    """What an ideal sensor would report of `watts` a step every 0.1 s over 25 ms."""
    edges_s = np.append(steps.start_s, steps.end_s[-1])
    joules = np.concatenate([[0.0], np.cumsum(watts * (steps.end_s - steps.start_s))])
    end_s = np.arange(0.2, edges_s[-1], 0.1)
    mean_w = (np.interp(end_s, edges_s, joules) - np.interp(end_s - 0.025, edges_s, joules)) / 0.025
    return Windows("instant", end_s - 0.025, end_s, mean_w), np.full(end_s.size, idle_w)


def test_a_linear_law_is_found_from_the_smoothed_windows():
    steps = made_steps(linear_s)
    span_s = steps.end_s - steps.start_s
    one_gpu_w = 100 + LINEAR_J[0] + (steps.work @ LINEAR_J[1:]) / span_s
    model, quality = fit_model(steps, [windows_of(steps, one_gpu_w, 100.0)] * 2, linear=True)
    assert isinstance(model, LinearModel)
    np.testing.assert_allclose(model.duration, LINEAR_S, rtol=1e-6)
    np.testing.assert_allclose(model.energy, 2 * LINEAR_J, rtol=1e-6)
    assert quality.power_rel_rms == pytest.approx(0, abs=1e-9)
    assert model.parts(steps, np.full(600, 200.0)).total == pytest.approx(2 * one_gpu_w * span_s)


def test_thin_data_and_untimed_steps_fall_back_to_the_linear_model():
    for steps in (made_steps(linear_s, n=50), made_steps(linear_s, timed=False)):
        model, quality = fit_model(steps, [windows_of(steps, np.full(len(steps), 300.0), 100.0)])
        assert quality.model == "linear"
        assert isinstance(model, LinearModel)
        assert (model.duration is None) == (not steps.timed)


def test_a_soft_maximum_of_durations_is_found():
    def soft_s(work):
        compute, memory = 0.003 + 1e-4 * (work[:, 0] + work[:, 1]), 0.018 + 3e-7 * work[:, 2]
        return 0.002 + (compute**3 + memory**3) ** (1 / 3)

    steps = made_steps(soft_s)
    model, quality = fit_model(steps, [windows_of(steps, np.full(600, 300.0), 100.0)])
    assert isinstance(model, ActivityModel)
    assert quality.duration_rel_rms < 0.002
    straight = fit_model(steps, [windows_of(steps, np.full(600, 300.0), 100.0)], linear=True)[1]
    assert quality.duration_rel_rms < straight.duration_rel_rms / 3


coefficients = st.lists(st.floats(0, 1), min_size=5, max_size=5).map(lambda c: np.array(c) * LINEAR_S)


@given(
    coefficients, coefficients, coefficients, st.floats(1, 12), st.lists(st.floats(0, 300), min_size=13, max_size=13)
)
@settings(deadline=None)
def test_prices_and_shares_are_never_negative_and_add_up(overhead, compute, memory, exponent, power):
    steps = made_steps(linear_s, n=60)
    scale = np.append(np.ones(8), [1e-2, 1e-3, 1e-3, 1e-7, 1e-7])
    model = ActivityModel(overhead, compute, memory, exponent, np.array(power) * scale)
    parts = model.parts(steps, np.full(60, 200.0))
    assert np.all(np.isfinite(parts.price))
    assert parts.price.min() >= 0
    assert parts.shared.min() >= 0
    if parts.shared.max() > 0:
        np.testing.assert_allclose(parts.shared + (parts.price * steps.work).sum(axis=1), parts.total, rtol=1e-9)


def test_five_gauss_points_price_the_whole_of_a_smooth_model():
    steps = made_steps(linear_s, n=60)
    model = ActivityModel(
        np.array([0.002, 0, 0, 0, 0]),
        np.array([0.003, 1e-4, 1e-4, 0, 1e-8]),
        np.array([0.018, 0, 0, 3e-7, 0]),
        3.0,
        np.array([20.0, 150, 80, 60, 40, 0, 0, 30, 0.1, 0, 0, 0, 0]),
    )
    zero_s = model.predict_s(np.zeros((1, 4)))
    nothing = np.zeros(1)
    zero = Steps(
        nothing, zero_s, zero_s, nothing, nothing, nothing + 1, np.zeros((1, 4)), nothing, np.zeros((1, 4)), True
    )
    at_zero_j = model.parts(zero, np.full(1, 200.0)).total
    span_s = model.predict_s(steps.work)
    exact = Steps(**{**vars(steps), "start_s": nothing.repeat(60), "end_s": span_s})
    np.testing.assert_allclose(model.parts(exact, np.full(60, 200.0)).shared, np.repeat(at_zero_j, 60), rtol=2e-3)


@pytest.mark.parametrize(("idle_se_w", "idle_j"), [(1e-9, 500.0), (1e9, 600.0)])
def test_the_discrepancy_goes_where_the_uncertainty_is(idle_se_w, idle_j):
    none, one = np.zeros(1), np.ones(1)
    steps = Steps(5 * one, 10 * one, 5 * one, one, none, one, np.zeros((1, 4)), none, np.zeros((1, 4)), True)
    blocks = cut_blocks(steps, 10.0)
    settled = balance(blocks, steps, np.array([1000.0]), np.array([1600.0]), lambda t_s: 0 * t_s + 100, idle_se_w)
    assert settled.idle_j[0] == pytest.approx(idle_j)
    assert settled.step_j[0] == pytest.approx(1600 - idle_j)
