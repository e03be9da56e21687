"""Idle energy spread over requests, and what joules come to at the facility, in carbon and in money."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.carbon import CarbonSeries, parse_carbon, read_series
from analysis.costs import J_PER_KWH, Rates, add_costs, rows_for_people
from analysis.energy import attribute
from analysis.load import open_run
from analysis.saved import save
from analysis.spread import BY, spread_idle, time_in_system
from tracegen.errors import AnalysisError

NOON_S = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
SILENT = {"duration_s": 30.0, "silent_s": (12.0, 22.0)}  # the engine rests in between


@pytest.fixture(scope="module")
def energy(_made):
    """A run that rested."""
    return attribute(open_run(_made(**SILENT)))


def at_noon(energy):
    """`energy` of a run that began at noon."""
    anchors = [{"monotonic_ns": energy.run.manifest["measure_start_ns"], "unix_ns": int(NOON_S) * 10**9}]
    return replace(energy, run=replace(energy.run, manifest={**energy.run.manifest, "clock_anchors": anchors}))


@pytest.mark.parametrize("how", BY)
def test_spread_idle_energy_is_all_there_and_stays_out_of_energy_j(energy, how):
    spread = spread_idle(energy, how)
    summary = spread.summary
    assert summary["idle_j"] > 500
    assert spread.requests.drop("idle_j").equals(energy.requests)
    total_j = spread.requests.select((pl.col("energy_j") + pl.col("idle_j")).sum()).item()
    assert total_j == pytest.approx(summary["measured_j"] - summary["other_j"], rel=1e-9)
    assert summary["idle_spread"]["by"] == how.removeprefix("spread-")


def test_idle_energy_is_spread_by_time_or_by_head(energy):
    by_time = spread_idle(energy, "spread-time").requests
    window = energy.summary["window"]
    times = time_in_system(energy.run, (window["start_ns"], window["end_ns"]))
    per_s = by_time["idle_j"] / (times["end_ns"] - times["begin_ns"])
    assert per_s.to_numpy() == pytest.approx(np.full(len(per_s), per_s[0]))
    by_head = spread_idle(energy, "spread-requests").requests["idle_j"]
    assert by_head.to_numpy() == pytest.approx(np.full(len(by_head), energy.summary["idle_j"] / len(by_head)))


def test_idle_energy_on_its_own_line_changes_nothing(energy):
    assert spread_idle(energy, "line") is energy
    with pytest.raises(AnalysisError, match="--idle 'half' is unknown; use one of line, spread-time"):
        spread_idle(energy, "half")


def test_idle_energy_that_nobody_can_take_stays_where_it_is(energy, run_of, rewrite):
    run = run_of(**SILENT)
    failed = run.scan("requests").with_columns(pl.lit("timeout").alias("status")).collect()
    spread = spread_idle(replace(energy, run=rewrite(run, requests=failed)), "spread-requests")
    assert "idle_j" not in spread.requests.columns
    assert "idle energy was not spread" in spread.summary["notes"][-1]


@given(pue=st.floats(1, 5), grams=st.floats(0, 2000), price=st.floats(0, 10))
def test_costs_are_the_facilitys_energy_times_their_rates(energy, pue, grams, price):
    costed = add_costs(spread_idle(energy, "spread-time"), Rates(pue, grams, price, "EUR"))
    whole = costed.summary["costs"]["run"]
    measured_j = energy.summary["measured_j"]
    assert whole["facility_j"] == pytest.approx(measured_j * pue)
    assert whole["kwh"] * J_PER_KWH == pytest.approx(whole["facility_j"])
    assert whole["carbon_g"] == pytest.approx(whole["kwh"] * grams)
    assert whole["cost"] == pytest.approx(whole["kwh"] * price)
    # All of the run is ours, idle energy was spread, and everything was answered: requests pay all of it.
    assert costed.requests["carbon_g"].sum() == pytest.approx(whole["carbon_g"], rel=1e-9)
    assert costed.requests["cost"].sum() == pytest.approx(whole["cost"], rel=1e-9)
    assert costed.requests["energy_j"].equals(energy.requests["energy_j"])
    assert costed.summary["measured_j"] == measured_j


def test_costs_per_unit_agree_with_the_requests(energy):
    costed = add_costs(energy, Rates(price_per_kwh=0.3))
    costs, cost = costed.summary["costs"], costed.requests["cost"]
    tokens = energy.run.scan("requests").collect()["output_tokens"].sum()
    assert costs["per_request"]["cost"] == pytest.approx(cost.mean())
    assert costs["per_1000_output_tokens"]["cost"] == pytest.approx(1000 * cost.sum() / tokens)
    assert sum(row["cost"] * row["requests"] for row in costs["buckets"]) == pytest.approx(cost.sum())
    assert costs["inputs"] == {"price_per_kwh": {"value": 0.3, "currency": None, "source": "--price"}}
    assert "facility_j" not in costs["run"]
    assert "carbon_g" not in costed.requests.columns
    json.dumps(costs, allow_nan=False)
    headings, rows = rows_for_people(costs)
    assert headings == ["", "J", "kWh", "cost"]
    assert {len(row) for row in rows} == {len(headings)}


def test_nothing_asked_nothing_added(energy):
    assert add_costs(energy, Rates()) is energy


def test_what_was_asked_is_kept_with_the_run(energy, run_of):
    run = run_of(**SILENT)
    save(add_costs(spread_idle(replace(energy, run=run), "spread-time"), Rates(1.2, 400.0)))
    kept = pl.read_parquet(run.path / "energy/requests.parquet")
    assert {"idle_j", "carbon_g"} <= set(kept.columns)
    assert json.loads((run.path / "energy/summary.json").read_text())["costs"]["inputs"]["pue"]["value"] == 1.2


def test_a_series_counts_each_request_by_its_own_time(energy, tmp_path):
    run = energy.run
    changes_s = 17  # while nothing was in the engine
    path = tmp_path / "grid.csv"
    rows = [(NOON_S + changes_s - 60, 300), (NOON_S + changes_s, 100), (NOON_S + changes_s + 60, 900)]
    path.write_text("time,g_per_kwh\n" + "".join(f"{t},{g}\n" for t, g in rows))
    costed = add_costs(at_noon(energy), Rates(carbon=parse_carbon(str(path))))
    sent_s = (run.scan("requests").collect()["sent_ns"] - run.manifest["measure_start_ns"]) / 1e9
    grams = costed.requests["carbon_g"] / costed.requests["energy_j"] * J_PER_KWH
    early = (sent_s < 12).to_numpy()
    assert grams.to_numpy()[early] == pytest.approx(300)
    assert grams.to_numpy()[~early] == pytest.approx(100)
    mean = costed.summary["costs"]["inputs"]["carbon_g_per_kwh"]
    assert 100 < mean["value"] < 300
    assert mean["source"] == str(path)


def test_a_series_must_cover_the_run(energy, tmp_path):
    energy = at_noon(energy)
    for times, missing in (
        ([NOON_S + 1, NOON_S + 100], "2026-03-01T12:00:00Z"),
        ([NOON_S - 20, NOON_S - 10], "2026-03-01T12:00:00Z"),
        ([NOON_S - 20, NOON_S - 15, NOON_S - 10, NOON_S - 5, NOON_S + 25, NOON_S + 30], "2026-03-01T12:00:00Z"),
        ([NOON_S - 10, NOON_S, NOON_S + 20, NOON_S + 30], "2026-03-01T12:00:10Z"),
    ):
        pl.DataFrame({"time": times, "g_per_kwh": [1.0] * len(times)}).write_parquet(tmp_path / "grid.parquet")
        with pytest.raises(AnalysisError, match=f"column 'time': has no value for {missing}; the run was from"):
            add_costs(energy, Rates(carbon=read_series(tmp_path / "grid.parquet")))


def test_a_run_without_a_time_of_day_refuses_a_series(energy, tmp_path):
    path = tmp_path / "grid.csv"
    path.write_text("time,g_per_kwh\n1,2\n3,4\n")
    with pytest.raises(AnalysisError, match=r"manifest\.json: key 'clock_anchors' is missing or empty"):
        add_costs(energy, Rates(carbon=read_series(path)))


@given(st.lists(st.tuples(st.floats(0.5, 50), st.floats(0, 900)), min_size=2, max_size=9), st.data())
def test_the_mean_of_a_series_is_its_integral(steps, data):
    since_s = NOON_S + np.concatenate([[0.0], np.cumsum([s for s, _ in steps])[:-1]])
    until_s = np.append(since_s[1:], since_s[-1] + steps[-1][0])
    series = CarbonSeries("made up", since_s, until_s, np.array([g for _, g in steps]))
    begin, end = sorted(data.draw(st.tuples(*[st.floats(0, until_s[-1] - NOON_S)] * 2)))
    inside_s = np.clip(until_s - NOON_S, begin, end) - np.clip(since_s - NOON_S, begin, end)
    if end - begin > 1e-3:
        expected = (inside_s * series.g_per_kwh).sum() / inside_s.sum()
        found = series.mean(np.array([NOON_S + begin]), np.array([NOON_S + end]))[0]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_times_of_a_series_are_iso_or_unix_and_without_a_zone_utc(tmp_path):
    path = tmp_path / "grid.csv"
    for text in ("2026-03-01T12:00:00Z", "2026-03-01T13:00:00+01:00", "2026-03-01T12:00:00", str(int(NOON_S))):
        path.write_text(f"time,g_per_kwh\n{text},1\n2026-03-01T12:05Z,2\n")
        assert read_series(path).since_s[0] == NOON_S


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,grams\n1,2\n", "column 'g_per_kwh' is missing"),
        ("time,g_per_kwh\n1,2\n", "has 1 rows; two at least"),
        ("time,g_per_kwh\n1,2\nnoon,3\n", "row 1, column 'time': 'noon' is neither ISO 8601 nor unix seconds"),
        ("time,g_per_kwh\n1,2\n2,dirty\n", "row 1, column 'g_per_kwh': 'dirty' is not a number"),
        ("time,g_per_kwh\n1,2\n2,-3\n", "row 1, column 'g_per_kwh': '-3' is not a number of g/kWh from 0 up"),
        ("time,g_per_kwh\n1,2\n2,\n", "row 1, column 'g_per_kwh': None is not a number"),
        ("time,g_per_kwh\n5,2\n2,3\n", "row 1, column 'time': is not after the row before"),
    ],
)
def test_a_wrong_series_is_named_with_file_row_and_column(tmp_path, text, words):
    path = tmp_path / "grid.csv"
    path.write_text(text)
    with pytest.raises(AnalysisError) as error:
        parse_carbon(str(path))
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rates(pue=0.9), "--pue 0.9: is facility over IT energy"),
        (lambda: Rates(pue=float("nan")), "--pue nan"),
        (lambda: Rates(price_per_kwh=-1.0), "--price -1: give a price per kWh"),
        (lambda: Rates(currency="EUR"), "--currency EUR: names the unit of --price"),
        (lambda: parse_carbon("-4"), "--carbon -4: give g/kWh"),
        (lambda: parse_carbon("inf"), "--carbon inf: give g/kWh"),
        (lambda: parse_carbon("lots"), "--carbon 'lots': is neither a number"),
        (lambda: parse_carbon("nowhere.csv"), r"nowhere.csv: no such file"),
    ],
)
def test_rates_that_cannot_be_are_refused(make, words):
    with pytest.raises(AnalysisError) as error:
        make()
    assert words in str(error.value)
