import math
import tomllib

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from tracegen.arrivals.models import make_arrivals, parse_arrivals
from tracegen.describe import spearman
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.fit import lengths as fit_lengths_module
from tracegen.fit.arrivals import (
    Moments,
    dispersion,
    fit_arrivals,
    log_ou_dispersion,
    measure_moments,
    mmpp_dispersion,
    simulate_ns,
)
from tracegen.fit.lengths import fit_lengths
from tracegen.fit.private import COARSE, FINE, _draw, _noisy, release
from tracegen.fit.run import fit_trace, save_mix
from tracegen.fit.structure import fit_structure
from tracegen.fit.turns import fit_turns
from tracegen.lengths import Component, Mix, load_mix, sample_lengths
from tracegen.prefixes import hit_rate
from tracegen.schema import write_trace
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize
from tracegen.twin import facts, ks_distance

MINUTE_NS = 60 * NS_PER_S
TWO = (Component(0.7, 5.0, 0.4, 4.0, 0.6, 0.8), Component(0.3, 8.0, 0.2, 6.0, 0.3, -0.5))


def mix_of(components, low=(1, 1), high=(100_000, 100_000)):
    return Mix("m", "", tuple(components), low, high, {}, {}, {})


def drawn(components, count, seed=1):
    return tuple(side.astype(np.int64) for side in sample_lengths(mix_of(components), count, seed))


def test_a_known_mixture_is_found_again():
    inputs, outputs = drawn(TWO, 4000)
    found = fit_lengths(inputs, outputs, 1).components
    assert len(found) == 2
    for ours, true in zip(found, TWO, strict=True):
        assert ours.weight == pytest.approx(true.weight, abs=0.03)
        assert (ours.mu_in, ours.mu_out) == pytest.approx((true.mu_in, true.mu_out), abs=0.08)
        assert (ours.sigma_in, ours.sigma_out) == pytest.approx((true.sigma_in, true.sigma_out), abs=0.08)
        assert ours.rho == pytest.approx(true.rho, abs=0.12)


def test_a_sample_of_the_fit_is_like_its_source():
    inputs, outputs = drawn(load_mix("chat").components, 5000)
    fit = fit_lengths(inputs, outputs, 1, components=6)
    ours = sample_lengths(mix_of(fit.components, fit.low, fit.high), 5000, 9)
    for a, b in zip(ours, (inputs, outputs), strict=True):
        assert ks_distance(np.sort(a).astype(float), np.sort(b).astype(float)) < 0.04
    frames = [pl.DataFrame({"input_tokens": i, "output_tokens": o}) for i, o in (ours, (inputs, outputs))]
    assert spearman(frames[0]) == pytest.approx(spearman(frames[1]), abs=0.06)


def test_the_distribution_function_is_that_of_bivariate_normals():
    rows = np.array([[1.0], [5.0], [0.5], [4.0], [0.8], [-0.7]])
    a, b = np.array([4.5, 5.2]), np.array([3.0, 4.4, 6.0])
    covariance = [[0.25, -0.7 * 0.4], [-0.7 * 0.4, 0.64]]
    true = [[multivariate_normal.cdf([x, y], [5.0, 4.0], covariance) for y in b] for x in a]
    assert fit_lengths_module._joint(rows, a, b)[:, 0].reshape(2, 3) == pytest.approx(np.array(true), abs=2e-4)


def test_the_slopes_are_those_of_the_residuals():
    target = fit_lengths_module._Target.of(*drawn(TWO, 500))
    free = fit_lengths_module._pack(np.array([[0.6, 5.1, 0.5, 4.1, 0.5, 0.3], [0.4, 7.5, 0.3, 5.5, 0.4, 0.0]]).T)
    steps = np.eye(free.size) * 1e-6
    numeric = np.column_stack([(target.residuals(free + s) - target.residuals(free - s)) / 2e-6 for s in steps])
    assert target.slopes(free) == pytest.approx(numeric, abs=1e-4)


def test_uniform_lengths_do_not_break_the_fit():
    fit = fit_lengths(np.full(200, 128), np.full(200, 16), 1)
    assert [side[0] for side in sample_lengths(mix_of(fit.components, fit.low, fit.high), 5, 1)] == [128, 16]


