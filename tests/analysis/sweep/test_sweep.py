"""A sweep that was really simulated: its tables, its answers from the command line, and what is refused."""

import json
import shutil

import polars as pl
import pytest

from analysis.load import open_run
from analysis.requests import request_table
from analysis.saved import ensure_energy
from analysis.slo import DEFAULT_SLO, Slo
from analysis.sweep import GROUPS, MEANS, load_sweep
from analysis.sweep_file import read_sweep
from tracegen.errors import AnalysisError, RunError


def test_a_table_has_every_cell_and_setting(sweep_dir):
    told = []
    table = load_sweep(sweep_dir, slo=DEFAULT_SLO, progress=lambda *done: told.append(done))
    assert told == [(i, 8) for i in range(1, 9)]
    assert (table.simulated, table.model, table.engine) == (True, "llama-2-70b", "simulated")
    assert table.cells.height == 8
    assert table.missing == []
    assert set(table.cells["standing"]) == {"sound"}
    assert table.cells.select(MEANS).null_count().select(pl.exclude("slo_attainment_e2e")).sum_horizontal()[0] == 0
    whole = table.settings.filter(pl.col("group") == "all")
    assert whole.select("tp", "freq_mhz").rows() == [(2, 1005.0), (2, 1500.0), (4, 1005.0), (4, 1500.0)]
    assert whole["repeats"].to_list() == [2] * 4
    assert set(table.settings["group"]) == {"all", "SS", "MS"}
    assert table.groups.schema == GROUPS


def test_the_figures_are_those_of_the_runs(sweep_dir):
    table = load_sweep(sweep_dir, slo=DEFAULT_SLO)
    row = table.cells.row(0, named=True)
    run = open_run(sweep_dir / row["run"])
    energy = ensure_energy(run)
    requests = energy.requests.filter(pl.col("energy_j").is_not_null())
    assert row["energy_j"] == pytest.approx(energy.summary["measured_j"])
    assert row["energy_per_request_j"] == pytest.approx(energy.summary["measured_j"] / 24)
    assert row["attributed_per_request_j"] == pytest.approx(requests["energy_j"].mean())
    assert row["power_w"] == pytest.approx(energy.summary["measured_j"] / energy.summary["window"]["duration_s"])
    assert row["gpu_s_per_request"] == pytest.approx(row["tp"] * row["duration_s"] / 24)
    done = run.scan("requests").collect()
    ttft_ms = (done["first_token_ns"] - done["sent_ns"]) / 1e6
    assert row["ttft_mean_ms"] == pytest.approx(ttft_ms.mean())
    tpot_ms = (done["last_token_ns"] - done["first_token_ns"]) / 1e6 / (done["output_tokens"].cast(pl.Int64) - 1)
    assert row["tbt_mean_ms"] == pytest.approx(tpot_ms.mean())
    groups = table.groups.filter(pl.col("cell") == row["cell"])
    joules = (groups["energy_per_request_j"] * groups["served"]).sum()
    assert joules == pytest.approx(requests["energy_j"].sum())


def test_the_share_that_met_each_objective_is_told_apart(sweep_dir):
    bounds = {"ttft": (90.0, 170.0, 170.0), "tpot": (46.9,) * 3, "e2el": (2850.0,) * 3}
    row = load_sweep(sweep_dir, slo=Slo(bounds)).cells.row(0, named=True)
    table = request_table(open_run(sweep_dir / row["run"]))
    first = pl.when(pl.col("bucket").str.starts_with("S")).then(90.0).otherwise(170.0)
    met = {
        "ttft": table["ttft_ms"] <= table.select(first).to_series(),
        "tbt": table["tpot_ms"] <= 46.9,
        "e2e": table["e2el_ms"] <= 2850.0,
    }
    for name, kept in met.items():
        assert row[f"slo_attainment_{name}"] == pytest.approx(kept.mean()), name
    assert row["slo_attainment"] == pytest.approx((met["ttft"] & met["tbt"] & met["e2e"]).mean())
    assert 0 < row["slo_attainment"] < 1


def test_a_setting_is_the_mean_of_its_repeats_and_its_interval_students(sweep_dir):
    table = load_sweep(sweep_dir)
    row = table.settings.filter(pl.col("group") == "all").row(0, named=True)
    values = table.cells.filter(pl.col("tp") == 2, pl.col("freq_mhz") == 1005)["energy_per_request_j"]
    assert row["energy_per_request_j"] == pytest.approx(values.mean())
    # Student's t for one degree of freedom is 12.706; so much times the standard error.
    assert row["energy_per_request_j_half"] == pytest.approx(12.7062 * values.std() / 2**0.5, rel=1e-4)
    assert row["slo_attainment"] is None


