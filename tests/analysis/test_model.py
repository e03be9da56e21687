"""The step model: what it finds on laws that it can express, and what its prices add up to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.blocks import balance, cut_blocks, expect
from analysis.fit import fit_model
from analysis.model import Model
from analysis.pricing import Chunks, price_steps
from analysis.steps import Steps
from analysis.timeline import Windows
from benchmarks.made_runs import shapley

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
    assert model.linear
    np.testing.assert_allclose(model.overhead, [*LINEAR_S, 0], rtol=1e-6)
    # What a second costs is not to be told from what it does, as durations are linear too; what work costs is.
    other = made_steps(linear_s, seed=1).work
    joules = 2 * (LINEAR_J[0] * linear_s(other) + other @ LINEAR_J[1:])
    assert model.energy_j(other, np.zeros(600), np.ones(600)) == pytest.approx(joules)
    assert quality.power_rel_rms == pytest.approx(0, abs=1e-9)
    assert price_steps(model, steps, np.full(600, 200.0)).total == pytest.approx(2 * one_gpu_w * span_s)


def test_thin_data_and_untimed_steps_fall_back_to_the_linear_model():
    for steps in (made_steps(linear_s, n=50), made_steps(linear_s, timed=False)):
        model, quality = fit_model(steps, [windows_of(steps, np.full(len(steps), 300.0), 100.0)])
        assert quality.model == "linear"
        assert model.linear
        assert model.timed == steps.timed


def test_a_soft_maximum_of_durations_is_found():
    def soft_s(work):
        compute, memory = 0.003 + 1e-4 * (work[:, 0] + work[:, 1]), 0.018 + 3e-7 * work[:, 2]
        return 0.002 + (compute**3 + memory**3) ** (1 / 3)

    steps = made_steps(soft_s)
    model, quality = fit_model(steps, [windows_of(steps, np.full(600, 300.0), 100.0)])
    assert not model.linear
    assert quality.duration_rel_rms < 0.002
    straight = fit_model(steps, [windows_of(steps, np.full(600, 300.0), 100.0)], linear=True)[1]
    assert quality.duration_rel_rms < straight.duration_rel_rms / 3


@pytest.mark.parametrize("draws", [True, False])
def test_whether_what_pads_a_wave_draws_power_is_found(draws):
    def times(work, *, padded=True):
        tokens = work[:, 0] + work[:, 1]
        return 0.003 + 1e-4 * (64 * np.ceil(tokens / 64) if padded else tokens), 0.012 + 3e-7 * work[:, 2]

    def span_s(work):
        return 0.002 + np.maximum(*times(work))

    def one_gpu_w(work):
        busy_s, memory_s = times(work, padded=draws)
        return 160 + 300 * (busy_s / span_s(work)) ** 0.5 + 100 * memory_s / span_s(work)

    steps = made_steps(span_s, n=2000)
    model, _ = fit_model(steps, [windows_of(steps, one_gpu_w(steps.work), 100.0)])
    assert model.wave == 64
    assert model.pad_draws == draws
    fewer = np.floor(steps.work * 0.4)
    modelled_j = model.energy_j(fewer, np.full(2000, 100.0), np.ones(2000))
    assert modelled_j.sum() == pytest.approx((one_gpu_w(fewer) * span_s(fewer)).sum(), rel=0.01)


coefficients = st.lists(st.floats(0, 1), min_size=6, max_size=6).map(lambda c: np.array(c) * [*LINEAR_S, 1e-4])


@given(
    coefficients,
    coefficients,
    coefficients,
    st.floats(1, 12),
    st.sampled_from([0.0, 64.0]),
    st.lists(st.floats(0, 300), min_size=13, max_size=13),
)
@settings(deadline=None)
def test_prices_and_shares_are_never_negative_and_add_up(overhead, compute, memory, exponent, wave, power):
    steps = made_steps(linear_s, n=60)
    scale = np.append(np.ones(8), [1e-2, 1e-3, 1e-3, 1e-7, 1e-7])
    model = Model(overhead, compute, memory, exponent, wave, np.array(power) * scale)
    part = np.tile([0.7, 0.3], 60)  # two chunks a step, and in every fifth step ten
    step = np.repeat(np.arange(60), np.where(np.arange(60) % 5, 2, 9))  # few chunks in a step, or many
    part = np.random.default_rng(1).random(step.size)
    work = (part / np.bincount(step, weights=part)[step])[:, None] * steps.work[step]
    first = np.searchsorted(step, np.arange(61))
    chunks = Chunks(first, np.arange(step.size), work[:, 0], work[:, 3])
    parts = price_steps(model, steps, np.full(60, 200.0), chunks)
    own_j = (parts.price * steps.work).sum(axis=1)
    if parts.chunk_j is not None:
        own_j += np.bincount(step, weights=parts.chunk_j)
        assert parts.chunk_j.min() >= 0
    assert np.all(np.isfinite(parts.price))
    assert parts.price.min() >= 0
    assert parts.shared.min() >= 0
    np.testing.assert_allclose(parts.shared + own_j, parts.total, rtol=1e-9)


def test_what_is_shared_equally_is_the_energy_at_zero_work():
    steps = made_steps(linear_s, n=60)
    model = Model(
        np.array([0.002, 0, 0, 0, 0, 0]),
        np.array([0.003, 1e-4, 1e-4, 0, 1e-8, 0]),
        np.array([0.018, 0, 0, 3e-7, 0, 0]),
        3.0,
        0.0,
        np.array([20.0, 150, 80, 60, 40, 0, 0, 30, 0.1, 0, 0, 0, 0]),
    )
    zero_s = model.predict_s(np.zeros((1, 4)))
    nothing = np.zeros(1)
    zero = Steps(
        nothing, zero_s, zero_s, nothing, nothing, nothing + 1, np.zeros((1, 4)), nothing, np.zeros((1, 4)), True
    )
    at_zero_j = price_steps(model, zero, np.full(1, 200.0)).total
    work = steps.work * [0, 1, 1, 0]
    span_s = model.predict_s(work)
    # Decodes alone: chunks come in lumps, and what they find there is no slope.
    decodes = {"start_s": nothing.repeat(60), "end_s": span_s, "measured_s": span_s, "work": work}
    shared = price_steps(model, Steps(**{**vars(steps), **decodes}), np.full(60, 200.0)).shared
    np.testing.assert_allclose(shared, np.repeat(at_zero_j, 60), rtol=1e-6)


OVERLAP_IN_WAVES = Model(
    np.array([0.003, 1e-5, 1e-5, 2e-8, 1e-9, 1e-5]),
    np.array([0.002, 4e-5, 4e-5, 0, 3e-9, 4e-5]),
    np.array([0.009, 0, 0, 1e-7, 0, 0]),
    12.0,
    64.0,
    np.array([40.0, 0, 60, 90, 40, 0, 500, 90, 3.0, 0.02, 0.03, 0, 2e-6]),
)
HARD_TILES = Model(
    np.array([0.004, 0, 0, 0, 0, 0]),
    np.array([0.006, 6e-5, 6e-5, 0, 4e-9, 6e-5]),
    np.array([0.010, 0, 0, 1e-7, 0, 0]),
    30.0,
    128.0,
    np.array([80.0, 100, 300, 0, 0, 500, 0, 0, 0, 0, 0, 0, 0]),
)
SMOOTH = Model(
    np.array([0.003, 0, 0, 0, 0, 0]),
    np.array([0.002, 5e-5, 5e-5, 0, 3e-9, 0]),
    np.array([0.014, 0, 0, 1e-7, 0, 0]),
    4.0,
    0.0,
    np.array([80.0, 0, 100, 300, 0, 200, 0, 0, 0, 0, 0, 0, 0]),
)


def game_of(model: Model, chunks: list[int], decoders: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of fresh `chunks` and of `decoders` is due by many sampled orders, and what it pays."""
    rng = np.random.default_rng(3)
    tokens, count = np.array(chunks, float), len(chunks)
    each = np.zeros((count + decoders, 4))
    each[:count, 0], each[:count, 3] = tokens, tokens * (tokens / 2 + 300 * (np.arange(count) % 2))
    each[count:, 1], each[count:, 2] = 1, rng.integers(50, 3000, decoders)
    work = each.sum(axis=0)[None, :]

    def energy_j(some):
        flat = np.reshape(some, (-1, 4))
        return model.energy_j(flat, np.full(flat.shape[0], 200.0), np.ones(flat.shape[0])).reshape(np.shape(some)[:-1])

    due = shapley(energy_j, each, rng, 4096)
    span_s = model.predict_s(work)
    none, one = np.zeros(1), np.ones(1)
    steps = Steps(none, span_s, span_s, one, none, len(each) * one, work, none, 0 * work, timed=True)
    rows = np.arange(count)
    parts = price_steps(model, steps, np.full(1, 200.0), Chunks(np.array([0, count]), rows, tokens, each[:count, 3]))
    paid = parts.shared / len(each) + each @ parts.price[0]
    paid[:count] += parts.chunk_j
    assert paid.sum() == pytest.approx(energy_j(work)[0])
    return due, paid


