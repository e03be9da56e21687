"""What a run says of itself is what its tables say, however they are read."""

import shutil

import numpy as np
import polars as pl
import pytest

from replay import rundir
from replay.rundir import Run
from replay.summary import summarize


def test_the_summary_is_that_of_the_whole_tables_however_they_are_read(sim_run, monkeypatch):
    run, whole = Run.open(sim_run), summarize(sim_run)
    window_ns = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    power, energy_mj = run.scan("power").collect().sort("t_ns"), 0.0
    for readings in power.partition_by("gpu"):
        at = np.interp(window_ns, readings["t_ns"].to_numpy(), readings["energy_mj"].to_numpy())
        energy_mj += at[1] - at[0]
    assert whole["energy_j"] == pytest.approx(energy_mj / 1e3, rel=1e-9)
    requests = run.scan("requests").collect()
    ttft_ms = (requests["first_token_ns"] - requests["sent_ns"]).to_numpy() / 1e6
    assert whole["ttft_ms"]["p90"] == pytest.approx(np.quantile(ttft_ms, 0.9), rel=1e-9)
    assert whole["output_tokens"] == requests["output_tokens"].sum()
    for rows in (5, 64):
        monkeypatch.setattr(rundir, "_BATCH_ROWS", rows)
        assert summarize(sim_run) == whole


@pytest.mark.parametrize("rows", [5, 1 << 18])
def test_a_counter_that_fell_back_tells_nothing_wherever_batches_end(sim_run, tmp_path, monkeypatch, rows):
    shutil.copytree(sim_run, tmp_path / "run")
    manifest = Run.open(sim_run).manifest
    middle_ns = (manifest["measure_start_ns"] + manifest["measure_end_ns"]) // 2
    later = (pl.col("gpu") == 1) & (pl.col("t_ns") > middle_ns)
    power = (
        Run.open(sim_run)
        .scan("power")
        .with_columns(pl.when(later).then(pl.col("energy_mj") // 2).otherwise("energy_mj").alias("energy_mj"))
    )
    power.collect().write_parquet(tmp_path / "run" / "power.parquet")
    monkeypatch.setattr(rundir, "_BATCH_ROWS", rows)
    summary = summarize(tmp_path / "run")
    assert summary["energy_j"] is None
    assert summary["energy_why"] == "the energy counter of GPU 1 fell back (wrap-around or reset)"


def test_a_run_without_a_good_answer_has_no_latencies(sim_run, tmp_path):
    shutil.copytree(sim_run, tmp_path / "run")
    failed = Run.open(sim_run).scan("requests").with_columns(status=pl.lit("http_error"))
    failed.collect().write_parquet(tmp_path / "run" / "requests.parquet")
    summary = summarize(tmp_path / "run")
    assert (summary["requests_ok"], summary["ttft_ms"], summary["tpot_ms"]) == (0, None, None)
