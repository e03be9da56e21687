"""The measurement of a real GPU, where there is none: its checks find what is known, and the command goes through."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.rundir import Run, write_manifest
from tracegen.errors import AnalysisError, GpuError
from tracegen.synthesize import synthesize

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
EXTRA_IDS = 1000


@pytest.fixture(scope="module")
def modules():
    """The scripts beside `benchmarks/real_gpu.py`, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_checks
        import gpu_page
        import real_gpu

        yield {"checks": gpu_checks, "page": gpu_page, "command": real_gpu}


def chat(rate: float, seed: int, first_id: int = 0) -> pl.DataFrame:
    frame, _ = synthesize("chat", rate, 90 * 10**9, seed)
    return frame.with_columns(pl.col("request_id") + first_id)


@pytest.fixture(scope="module")
def runs(virtual_run, tmp_path_factory):
    """SIMULATED in virtual time: the mix, the mix with a stream, and single requests."""
    folder = tmp_path_factory.mktemp("virtual")
    base, extra = chat(0.4, 1), chat(0.2, 2, EXTRA_IDS)
    singles = chat(0.4, 3).head(8).with_columns(arrival_ns=pl.Series(np.arange(8) * 40 * 10**9, dtype=pl.Int64))
    wanted = {"mix": base, "added": pl.concat([base, extra]).sort("arrival_ns"), "singles": singles}
    return {name: virtual_run(folder / name, trace) for name, trace in wanted.items()}


def extra_ids(run: Run) -> list[int]:
    return [i for i in run.scan("requests").collect()["request_id"].to_list() if i >= EXTRA_IDS]


def copied(run: Run, path: Path, **tables: pl.DataFrame) -> Run:
    shutil.copytree(run.path, path)
    for name, frame in tables.items():
        frame.write_parquet(path / f"{name}.parquet")
    return Run.open(path)


def test_single_requests_are_predicted_from_the_mix(modules, runs):
    found = modules["checks"].check_singles(runs["mix"], runs["singles"])
    assert (found["requests"], found["of"]) == (8, 8)
    assert found["ratio"]["median"] == pytest.approx(1, abs=0.03)
    assert found["ratio_wide"]["median"] == pytest.approx(1, abs=0.015)
    assert found["ratio_wide"]["max"] - found["ratio_wide"]["min"] < 0.03
    assert found["ratio_s"]["median"] == pytest.approx(1, abs=0.02)
    table = pl.DataFrame(found["table"])
    assert (table["predicted_j"] / table["measured_j"]).median() == pytest.approx(found["ratio"]["median"])


def test_a_meter_that_shows_something_else_is_found_out(modules, runs, tmp_path):
    power = runs["singles"].scan("power").with_columns((pl.col("energy_mj") * 1.1).cast(pl.UInt64)).collect()
    off = modules["checks"].check_singles(runs["mix"], copied(runs["singles"], tmp_path / "singles", power=power))
    assert off["ratio"]["median"] == pytest.approx(1 / 1.1, abs=0.03)
    counter = modules["checks"].check_counter(Run.open(tmp_path / "singles"))
    assert counter["samples_over_counter_rel"] == pytest.approx(1 / 1.1 - 1, abs=0.02)
    assert abs(modules["checks"].check_counter(runs["singles"])["samples_over_counter_rel"]) < 0.02


def test_an_added_stream_is_predicted_and_steps_as_they_were_overstate_it(modules, runs):
    found = modules["checks"].check_added(runs["mix"], runs["added"], extra_ids(runs["added"]))
    assert found["requests_added"] == len(extra_ids(runs["added"]))
    assert found["why"] is None
    assert found["ratio"] == pytest.approx(1, abs=0.05)
    assert found["steps_as_they_were_j"] > 1.1 * found["measured_difference_j"]
    assert found["idle_drift_j"] == 0
    assert found["measured_both_j"] - found["measured_alone_j"] == found["measured_difference_j"] > 0


def test_a_stream_that_was_not_the_one_added_is_found_out(modules, runs):
    half = extra_ids(runs["added"])[::2]
    assert modules["checks"].check_added(runs["mix"], runs["added"], half)["ratio"] < 0.8


