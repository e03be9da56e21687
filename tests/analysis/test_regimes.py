"""Clock regimes: what lasts is a change, what comes back is not."""

import numpy as np
import polars as pl
import pytest

from analysis.accounts import accounts
from analysis.energy import attribute
from analysis.load import GpuData, load_run
from analysis.regimes import LASTING_S, mean_clock_mhz, regime_changes, regime_of, with_enough

T_S = np.arange(-2.0, 300.0, 0.1)


def clocked(clock_mhz, reasons=None) -> GpuData:
    nothing = np.full(T_S.size, np.nan)
    shown = np.broadcast_to(np.asarray(clock_mhz, dtype=float), T_S.shape)
    bits = np.zeros(T_S.size) if reasons is None else reasons
    return GpuData("node", 0, T_S, nothing, nothing, nothing, nothing, {}, {}, {}, shown, bits)


def changes(*gpus: GpuData):
    return regime_changes(gpus, 0.0, 299.0)


def test_a_clock_changed_in_the_middle_makes_two_regimes():
    gpu = clocked(np.where(T_S < 150, 1980, 1200))
    (at_s,) = changes(gpu, gpu)
    assert at_s == pytest.approx(150, abs=1.5)
    assert regime_of(np.array([0.0, 140.0, 160.0]), np.array([at_s])).tolist() == [0, 0, 1]
    assert mean_clock_mhz([gpu], 0.0, 100.0) == 1980
    assert mean_clock_mhz([gpu], 200.0, 299.0) == 1200


@pytest.mark.parametrize("lasts_s", [0.5, 3.0, LASTING_S - 2])
def test_a_dip_that_comes_back_is_no_change(lasts_s):
    assert changes(clocked(np.where(np.abs(T_S - 150) < lasts_s / 2, 1200, 1980))).size == 0


def test_what_lasts_and_comes_back_makes_three_regimes():
    there_s, back_s = changes(clocked(np.where((T_S > 100) & (T_S < 100 + LASTING_S + 20), 1200, 1980)))
    assert there_s == pytest.approx(100, abs=2)
    assert back_s == pytest.approx(120 + LASTING_S, abs=2)


def test_the_jitter_of_a_power_cap_is_one_regime():
    rng = np.random.default_rng(1)
    assert changes(clocked(rng.normal(1700, 120, T_S.size))).size == 0
    assert changes(clocked(np.where(T_S % 8 < 3, 1400, 1980))).size == 0


def test_a_clock_that_wanders_with_the_load_for_minutes_is_one_regime():
    assert changes(clocked(1520 + 60 * (T_S % 140) / 140)).size == 0


def test_an_idle_clock_is_no_regime_and_no_clock_no_change():
    idle = (T_S > 100) & (T_S < 200)
    assert changes(clocked(np.where(idle, 345, 1980), np.where(idle, 1.0, 0.0))).size == 0
    assert changes(clocked(np.where(idle, 345, 1980), np.where(idle, 2.0**63, 0.0))).size == 2  # bit 63: unknown why
    assert changes(clocked(np.nan)).size == 0
    assert mean_clock_mhz([clocked(np.nan)], 0.0, 10.0) is None


def test_a_regime_of_too_few_steps_goes_with_its_neighbour():
    step_s = np.concatenate([np.arange(0, 100, 0.1), np.arange(200, 300, 0.1)])
    assert with_enough(np.array([50.0, 105.0, 210.0]), step_s, 300).tolist() == [50.0, 105.0]
    assert with_enough(np.array([50.0, 299.0]), step_s, 300).tolist() == [50.0]
    assert with_enough(np.array([5.0]), step_s, 300).size == 0


def test_one_gpu_of_a_group_is_enough():
    slow = clocked(np.where(T_S < 150, 1980, 1200))
    assert changes(clocked(1980), slow).size == 1


def test_a_run_of_two_clocks_and_a_driver_reset_is_fitted_twice_and_patched(run_of, rewrite):
    run = run_of()
    middle = run.manifest["measure_start_ns"] + 25_000_000_000
    late = pl.col("t_ns") > middle
    power = run.scan("power").collect()
    power = power.with_columns(
        pl.when(late).then(1200).otherwise(1980).cast(pl.UInt32).alias("sm_clock_mhz"),
        pl.when(late)
        .then(pl.col("energy_mj") - pl.col("energy_mj").filter(late).min().over("gpu"))
        .otherwise(pl.col("energy_mj")),
    )
    data = load_run(run, "gpu")
    whole_j = sum(line.curve.between(0, data.duration_s) for known in accounts(data) for line in known.timelines)
    summary = attribute(rewrite(run, power=power)).summary
    (fit,) = summary["fit"]
    assert [regime["sm_clock_mhz"] for regime in fit["regimes"]] == pytest.approx([1980, 1200], abs=40)
    assert len(fit["patches"]) == len(fit["sensors"]) == 2
    assert all("starts again" in patch["why"] for patch in fit["patches"])
    assert summary["measured_j"] == pytest.approx(whole_j, rel=2e-3)
    shared_j = summary["attributed_j"] + summary["idle_j"] + summary["other_j"]
    assert shared_j == pytest.approx(summary["measured_j"], rel=1e-9)
    assert any("its clock changed during the run" in note for note in summary["notes"])


def test_a_run_that_does_not_tell_its_sensor_is_fitted_by_the_windows_it_shows(run_of, rewrite):
    run = run_of(counter=False)
    gpus = [{**gpu, "sensors": {}} for gpu in run.manifest["gpus"]]
    (fit,) = attribute(rewrite(run, {"gpus": gpus})).summary["fit"]
    for sensor in fit["sensors"]:
        assert sensor["window_from"] == "run"
        assert sensor["window_s"] == pytest.approx(0.025, abs=0.006)
        assert sensor["lag_s"] == pytest.approx(0.0, abs=0.006)