@pytest.mark.parametrize("text", ["log-ou:sigma=0.4,tau=20,cv=1", "mmpp:levels=1/3,holds=30/30"])
def test_the_closed_form_of_the_dispersion_is_that_of_the_model(text):
    model = parse_arrivals(text)
    windows_s = np.array([1.0, 10.0, 60.0])
    moments = Moments(5.0, 20_000.0, {})
    at, form = (
        (np.array([0.4, 20.0, 1.0]), log_ou_dispersion)
        if model.kind == "log-ou"
        else (np.array([0.5, 30.0]), mmpp_dispersion)
    )
    seen = [[dispersion(simulate_ns(model, 5.0, 20_000.0, k), w, 20_000.0) for w in windows_s] for k in range(10)]
    assert np.mean(seen, axis=0) == pytest.approx(form(moments, windows_s, at), rel=0.15)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("poisson", {"poisson"}),
        ("gamma:cv=3", {"gamma"}),
        ("constant", {"constant"}),
        ("log-ou:sigma=0.5,tau=30,cv=1", {"log-ou", "mmpp"}),  # a random rate: which, one hour hardly tells
    ],
)
def test_the_model_is_found_by_how_counts_vary(text, kinds, monkeypatch):
    monkeypatch.setattr("tracegen.fit.arrivals.SIMULATIONS", 24)
    arrival_ns = simulate_ns(parse_arrivals(text), 4.0, 1200.0, 2)
    moments = measure_moments(arrival_ns)
    best, tried = fit_arrivals(moments, 1)
    assert best.arrivals.kind in kinds
    assert best.score == max(fitted.score for fitted in tried)
    for window, (low, _, high) in best.dispersion.items():
        if window in {1.0, 10.0, 60.0}:
            assert low * 0.8 - 0.05 <= moments.dispersion[window] <= high * 1.25 + 0.05


def test_bursts_between_silences_are_on_and_off(monkeypatch):
    monkeypatch.setattr("tracegen.fit.arrivals.SIMULATIONS", 24)
    arrival_ns = simulate_ns(make_arrivals("on-off", {}), 2.5, 3600.0, 3)
    assert fit_arrivals(measure_moments(arrival_ns), 1)[0].arrivals.kind == "on-off"


def test_windows_shorter_than_the_grid_of_arrivals_are_not_looked_at():
    grid_ns = np.arange(0, 3000, 3) * NS_PER_S
    assert min(measure_moments(np.repeat(grid_ns, 4)).dispersion) == 5.0


def test_sessions_and_clients_are_found_again():
    asked = Structure(turns=4, think_s=20.0, think_sigma=0.7, clients=30, zipf=1.1)
    frame, metadata = synthesize("chat", 6.0, 10 * MINUTE_NS, 1, structure=asked)
    found = Structure(**fit_structure(frame, metadata["block_tokens"]).structure)
    assert found.turns == pytest.approx(4, rel=0.12)
    assert found.think_s == pytest.approx(20, rel=0.1)
    assert found.think_sigma == pytest.approx(0.7, abs=0.1)
    assert found.clients == 30
    assert found.zipf == pytest.approx(1.1, abs=0.15)


def test_own_tokens_are_what_a_turn_adds():
    frame = pl.DataFrame(
        {
            "request_id": [0, 1, 2, 3, 4],
            "arrival_ns": [0, 10 * NS_PER_S, 2000 * NS_PER_S, 2010 * NS_PER_S, 3000 * NS_PER_S],
            "input_tokens": [100, 175, 9, 20, 7],
            "output_tokens": [50, 5, 6, 7, 3],
            "session_id": [1, 1, 2, 2, 3],
            "parent_id": [None, 0, None, 2, None],
        }
    )
    tied = fit_structure(frame, None)
    # Whether the session that is there from the beginning began then, nobody knows: the beginning is left out.
    assert tied.own_tokens.tolist() == [9, 5, 7]
    assert tied.outputs.tolist() == [6, 7, 3]
    assert tied.starts_ns.tolist() == [2000 * NS_PER_S, 3000 * NS_PER_S]
    assert tied.structure["turns"] == pytest.approx(2, rel=0.01)  # of four; the last one says nothing