def test_a_nodes_joules_have_its_idle_gpus_and_serve_both_scopes(sweep_dir, change):
    change(sweep_dir, lambda d: {**d, "cells": d["cells"][:2]})
    gpu = load_sweep(sweep_dir).cells
    node = load_sweep(sweep_dir, scope="node").cells
    again = load_sweep(sweep_dir, scope="gpu").cells
    assert node["gpus"].to_list() == [8] * 2
    assert (node["energy_j"] > gpu["energy_j"]).all()
    assert node["attributed_per_request_j"].to_list() == pytest.approx(gpu["attributed_per_request_j"].to_list())
    for name in ("energy_j", "idle_j", "power_w", "energy_per_request_j", "gpu_s_per_request"):
        assert again[name].to_list() == pytest.approx(gpu[name].to_list(), rel=1e-9)


def test_what_is_missing_is_listed_and_the_rest_analysed(sweep_dir, change):
    def edit(document):
        document["state"] = "interrupted"
        cells = {cell["cell"]: cell for cell in document["cells"]}
        cells["tp2-1005MHz-1rps-r0"] |= {"state": "failed", "why": "it broke"}
        cells["tp2-1500MHz-1rps-r0"] |= {"state": "saturated", "why": "77 waited"}
        cells["tp4-1005MHz-1rps-r1"]["state"] = "planned"

    change(sweep_dir, edit)
    shutil.rmtree(sweep_dir / "cells/tp4-1500MHz-1rps-r0")
    (sweep_dir / "cells/tp4-1500MHz-1rps-r1/requests.parquet").unlink()
    table = load_sweep(sweep_dir)
    missing = {cell: (state, why) for cell, state, why in table.missing}
    assert set(missing) == {
        "tp2-1005MHz-1rps-r0", "tp2-1500MHz-1rps-r0", "tp4-1005MHz-1rps-r1", "tp4-1500MHz-1rps-r0",
        "tp4-1500MHz-1rps-r1",
    }  # fmt: skip
    assert missing["tp2-1005MHz-1rps-r0"] == ("failed", "it broke")
    assert "goes on" in missing["tp4-1005MHz-1rps-r1"][1]
    assert "is not there" in missing["tp4-1500MHz-1rps-r0"][1]
    assert "no request had ended" in missing["tp4-1500MHz-1rps-r1"][1]
    whole = table.settings.filter(pl.col("group") == "all")
    assert whole["repeats"].to_list() == [1, 1, 1, 0]
    assert whole["energy_per_request_j"].null_count() == 1
    assert whole["energy_per_request_j_half"].null_count() == 4
    assert any("not complete (state: interrupted)" in remark for remark in table.remarks)


def test_invalid_repeats_do_not_mix_with_sound_ones(sweep_dir):
    path = sweep_dir / "cells/tp2-1005MHz-1rps-r0/manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "valid": False, "invalid_because": ["dispatch_lag: 40 ms"]}))
    table = load_sweep(sweep_dir)
    row = table.settings.row(0, named=True)
    values = table.cells.filter(pl.col("tp") == 2, pl.col("freq_mhz") == 1005).sort("repeat")["energy_per_request_j"]
    assert (row["standing"], row["repeats"], row["planned"]) == ("sound", 1, 2)
    assert row["energy_per_request_j"] == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("why", "others", "standing", "held"),
    [
        ("83.2% of readings within 15 MHz of 1005 MHz; software power cap", [], "sound", False),
        ("0.0% of readings within 15 MHz of 1005 MHz; under load this GPU holds 900 MHz at most", [], "sound", False),
        ("83.2% of readings within 15 MHz of 1005 MHz", [], "invalid", None),
        ("83.2% of readings ...; software power cap; hardware thermal slowdown", [], "invalid", None),
        ("83.2% of readings ...; software power cap", ["dispatch_lag: 40 ms"], "invalid", None),
    ],
)
def test_a_clock_below_the_one_asked_for_is_the_settings_own_only_by_the_gpus_own_limits(
    sweep_dir, why, others, standing, held
):
    for repeat in (0, 1):
        path = sweep_dir / f"cells/tp2-1005MHz-1rps-r{repeat}/manifest.json"
        document = json.loads(path.read_text())
        verdicts = [v for v in document["verdicts"] if v["name"] != "clocks_held"]
        verdicts.append({"name": "clocks_held", "ok": False, "value": 0.8, "bound": 0.99, "why": why})
        because = [f"clocks_held: {why}", *others]
        told = {"valid": False, "verdicts": verdicts, "invalid_because": because}
        path.write_text(json.dumps({**document, **told}))
    row = load_sweep(sweep_dir).settings.row(0, named=True)
    assert (row["freq_mhz"], row["standing"], row["repeats"], row["clock_held"]) == (1005, standing, 2, held)


