"""Who cost most: in order, adding up, and refused where there is nothing to list by."""

import json

import polars as pl
import pytest

from analysis.load import open_run
from analysis.saved import RunEnergy, ensure_energy
from analysis.top import METRICS, rows_for_people, title, top
from tracegen.errors import AnalysisError


@pytest.fixture
def run(sweep_dir):
    return open_run(sweep_dir / "cells/tp2-1005MHz-1rps-r0")


@pytest.mark.parametrize("by", ["request", "client", "label", "bucket"])
def test_groups_add_up_to_all_requests_in_order(run, by):
    energy = ensure_energy(run)
    found = top(run, energy, by, n=100)
    assert found.rows["value"].is_sorted(descending=True)
    assert found.rows["share"].sum() == pytest.approx(1.0)
    assert found.rows["value"].sum() == pytest.approx(energy.requests["energy_j"].sum())
    assert found.rows["requests"].sum() == 24
    assert found.count == found.rows.height == {"request": 24, "client": 4, "label": 2, "bucket": 2}[by]


def test_the_first_are_the_first_of_all(run):
    energy = ensure_energy(run)
    for metric in METRICS:
        whole = top(run, energy, metric=metric, n=100).rows["value"].to_list()
        assert top(run, energy, metric=metric, n=3).rows["value"].to_list() == whole[:3]


def test_latencies_of_groups_are_means_and_have_no_share(run):
    found = top(run, ensure_energy(run), "label", "e2el_ms")
    assert found.rows["share"].null_count() == 2
    done = run.scan("requests").collect()
    e2e_ms = ((done["last_token_ns"] - done["sent_ns"]) / 1e6).mean()
    weighted = (found.rows["value"] * found.rows["requests"]).sum() / 24
    assert weighted == pytest.approx(e2e_ms)


def test_bars_are_as_long_as_their_values(run):
    found = top(run, ensure_energy(run), n=5)
    headings, rows = rows_for_people(found)
    bars = [len(row[-1]) for row in rows]
    assert bars[0] == max(bars) > 0
    assert bars == sorted(bars, reverse=True)
    assert all(len(row) == len(headings) for row in rows)
    assert title(found) == "SIMULATED  tp2-1005MHz-1rps-r0: the 5 of 24 requests with most energy_j"


def test_a_run_without_energy_is_listed_by_latency_alone(run):
    none = RunEnergy(None, None, why="no power")
    assert top(run, none, metric="ttft_ms").rows.height == 10
    with pytest.raises(AnalysisError, match=r"no energy to list by \(no power\); latencies"):
        top(run, none)


def test_requests_without_a_figure_are_left_out_and_said(run):
    energy = ensure_energy(run)
    holes = energy.requests.with_columns(pl.when(pl.int_range(pl.len()) > 2).then("energy_j").alias("energy_j"))
    found = top(run, RunEnergy(holes, energy.summary), n=100)
    assert found.rows.height == 21
    assert found.remark == "energy_j is not known of 3 requests, which are left out"


def test_the_command_prints_and_is_json(cli, run):
    code, out, _ = cli("top", run.path, "--by", "client")
    assert code == 0
    assert out.startswith("SIMULATED  ")
    assert "█" in out
    _, out, _ = cli("top", run.path, "-n", "2", "--json")
    assert [row["name"] for row in json.loads(out)["top"]]