def test_drift_of_idle_power_is_told(modules, runs, tmp_path):
    run = copied(runs["added"], tmp_path / "added")
    gpus = [{**g, "idle_power_after_w": {"counter": g["idle_power_w"]["counter"] + 4}} for g in run.manifest["gpus"]]
    write_manifest(run.path, {**run.manifest, "gpus": gpus})
    found = modules["checks"].check_added(runs["mix"], Run.open(run.path), extra_ids(run))
    assert found["idle_drift_j"] == pytest.approx(2 * 2 * found["seconds"], rel=1e-6)
    assert found["ratio"] is not None
    gpus = [{**g, "idle_power_after_w": {"counter": g["idle_power_w"]["counter"] + 200}} for g in run.manifest["gpus"]]
    write_manifest(run.path, {**run.manifest, "gpus": gpus})
    lost = modules["checks"].check_added(runs["mix"], Run.open(run.path), extra_ids(run))
    assert lost["ratio"] is None
    assert "of idle power that drifted" in lost["why"]


def test_what_the_recorder_costs_is_told_or_why_not(modules, runs, tmp_path):
    assert modules["checks"].check_recorder(runs["mix"]) == {
        "overhead_us_mean": None,
        "why": "the run does not tell what its recorder cost",
    }
    run = copied(runs["mix"], tmp_path / "mix")
    recorder = {"steps": 3, "overhead_us_mean": 50.0, "overhead_us_p99": 90.0}
    write_manifest(run.path, {**run.manifest, "instances": [{**run.manifest["instances"][0], "recorder": recorder}]})
    found = modules["checks"].check_recorder(Run.open(run.path))
    steps = run.scan("steps").collect()
    assert found["overhead_rel"] == pytest.approx(50e3 / (steps["end_ns"] - steps["start_ns"]).median())


def test_a_check_that_cannot_be_made_gives_its_reason(modules):
    def broken(_):
        raise AnalysisError("no power")

    assert modules["checks"].guarded(broken, None) == {"why": "no power"}
    assert modules["checks"].guarded(lambda: {"x": 1}) == {"why": None, "x": 1}