@pytest.mark.parametrize(("turns", "think_s", "sigma"), [(10, 60.0, 1.0), (20, 30.0, 0.5), (5, 100.0, 0.8)])
def test_sessions_longer_than_the_trace_are_found_again(turns, think_s, sigma):
    """Of sessions of ten minutes and more, a trace of ten minutes shows a few turns each."""
    asked = Structure(turns=turns, think_s=think_s, think_sigma=sigma, max_context=10**7)
    found, naive = [], []
    for seed in range(3):
        frame, _ = synthesize("chat", 5.0, 10 * MINUTE_NS, seed, structure=asked)
        found.append(Structure(**fit_structure(frame, None).structure))
        naive.append(frame.height / frame["session_id"].n_unique())
    assert np.mean(naive) < 0.6 * turns
    assert np.mean([each.turns for each in found]) == pytest.approx(turns, rel=0.12)
    assert np.mean([each.think_s for each in found]) == pytest.approx(think_s, rel=0.1)
    assert np.mean([each.think_sigma for each in found]) == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("turns", [4.0, 40.0])
def test_own_tokens_hold_no_history_from_before_the_trace(turns):
    frame, _ = synthesize("chat", 5.0, 10 * MINUTE_NS, 1, structure=Structure(turns=turns, think_s=20.0))
    tied = fit_structure(frame, None)
    assert tied.own_tokens.mean() == pytest.approx(1155, rel=0.1)  # of the mix; inputs with history have many times it
    assert frame["input_tokens"].mean() > 3 * 1155
    assert ("lengths are those of later turns" in "".join(tied.remarks)) == (turns == 40)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    st.lists(st.floats(-10, 1e6), max_size=30),
    st.floats(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_times_give_turns_that_synth_takes(think_s, left_s, children):
    found = fit_turns(np.array(think_s), np.array(left_s), children)
    Structure(turns=found.mean, think_s=found.think_s, think_sigma=found.think_sigma)
    assert found.mean > 1
    assert found.settled_s(100.0) >= 0


def test_turns_without_their_history_are_no_sessions_for_synth():
    frame = synthesize("chat", 6.0, 2 * MINUTE_NS, 1, structure=Structure(turns=4, think_s=10.0))[0]
    tied = fit_structure(frame.with_columns(input_tokens=pl.lit(20, pl.UInt32)), None)
    assert "turns" not in tied.structure
    assert "left out" in tied.remarks[0]
    assert tied.starts_ns.size == frame.height


def test_system_prompts_give_the_hit_rate():
    asked = Structure(system_prompts=8, system_tokens=512)
    frame, metadata = synthesize("chat", 6.0, 5 * MINUTE_NS, 1, structure=asked)
    found = Structure(**fit_structure(frame, metadata["block_tokens"]).structure)
    twin = synthesize("chat", 6.0, 5 * MINUTE_NS, 2, structure=found)[0]
    assert hit_rate(twin, 64) == pytest.approx(hit_rate(frame, 64), abs=0.02)


def test_prefixes_that_are_shared_unequally_are_so_in_the_twin():
    """Half of the prompts share little and some nearly all: one length for all would give every prompt its share."""
    asked = Structure(system_prompts=64, system_tokens=300, system_sigma=2.1)
    frame, metadata = synthesize("chat", 6.0, 8 * MINUTE_NS, 1, structure=asked)
    found = Structure(**fit_structure(frame, metadata["block_tokens"]).structure)
    twin, _ = synthesize("chat", 6.0, 8 * MINUTE_NS, 2, structure=found)
    a, b = (facts(each, metadata).figures for each in (frame, twin))
    for name, room in (("hit_rate", 0.03), ("hit_share_p25", 0.1), ("hit_share_p50", 0.12), ("hit_share_p75", 0.12)):
        assert b[name] == pytest.approx(a[name], abs=room), name
    assert a["hit_share_p75"] - a["hit_share_p25"] > 0.4


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "conv.parquet"
    frame, metadata = synthesize("chat", 5.0, 10 * MINUTE_NS, 1)
    write_trace(frame, path, metadata)
    return path


@pytest.fixture(scope="module")
def fitted(trace):
    return fit_trace(trace, seeds=3, components=5)


def test_the_mix_file_is_one_that_synth_takes(fitted, tmp_path):
    save_mix(fitted, tmp_path / "my.toml")
    mix = load_mix(str(tmp_path / "my.toml"))
    assert len(mix.components) == 5
    assert mix.arrivals["model"] == "poisson"
    assert mix.source["rows"] > 2500
    assert mix.goodness == fitted.goodness
    twin, _ = synthesize(str(tmp_path / "my.toml"), None, 10 * MINUTE_NS, 3, arrivals="production")
    assert twin.height == pytest.approx(3000, rel=0.1)
    with pytest.raises(TraceError, match="cannot be written"):
        save_mix(fitted, tmp_path / "my.toml" / "below.toml")


def test_the_goodness_is_that_of_twins(fitted):
    assert 0 < fitted.goodness["ks_input_median"] <= fitted.goodness["ks_input_max"] < 0.08
    source, low, _, high = fitted.goodness["dispersion_1s"]
    assert low < 1.1
    assert source == pytest.approx(1, abs=0.15)
    assert high > 0.9


def test_the_same_seed_is_the_same_file(trace, fitted):
    assert fit_trace(trace, seeds=3, components=5).text == fitted.text


def test_a_trace_of_one_instant_has_lengths_only(make_frame, tmp_path):
    frame = synthesize("chat", 5.0, MINUTE_NS, 1)[0].with_columns(arrival_ns=pl.lit(0, pl.Int64))
    write_trace(frame, tmp_path / "t.parquet", {"generator": "x"})
    fit = fit_trace(tmp_path / "t.parquet", seeds=2, components=2)
    assert "arrivals" not in tomllib.loads(fit.text)
    assert "ks_gaps_median" not in fit.goodness
    assert "all requests arrive at once" in fit.remarks[0]
    write_trace(make_frame([0]), tmp_path / "one.parquet", {})
    with pytest.raises(TraceError, match="has one request"):
        fit_trace(tmp_path / "one.parquet")


def test_noise_has_the_chances_that_the_promise_takes():
    """Neighbouring counts differ by 1: what is seen must be exp(epsilon) times as likely at most, for each value."""
    noise = _noisy(np.zeros(400_000, np.int64), 1, 0.5, np.random.default_rng(1))
    values, counts = np.unique(noise, return_counts=True)
    chance = dict(zip(values.tolist(), counts / noise.size, strict=True))
    assert noise.mean() == pytest.approx(0, abs=0.03)
    for k in range(-4, 4):
        assert abs(math.log(chance[k] / chance[k + 1])) == pytest.approx(0.5, abs=0.05)


def test_what_is_released_resembles_the_trace():
    inputs, outputs = drawn(TWO, 20_000)
    arrival_ns = simulate_ns(parse_arrivals("poisson"), 10.0, 2000.0, 1)
    known = release(inputs, outputs, arrival_ns, 1.0)
    for ours, true in ((known.inputs, inputs), (known.outputs, outputs)):
        assert ks_distance(np.sort(ours).astype(float), np.sort(true).astype(float)) < 0.05
        assert ours.max() < 4 * true.max()
    assert known.moments.rate_rps == pytest.approx(10, rel=0.05)
    assert known.moments.dispersion[1.0] == pytest.approx(1, abs=0.5)
    assert known.moments.gap_cv is None


def test_drawn_lengths_follow_both_marginals():
    stream = np.random.default_rng(1)
    fine = [stream.integers(0, 50, FINE.size - 1).astype(float) for _ in range(2)]
    fine[1] *= fine[0].sum() / fine[1].sum()
    joint = np.ones((COARSE.size - 1,) * 2)
    for side, counts in zip(_draw(fine, joint, 1.0, 100_000, stream), fine, strict=True):
        seen = np.histogram(side, FINE)[0] / 100_000
        assert np.abs(np.cumsum(seen) - np.cumsum(counts) / counts.sum()).max() < 0.01


def test_a_private_file_names_nothing_and_is_never_the_same(trace):
    files = [fit_trace(trace, private=2.0, seeds=1, components=3) for _ in range(2)]
    document = tomllib.loads(files[0].text)
    assert set(document) == {"description", "low", "high", "components", "arrivals", "privacy"}
    assert document["privacy"]["epsilon"] == 2.0
    assert "conv" not in files[0].text
    assert files[0].text != files[1].text
    assert files[0].goodness["ks_input_median"] < 0.2


def test_promises_that_cannot_be_kept_are_refused(trace):
    few = np.arange(1, 50)
    with pytest.raises(TraceError, match="too few for a private fit"):
        release(few, few, few * NS_PER_S, 0.1)
    for epsilon in (0.0, -1.0, 11.0, math.nan):
        with pytest.raises(TraceError, match="epsilon"):
            fit_trace(trace, private=epsilon)
