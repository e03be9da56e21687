"""The CPUs' energy stands beside the GPUs' and in none of its figures; polls that failed make up no energy."""

import json
import sys

import numpy as np
import polars as pl
import pytest

from analysis.cli import main
from analysis.energy import attribute
from replay.tables import CPU_ENERGY, POWER

VALUES = [name for name in POWER if name not in {"t_ns", "host", "gpu"}]


def cpu_energy(run, watts, *, start_s=-1.0, end_s=1.0, host="node", start_uj=2**60):
    """Readings of one domain each of `watts`, from `start_s` after the window's start to `end_s` after its end."""
    zero_ns, last_ns = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    t_ns = np.arange(zero_ns + round(start_s * 1e9), last_ns + round(end_s * 1e9), 103_000_000)
    return pl.concat(
        pl.DataFrame(
            {
                "t_ns": t_ns,
                "host": host,
                "domain": domain,
                "energy_uj": np.round((t_ns - t_ns[0]) * w / 1e3).astype(np.uint64) + np.uint64(start_uj),
            },
            schema=CPU_ENERGY,
        )
        for domain, w in watts.items()
    )


def duration_s(run):
    return (run.manifest["measure_end_ns"] - run.manifest["measure_start_ns"]) / 1e9


@pytest.fixture
def printed(monkeypatch, capsys):
    """What `analysis energy ARGS` prints."""

    def printed(*args):
        monkeypatch.setattr(sys, "argv", ["analysis", "energy", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code
        return capsys.readouterr().out

    return printed


def test_cpu_energy_is_that_of_the_window_and_in_no_other_figure(run_of, rewrite):
    run = run_of()
    without = attribute(run).summary
    assert "cpu_j" not in without
    run = rewrite(run, cpu_energy=cpu_energy(run, {"package-0": 123.0, "dram-0": 7.5}))
    summary = attribute(run).summary
    assert summary["cpu_j"] == {
        "dram-0": pytest.approx(7.5 * duration_s(run), rel=1e-6),
        "package-0": pytest.approx(123.0 * duration_s(run), rel=1e-6),
    }
    del summary["cpu_j"]
    assert summary == without


def test_edges_are_interpolated_where_power_changes(run_of, rewrite):
    """Two readings around each edge of the window: 50 W and 200 W across the first, 10 W across the last."""
    run = run_of()
    zero_ns, end_ns = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    t_ns = [zero_ns - 60_000_000, zero_ns + 40_000_000, end_ns - 20_000_000, end_ns + 80_000_000]
    energy_uj = [0, 20_000_000, 120_000_000, 121_000_000]  # 200 W, then whatever, then 10 W
    table = pl.DataFrame(
        {"t_ns": t_ns, "host": "node", "domain": "package-0", "energy_uj": energy_uj}, schema=CPU_ENERGY
    )
    summary = attribute(rewrite(run, cpu_energy=table)).summary
    assert summary["cpu_j"]["package-0"] == pytest.approx(200 * 0.04 + 100 + 10 * 0.02, rel=1e-9)


def test_lines_of_their_own_say_that_it_is_not_attributed(run_of, rewrite, printed):
    run = run_of()
    assert "CPU" not in printed(run.path)
    run = rewrite(run, cpu_energy=cpu_energy(run, {"package-0": 100.0, "package-1": 50.0}))
    out = printed(run.path)
    assert f"\nCPU package-0 {100 * duration_s(run):,.0f} J, not attributed\n" in out
    assert f"\nCPU package-1 {50 * duration_s(run):,.0f} J, not attributed\n" in out
    saved = json.loads((run.path / "energy/summary.json").read_text())
    assert saved["cpu_j"]["package-1"] == pytest.approx(50 * duration_s(run), rel=1e-6)
    assert json.loads(printed(run.path, "--json"))["cpu_j"].keys() == {"package-0", "package-1"}


def test_failed_polls_leave_a_counter_whole(run_of, rewrite):
    run = run_of()
    table = cpu_energy(run, {"package-0": 100.0}).with_columns(
        pl.when(pl.int_range(pl.len()) % 3 > 0).then("energy_uj").alias("energy_uj")
    )
    summary = attribute(rewrite(run, cpu_energy=table)).summary
    assert summary["cpu_j"]["package-0"] == pytest.approx(100 * duration_s(run), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "change", "why"),
    [
        ({"start_s": 3.0}, pl.col("energy_uj"), "does not cover the window"),
        ({"end_s": -3.0}, pl.col("energy_uj"), "does not cover the window"),
        ({}, pl.lit(None), "was read less than twice"),
        ({}, pl.col("energy_uj").reverse(), "decreases"),
    ],
)
def test_energy_that_is_not_known_is_null_with_the_reason(run_of, rewrite, printed, options, change, why):
    run = run_of()
    table = cpu_energy(run, {"package-0": 100.0}, **options).with_columns(change.cast(pl.UInt64).alias("energy_uj"))
    run = rewrite(run, cpu_energy=table)
    summary = attribute(run).summary
    assert summary["cpu_j"] == {"package-0": None}
    assert f"CPU package-0: energy unknown, for its counter {why}" in summary["notes"]
    assert "\nCPU package-0 unknown, not attributed\n" in printed(run.path)


def test_a_counter_that_misses_less_than_a_second_at_an_edge_goes_on_at_its_power(run_of, rewrite):
    run = run_of()
    table = cpu_energy(run, {"package-0": 100.0}, start_s=0.2, end_s=-0.2)
    summary = attribute(rewrite(run, cpu_energy=table)).summary
    assert summary["cpu_j"]["package-0"] == pytest.approx(100 * duration_s(run), rel=1e-6)


def test_hosts_are_told_apart_and_their_clocks_brought_together(run_of, rewrite):
    run = run_of()
    offset_ns = 5 * 10**9
    there = cpu_energy(run, {"package-0": 30.0}, host="far", start_s=-0.5, end_s=0.5)
    here = cpu_energy(run, {"package-0": 20.0})
    hosts = [*run.manifest["hosts"], {"host": "far", "offset_ns": offset_ns, "offset_error_ns": 0}]
    table = pl.concat([here, there.with_columns(pl.col("t_ns") + offset_ns)])
    summary = attribute(rewrite(run, {"hosts": hosts}, cpu_energy=table)).summary
    assert summary["cpu_j"] == {
        "package-0 on far": pytest.approx(30 * duration_s(run), rel=1e-6),
        "package-0 on node": pytest.approx(20 * duration_s(run), rel=1e-6),
    }


def lose(run, gpu, from_s, to_s):
    """The power table as the sampler writes it when `gpu` cannot be read: no values, and a row only now and then."""
    power = run.scan("power").collect()
    zero_ns = run.manifest["measure_start_ns"]
    away = (pl.col("gpu") == gpu) & ((pl.col("t_ns") - zero_ns) / 1e9).is_between(from_s, to_s)
    power = power.with_columns(pl.when(~away).then(pl.col(name)).alias(name) for name in VALUES)
    return power.filter(~away | (pl.int_range(pl.len()) % 40 == 0))


def test_no_energy_is_made_up_for_a_gpu_that_was_lost(run_of, rewrite):
    run = run_of()
    whole = attribute(run).summary
    summary = attribute(rewrite(run, power=lose(run, 1, 20.0, 999.0))).summary
    assert summary["window"]["duration_s"] == pytest.approx(20.0, abs=0.2)
    assert summary["measured_j"] < whole["measured_j"]
    notes = " ".join(summary["notes"])
    assert "gpu 1 on node: " in notes
    assert "polls failed, the first at 2" in notes
    assert f"power readings leave out {duration_s(run) - 20:.1f}"[:-2] in notes
    assert "gpu 0 on node: " not in notes


def test_a_gpu_that_comes_back_is_accounted_for_with_its_hole_named(run_of, rewrite):
    run = run_of()
    whole = attribute(run).summary
    summary = attribute(rewrite(run, power=lose(run, 1, 20.0, 24.0))).summary
    assert summary["window"] == whole["window"]
    notes = " ".join(summary["notes"])
    assert "gpu 1 on node: no power reading for 4." in notes
    assert "polls failed" in notes
    assert summary["residual_j"] == pytest.approx(0, abs=1e-9 * summary["measured_j"])
    # The counter goes on counting while it cannot be read.
    assert summary["measured_j"] == pytest.approx(whole["measured_j"], rel=1e-3)


def test_samples_alone_survive_null_rows(run_of, rewrite):
    run = run_of(counter=False)
    whole = attribute(run).summary
    summary = attribute(rewrite(run, power=lose(run, 1, 20.0, 20.6))).summary
    assert summary["measured_j"] == pytest.approx(whole["measured_j"], rel=0.02)
    assert all(np.isfinite(summary[key]) for key in ("idle_j", "other_j", "energy_per_request_j"))