@pytest.fixture(scope="module")
def measured(modules, tmp_path_factory):
    """The whole command on the simulated engine, tiny; the page's folder."""
    folder = tmp_path_factory.mktemp("measured")
    options = ["--engine", "sim", "--quick", "--seconds", "5", "--singles", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert modules["command"].main([*options, "--work", str(folder / "work"), "--out", str(folder / "out")]) == 0
    return folder / "out" / "simulated"


def test_the_command_writes_page_checks_and_runs_and_says_simulated(measured):
    text = (measured / "README.md").read_text(encoding="utf-8")
    assert "**SIMULATED: every figure on this page is computed" in text
    assert {path.name for path in measured.iterdir()} == {"README.md", "checks.json", "mix", "singles", "added"}
    for line in text.split("## What was checked")[1].split("##")[0].strip().splitlines():
        assert line.startswith("- SIMULATED: ")
    assert str(measured.parents[1]) not in (measured / "mix" / "manifest.json").read_text(encoding="utf-8")


def test_every_figure_can_be_made_again_from_the_runs_beside_the_page(modules, measured):
    document = json.loads((measured / "checks.json").read_text(encoding="utf-8"))
    checks = modules["checks"]
    runs = {name: Run.open(measured / name) for name in ("mix", "singles", "added")}
    again = {
        "runs": {name: checks.guarded(checks.describe_run, run) for name, run in runs.items()},
        "singles": checks.guarded(checks.check_singles, runs["mix"], runs["singles"]),
        "counter": {name: checks.guarded(checks.check_counter, run) for name, run in runs.items()},
    }
    assert json.loads(json.dumps(again)) == {key: document[key] for key in again}
    assert document["singles"]["of"] == 2
    for run in document["runs"].values():
        total = run["prefill_j"] + run["decode_j"] + run["idle_j"] + run["other_j"]
        assert total == pytest.approx(run["measured_j"], rel=1e-9)
        assert run["marginal_attributed_j"] <= (run["prefill_j"] + run["decode_j"]) * (1 + 1e-9)
    lines = modules["page"].page(document)
    assert "\n".join(lines) + "\n" == (measured / "README.md").read_text(encoding="utf-8")
    assert f"| {document['runs']['mix']['measured_j'] / 1e3:.3f} |" in "\n".join(lines)


def test_what_was_measured_is_not_measured_again_and_what_was_cut_off_is(modules, measured, monkeypatch):
    command, work = modules["command"], measured.parents[1] / "work"
    plan = command._parse(["--engine", "sim", "--quick", "--seconds", "5", "--singles", "2", "--work", str(work)])
    asked = []
    monkeypatch.setattr(command, "command", lambda plan, *arguments: asked.append(arguments[1]))
    base, _ = command.traces(plan)
    run = command.replay(plan, "mix", base)
    assert command.single_trace(plan, run).equals(run.__class__.open(work / "singles").scan("trace").collect())
    assert not asked
    manifest = work / "mix" / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"state": "complete"', '"state": "interrupted"'), encoding="utf-8")
    monkeypatch.setattr(command.shutil, "rmtree", lambda *_, **__: None)
    command.replay(plan, "mix", base)
    assert asked == ["mix.parquet"]
    manifest.write_text(text, encoding="utf-8")


def test_single_requests_are_further_apart_than_they_last(measured):
    requests = Run.open(measured / "singles").scan("requests").collect().sort("sent_ns")
    assert (requests["sent_ns"][1:] - requests["done_ns"][:-1]).min() > 10**9


def test_without_a_gpu_it_ends_with_one_clear_line(modules, monkeypatch, capsys, tmp_path):
    def none(_):
        raise GpuError("no NVIDIA driver here; use --engine sim")

    monkeypatch.setattr(modules["command"], "open_gpus", none)
    assert modules["command"].main(["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: no NVIDIA driver here; use --engine sim\n"
    assert not (tmp_path / "out").exists()


def test_the_page_of_what_failed_gives_reasons_instead_of_figures(modules):
    document = {
        "gpu": "GPU", "simulated": False, "trial": False, "model": "m", "versions": {},
        "probe": {"lines": None, "why": "no load"},
        "settings": {"seconds": 1, "rate_rps": 1, "extra_rps": 1, "singles": 1, "mix": "chat", "tp": 1},
        "runs": {"mix": {"why": "no power"}}, "singles": {"why": "no steps"}, "added": {"why": "saturated"},
        "counter": {"mix": {"why": "no counter"}}, "recorder": {"why": "no recorder"},
    }  # fmt: skip
    text = "\n".join(modules["page"].page(document))
    for why in ("no load", "no power", "no steps", "saturated", "no counter", "no recorder"):
        assert why in text
    assert "SIMULATED" not in text
    assert "0.000" not in text


def test_the_model_folder_has_a_word_for_every_id(modules, tmp_path):
    command = modules["command"]
    plan = command._parse(["--work", str(tmp_path)])
    command.write_model(plan.model, plan.config)
    config = json.loads((plan.model / "config.json").read_text(encoding="utf-8"))
    words = json.loads((plan.model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(words.values()) == list(range(config["vocab_size"])) == list(range(128256))
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[key] for key in shape] == [4096, 32, 32, 8, 14336]


@pytest.fixture
def machine(driver, vllm_package, tmp_path):
    """The environment of a machine with a driver (a made one) and a vLLM that only answers: no steps."""
    return driver() | {"PYTHONPATH": str(vllm_package), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_with_driver_and_vllm_it_goes_through_and_says_what_could_not_be_checked(machine, tmp_path):
    options = ["--quick", "--seconds", "3", "--singles", "2", "--rate", "3", "--extra-rate", "2"]
    argv = [sys.executable, str(BENCHMARKS / "real_gpu.py"), *options, "--work", "work", "--out", "out"]
    done = subprocess.run(argv, cwd=tmp_path, env=machine, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "SIMULATED" not in text
    assert "**A trial of the command" in text
    assert "\n- TRIAL: requests run alone: not compared" in text
    assert "random weights" in text
    assert "[what each check means](../README.md)" in text
    document = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    assert "has no step records" in document["singles"]["why"]
    assert "has no step records" in document["added"]["why"]
    assert "libcuda" in document["probe"]["why"]
    assert any("instant" in line for line in document["probe"]["lines"])
    assert document["counter"]["mix"]["samples_over_counter_rel"] is not None
    assert document["runs"]["mix"]["measured_j"] > 0
    manifest = Run.open(folder / "mix").manifest
    assert manifest["instances"][0]["model"] == "model"
    assert str(tmp_path) not in json.dumps(manifest)