def test_runs_of_different_models_or_engines_are_refused_with_both(sweep_dir):
    path = sweep_dir / "cells/tp4-1500MHz-1rps-r1/manifest.json"
    document = json.loads(path.read_text())
    document["instances"][0]["model"] = "another-model"
    path.write_text(json.dumps(document))
    with pytest.raises(AnalysisError, match=r"has 'llama-2-70b' and cells/?.*has 'another-model'|another-model"):
        load_sweep(sweep_dir)
    document["instances"][0]["model"] = "llama-2-70b"
    path.write_text(json.dumps({**document, "engine": "vllm"}))
    with pytest.raises(AnalysisError, match=r"'simulated' and .* has 'vllm'"):
        load_sweep(sweep_dir)


def test_a_directory_that_is_no_sweep_is_told_what_it_is(sweep_dir, tmp_path):
    with pytest.raises(AnalysisError, match="no such sweep directory; 'replay sweep"):
        read_sweep(tmp_path / "nowhere")
    with pytest.raises(AnalysisError, match=r"is a single run, and this takes a sweep; .* 'analysis energy'"):
        read_sweep(sweep_dir / "cells/tp2-1005MHz-1rps-r0")
    with pytest.raises(AnalysisError, match=r"holds runs but no sweep.json.*analysis compare"):
        read_sweep(sweep_dir / "cells")
    with pytest.raises(AnalysisError, match=r"has no sweep.json"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d["cells"][0].update(tp="two"), r"key 'cells\[0\].tp' is 'two', not a whole number"),
        (lambda d: d["cells"][3].pop("state"), r"key 'cells\[3\]' has no 'state'"),
        (lambda d: d["cells"][1].update(run="../../etc"), r"key 'cells\[1\].run' is '../../etc', which is not inside"),
        (lambda d: d["cells"].append(dict(d["cells"][0])), "the same repeat of one setting"),
        (lambda d: d.update(schema_version=2), "newer than this program's 1"),
        (lambda d: d.pop("schema_version") and None, "has no schema_version"),
    ],
)
def test_a_sweeps_file_that_is_wrong_is_named_with_its_key(sweep_dir, change, edit, words):
    def edited(document):
        edit(document)
        return document

    change(sweep_dir, edited)
    with pytest.raises(RunError, match=words):
        load_sweep(sweep_dir)


def test_a_sweep_without_cells_or_figures_is_an_empty_selection(sweep_dir, change):
    change(sweep_dir, lambda d: {**d, "cells": [{**cell, "state": "planned"} for cell in d["cells"]]})
    with pytest.raises(AnalysisError, match="none of its 8 cells has figures; tp2-1005MHz-1rps-r0: planned, not run"):
        load_sweep(sweep_dir)
    change(sweep_dir, lambda d: {**d, "cells": []})
    with pytest.raises(AnalysisError, match="has no cells"):
        load_sweep(sweep_dir)


def test_a_label_that_is_called_all_is_not_taken_for_all_requests(sweep_dir, change):
    change(sweep_dir, lambda d: {**d, "cells": d["cells"][:1]})
    path = sweep_dir / "cells/tp2-1005MHz-1rps-r0/trace.parquet"
    trace = pl.read_parquet(path)
    trace.with_columns(label=pl.col("label").replace("one", "all")).write_parquet(path)
    table = load_sweep(sweep_dir, by="label")
    assert table.settings["group"].to_list() == ["all", "all (label)", "two"]
    assert table.settings["requests"].to_list() == [24.0, 8.0, 16.0]


def test_processes_find_what_one_does(sweep_dir, monkeypatch):
    monkeypatch.setattr("analysis.sweep._POOL_CELLS", 0)
    told = []
    two = load_sweep(sweep_dir, processes=2, progress=lambda *done: told.append(done))
    assert two.settings.equals(load_sweep(sweep_dir).settings)
    assert told == [(i, 8) for i in range(1, 9)]


def test_the_sweep_command_prints_tables_that_fit_a_terminal(cli, sweep_dir, terminal):
    from analysis.sweep_text import METRICS, pivots, rate_tables
    from tracegen.console import print_table

    code, out, _ = cli("sweep", sweep_dir, "--metric", "energy,ttft_p99,slo", "--by", "label")
    assert code == 0
    assert out.startswith("SIMULATED  ")
    for word in ("J/request, by clock in MHz; at 1 requests/s", "TTFT p99, ms", "one", "two", "TP4"):
        assert word in out
    code, out, _ = cli("sweep", sweep_dir)
    assert code == 0
    assert "TP2 1005 MHz" in out
    table = load_sweep(sweep_dir, slo=DEFAULT_SLO)
    shown = [*rate_tables(table), *(pivot for metric in METRICS.values() for pivot in pivots(table, metric))]
    for title, headings, rows in shown:
        lines = terminal(lambda t=title, h=headings, r=rows: print_table(h, r, title=t))
        assert max(map(len, lines)) <= 80, lines


