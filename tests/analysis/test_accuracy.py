"""Errors and intervals on short made-up runs; `benchmarks/accuracy.py` has the long ones."""

import numpy as np
import polars as pl
import pytest

from analysis.energy import attribute_methods
from analysis.evaluate import evaluate
from benchmarks.made_runs import Load, make_run
from tracegen.synthesize import synthesize

Z90 = 1.645


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """By law: errors relative to the scaled truth, of `shapley` and of an equal split, and what intervals cover."""
    found = {}
    for law in ("cap", "fast-soft"):
        load = Load(law=law, rate=3.0, duration_s=60.0, noise_rel=0.02, orders=16)
        run = make_run(tmp_path_factory.mktemp(law) / "run", load)
        truth = run.scan("truth").select("request_id", truth_j="energy_j").collect()
        energies = attribute_methods(run, ["shapley", "equal-time", "work"])
        tables = {m: e.requests.join(truth, on="request_id") for m, e in energies.items()}
        ours = tables["shapley"]
        true_j = ours["truth_j"].to_numpy() * ours["energy_j"].sum() / ours["truth_j"].sum()
        off_j = {m: np.abs(t["energy_j"].to_numpy() - true_j) for m, t in tables.items()}
        covered = np.mean(off_j["shapley"] <= Z90 * ours["energy_se_j"].to_numpy())
        found[law] = {m: off / true_j for m, off in off_j.items()}, float(covered), tables
    return found


def test_a_minute_is_enough_for_errors_far_below_an_equal_splits(judged):
    for errors, _, _ in judged.values():
        assert np.median(errors["shapley"]) < 0.01
        assert np.quantile(errors["shapley"], 0.99) < 0.05
        assert np.median(errors["shapley"]) < 0.1 * np.median(errors["equal-time"])


def test_intervals_are_neither_too_narrow_nor_as_wide_as_the_energy(judged):
    for _, covered, tables in judged.values():
        assert covered > 0.6
        assert (tables["shapley"]["energy_se_j"] / tables["shapley"]["energy_j"]).median() < 0.02


def test_no_request_pays_less_than_nothing(judged):
    for _, _, tables in judged.values():
        for table in tables.values():
            for column in ("energy_j", "prefill_j", "decode_j", "shared_j"):
                assert table[column].min() >= 0
        assert tables["work"]["shared_j"].sum() == pytest.approx(0, abs=1e-6 * tables["work"]["energy_j"].sum())


def test_the_simulated_engines_own_requests_are_told_within_a_thousandth(virtual_run, tmp_path):
    """The figure that README gives of the demo: a minute of chat, two requests a second, TP 8."""
    trace, _ = synthesize("chat", 2.0, 60 * 10**9, 1)
    run = virtual_run(tmp_path / "run", trace, tp=8, freq_mhz=1200, truth=True)
    (error,) = evaluate(run, ["shapley"])
    assert error.median_rel < 0.001
    assert error.p99_rel < 0.01
    assert error.worst_bucket_rel < 0.01


def test_what_a_power_cap_does_to_heavy_steps_is_not_charged_to_light_ones(virtual_run, rewrite, tmp_path):
    """Chat on four GPUs without a lock: large prefills run into the cap, and their clocks fall for a moment."""
    trace, _ = synthesize("chat", 4.0, 60 * 10**9, 1)
    run = virtual_run(tmp_path / "run", trace, tp=4, truth=True)
    power = run.scan("power").collect()
    assert ((power["throttle_reasons"] & 4) > 0).mean() > 0.1
    (told,) = evaluate(run, ["shapley"])
    (untold,) = evaluate(rewrite(run, power=power.with_columns(throttle_reasons=pl.lit(0, pl.UInt64))), ["shapley"])
    assert told.median_rel < 0.005
    assert told.p99_rel < 0.03
    assert told.median_rel < 0.5 * untold.median_rel