@pytest.mark.parametrize("model", [OVERLAP_IN_WAVES, HARD_TILES, SMOOTH], ids=["overlap", "tiles", "smooth"])
@pytest.mark.parametrize("chunks", [[360, 90], [100, 60, 350], [20], [130, 128, 126, 30]], ids=str)
@pytest.mark.parametrize("decoders", [0, 2, 40])
def test_prices_are_the_shapley_values_of_a_step_with_few_chunks_and_many_decodes(model, chunks, decoders):
    """Checked against all that orders say, sampled; a chunk of 130 opens a second tile of 128, one of 126 does not."""
    due, paid = game_of(model, chunks, decoders)
    count = len(chunks)
    np.testing.assert_allclose(paid[:count], due[:count], rtol=0.02, atol=0.02)  # orders cross an edge by chance
    assert paid[count:].sum() == pytest.approx(due[count:].sum(), rel=0.02)


def test_of_many_chunks_each_pays_about_its_shapley_value():
    due, paid = game_of(SMOOTH, [700, 20, 180, 90, 40, 300, 55, 130, 10, 260], 40)
    np.testing.assert_allclose(paid[:10], due[:10], rtol=0.02)
    assert paid[10:].sum() == pytest.approx(due[10:].sum(), rel=0.05)


@pytest.mark.parametrize(("idle_se_w", "idle_j"), [(1e-9, 500.0), (1e9, 600.0)])
def test_the_discrepancy_goes_where_the_uncertainty_is(idle_se_w, idle_j):
    none, one = np.zeros(1), np.ones(1)
    steps = Steps(5 * one, 10 * one, 5 * one, one, none, one, np.zeros((1, 4)), none, np.zeros((1, 4)), True)
    blocks = cut_blocks(steps, 10.0)
    expected = expect(blocks, steps, np.array([1000.0]), lambda t_s: 0 * t_s + 100)
    settled = balance(blocks, expected, np.array([1000.0]), np.array([1600.0]), idle_se_w, 0.1)
    assert settled.idle_j[0] == pytest.approx(idle_j)
    assert settled.step_j[0] == pytest.approx(1600 - idle_j)