def test_the_sweep_command_writes_its_tables(cli, sweep_dir, tmp_path):
    out = {name: tmp_path / f"table.{name}" for name in ("csv", "parquet")}
    assert cli("sweep", sweep_dir, "--csv", out["csv"], "--table", "cells")[0] == 0
    assert pl.read_csv(out["csv"]).height == 8
    assert cli("sweep", sweep_dir, "--parquet", out["parquet"])[0] == 0
    assert pl.read_parquet(out["parquet"]).filter(pl.col("group") == "all").height == 4
    code, text, _ = cli("sweep", sweep_dir, "--json")
    document = json.loads(text)
    assert code == 0
    assert document["simulated"] is True
    assert len(document["cells"]) == 8


def test_the_recommend_command_answers(cli, sweep_dir, tmp_path):
    options = ("--slo", "ttft:2s,tbt:1s")
    code, out, _ = cli("recommend", sweep_dir, *options, "--pareto")
    assert code == 0
    assert out.startswith("SIMULATED  ")
    assert "at 1 requests/s: TP2 1005 MHz" in out
    assert "the highest clock of TP2" in out
    assert "Pareto front" in out
    for objective in ("power", "cost", "performance", "edp"):
        code, out, _ = cli("recommend", sweep_dir, *options, "--objective", objective, "--json")
        (answer,) = json.loads(out)["answers"]
        values = [answer["best"]["value"], *(other["value"] for other in answer["others"])]
        assert code == 0
        assert answer["best"]["value"] == min(values)
    written = tmp_path / "schedule.json"
    code, out, _ = cli("recommend", sweep_dir, *options, "--per-bucket", "--by", "label", "--schedule", written)
    assert code == 0
    groups = json.loads(written.read_text())["rates"][0]["groups"]
    assert set(groups) == {"one", "two"}
    assert all(entry["tp"] in (2, 4) for entry in groups.values())


def test_with_one_repeat_requests_are_the_pairs(cli, sweep_dir, change):
    change(sweep_dir, lambda d: {**d, "cells": [cell for cell in d["cells"] if cell["repeat"] == 0]})
    for objective in ("energy", "edp", "performance"):
        code, out, _ = cli("recommend", sweep_dir, "--slo", "tbt:1s", "--objective", objective, "--json")
        assert code == 0
        (answer,) = json.loads(out)["answers"]
        apart = answer["runner_up"]["against_best"]
        assert apart["paired_by"] == "requests"
        assert apart["pairs"] == 24
        assert apart["low_percent"] <= apart["percent"] <= apart["high_percent"]
    _, out, _ = cli("recommend", sweep_dir, "--slo", "tbt:1s", "--objective", "power", "--json")
    (answer,) = json.loads(out)["answers"]
    assert answer["verdict"] == "not enough data"
    assert "not of single requests" in answer["runner_up"]["against_best"]["why"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sweep", "DIR", "--by", "colour"], "cannot group by 'colour'"),
        (["sweep", "DIR", "--scope", "rack"], "scope 'rack'"),
        (["sweep", "DIR", "--metric", "beauty"], "--metric 'beauty'"),
        (["sweep", "DIR", "--table", "chairs"], "--table 'chairs'"),
        (["sweep", "DIR", "--csv", "no/where.csv"], "cannot be written"),
        (["sweep", "RUN"], "is a single run"),
        (["recommend", "DIR", "--slo", "ttft"], "give NAME:MS"),
        (["recommend", "DIR", "--rate", "7"], "has no cells of this rate; it has 1"),
        (["recommend", "DIR", "--objective", "beauty"], "--objective 'beauty' is unknown"),
        (["recommend", "DIR", "--gpu-hour-price", "2"], "goes with --objective cost"),
        (["recommend", "DIR", "--objective", "cost", "--gpu-hour-price", "-2"], "give a positive price"),
        (["recommend", "DIR", "--schedule", "x.json"], "add --per-bucket"),
        (["recommend", "DIR", "--per-bucket", "--objective", "power"], "not of a bucket"),
        (["top", "RUN", "--by", "colour"], "cannot list by 'colour'"),
        (["top", "RUN", "--metric", "beauty"], "--metric 'beauty'"),
        (["top", "RUN", "-n", "0"], "-n 0: give a number"),
        (["top", "RUN", "--by", "session"], "has no column 'session_id'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli, sweep_dir, args, words):
    places = {"DIR": sweep_dir, "RUN": sweep_dir / "cells/tp2-1005MHz-1rps-r0"}
    code, _, err = cli(*[places.get(arg, arg) for arg in args])
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert words in errors[0]
