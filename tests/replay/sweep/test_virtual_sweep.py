"""Sweeps in virtual time: whole, paired, resumable."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.rundir import Run
from replay.sweep import virtual
from replay.sweep.plan import Grid, SweepPlan
from replay.sweep.run import Asked, run_sweep, stored_plan
from tracegen.durations import NS_PER_S
from tracegen.errors import ReplayError
from tracegen.schema import write_trace
from tracegen.synthesize import synthesize

ARGUMENTS = ["--mix", "chat", "--tp", "1,2", "--freq", "1200,unlocked", "--rate", "1,3", "--duration", "20s"]
ARGUMENTS += ["--repeats", "2", "--virtual", "--idle", "1s", "--seed", "5"]
PLAN = SweepPlan(
    (Grid(tp=(1, 2), freq_mhz=(1200, None), rate_rps=(1.0, 3.0)),),
    mix="chat", duration_ns=20 * NS_PER_S, repeats=2, seed=5,
    run=RunOptions(Path(), virtual=True, idle_ns=NS_PER_S),
)  # fmt: skip


def without_times(folder):
    document = json.loads((folder / "sweep.json").read_text())
    for cell in document["cells"]:
        del cell["wall_s"]
    return document


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    run_sweep(PLAN, folder, QuietProgress(), Asked(jobs=1))
    return folder


def test_each_cell_is_a_run_at_its_setting(whole):
    cells = without_times(whole)["cells"]
    assert len(cells) == 16
    for cell in cells:
        if cell["tp"] == 1:
            assert cell["state"] == "failed"
            assert "tensor parallelism 1" in cell["why"]
            continue
        assert cell["state"] == "complete"
        run = Run.open(whole / cell["run"])
        instance = run.manifest["instances"][0]
        assert (instance["tp"], instance["freq_mhz"]) == (cell["tp"], cell["freq_mhz"])
        assert run.manifest["seed"] == cell["seed"] == 5 + cell["repeat"]
        assert run.manifest["state"] == "complete"
        assert cell["energy_per_request_j"] > 0


def test_cells_of_a_rate_and_repeat_replay_the_same_requests(whole):
    used = {}
    for cell in without_times(whole)["cells"]:
        if cell["state"] == "complete":
            trace = Run.open(whole / cell["run"]).manifest["trace_sha256"]
            used.setdefault((cell["rate_rps"], cell["repeat"]), set()).add(trace)
    assert len(used) == 4
    assert all(len(traces) == 1 for traces in used.values())
    assert len(set.union(*used.values())) == 4, "and others replay others"
    files = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole / "traces").iterdir()}
    assert set.union(*used.values()) == files


def test_the_stored_plan_gives_the_same_cells(whole, tmp_path):
    again = stored_plan(whole)
    assert again.cells() == PLAN.cells()
    few = replace(again, grids=(Grid(tp=(2,), freq_mhz=(1200,), rate_rps=(1.0,)),), repeats=1)
    run_sweep(few, tmp_path / "again", QuietProgress())
    same = "tp2-1200MHz-1rps-r0"
    one, other = ((f / "cells" / same / "power.parquet").read_bytes() for f in (whole, tmp_path / "again"))
    assert one == other


def test_a_finished_sweep_runs_nothing_again(whole, monkeypatch):
    before = (whole / "sweep.json").read_text()
    monkeypatch.setattr(virtual, "run_cell", pytest.fail)
    run_sweep(PLAN, whole, QuietProgress())
    assert (whole / "sweep.json").read_text() == before


def test_a_killed_sweep_goes_on_without_double_work(whole, tmp_path, until):
    folder = tmp_path / "killed"
    command = [Path(sys.executable).parent / "replay", "sweep", *ARGUMENTS, "--jobs", "1", "--quiet", "-o", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def done():
        path = folder / "sweep.json"
        document = json.loads(path.read_text()) if path.exists() else {"cells": []}
        return {cell["cell"] for cell in document["cells"] if cell["state"] == "complete"}

    until(lambda: len(done()) >= 3, 120)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {name: (folder / "cells" / name / "manifest.json").read_bytes() for name in done()}
    assert 3 <= len(kept) < 8
    run_sweep(PLAN, folder, QuietProgress(), Asked(jobs=1))
    for name, manifest in kept.items():  # a run that is run again has another run_id
        assert (folder / "cells" / name / "manifest.json").read_bytes() == manifest
    assert without_times(folder) == without_times(whole)


def test_half_a_cell_is_not_taken_for_whole(whole, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(whole, folder)
    document = json.loads((folder / "sweep.json").read_text())
    document["state"] = "running"
    mine = [cell for cell in document["cells"] if cell["state"] == "complete"][:2]
    for cell in mine:
        cell["state"] = "running"
    (folder / "sweep.json").write_text(json.dumps(document))
    half, ended = (folder / cell["run"] for cell in mine)
    manifest = json.loads((half / "manifest.json").read_text())
    (half / "manifest.json").write_text(json.dumps(manifest | {"state": "running"}))
    kept = (ended / "manifest.json").read_bytes()
    run_sweep(PLAN, folder, QuietProgress())
    assert without_times(folder) == without_times(whole)
    assert Run.open(half).manifest["run_id"] != manifest["run_id"]
    assert (ended / "manifest.json").read_bytes() == kept


def test_several_processes_come_to_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(virtual, "_POOL_PAYS_S", 0.0)
    run_sweep(PLAN, tmp_path / "pool", QuietProgress(), Asked(jobs=2))
    assert without_times(tmp_path / "pool") == without_times(whole)


def test_a_trace_is_brought_to_each_rate_and_saturation_ends_a_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trace(*_trace(tmp_path), {"generator": "test"})
    plan = SweepPlan(
        (Grid(tp=(2,), freq_mhz=(1980,), rate_rps=(1.0, 30.0, 40.0)),),
        trace=Path("t.parquet"), duration_ns=30 * NS_PER_S, repeats=2, run=PLAN.run,
    )  # fmt: skip
    news = []
    progress = QuietProgress()
    progress.say = news.append
    document = run_sweep(plan, tmp_path / "s", progress)
    by_rate = {}
    for cell in document["cells"]:
        by_rate.setdefault(cell["rate_rps"], []).append(cell)
    assert {cell["state"] for cell in by_rate[1.0]} == {"complete"}
    for cell in by_rate[30.0] + by_rate[40.0]:
        assert cell["state"] == "saturated"
        if "already" in cell["why"]:
            assert not (tmp_path / "s" / cell["run"]).exists()
            continue
        run = Run.open(tmp_path / "s" / cell["run"])
        assert run.manifest["state"] == "interrupted"
        assert run.manifest["valid"] is False
        assert run.scan("requests").collect().height == run.manifest["requests"]["sent"] < 1200
        verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
        assert verdicts["saturated"] is False
        assert verdicts["steps_complete"] is True
    monkeypatch.chdir("/")  # the stored plan finds the trace from anywhere
    before = (tmp_path / "s" / "sweep.json").read_text()
    run_sweep(stored_plan(tmp_path / "s"), tmp_path / "s", progress)
    assert (tmp_path / "s" / "sweep.json").read_text() == before
    assert any("thinning" in line for line in news)
    assert any("superposing" in line for line in news)


def _trace(folder):
    return synthesize("chat", 5.0, 60 * NS_PER_S, 1)[0], folder / "t.parquet"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"repeats": 1}, "repeats is 1, and was 2"),
        ({"grids": (Grid(tp=(2,)),)}, "tp is 2, and was 1,2"),
        ({"run": replace(PLAN.run, model="llama-2-7b")}, "model is llama-2-7b, and was None"),
    ],
)
def test_another_plan_is_refused_with_the_difference(whole, change, said):
    before = (whole / "sweep.json").read_bytes()
    with pytest.raises(ReplayError, match=said):
        run_sweep(replace(PLAN, **change), whole, QuietProgress())
    assert (whole / "sweep.json").read_bytes() == before


def test_repeats_can_be_added_and_those_before_stay(whole, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(whole, folder)
    before = {cell["cell"]: Run.open(folder / cell["run"]).manifest["run_id"] for cell in complete(folder)}
    run_sweep(replace(PLAN, repeats=3), folder, QuietProgress(), Asked(jobs=1))
    after = {cell["cell"]: Run.open(folder / cell["run"]).manifest["run_id"] for cell in complete(folder)}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {name[:-1] + "2" for name in before}
    assert [cell["order"] for cell in without_times(folder)["cells"]] == list(range(24))
    assert stored_plan(folder).repeats == 3
    with pytest.raises(ReplayError, match="repeats is 2, and was 3"):
        run_sweep(PLAN, folder, QuietProgress())


def complete(folder):
    return [cell for cell in without_times(folder)["cells"] if cell["state"] == "complete"]


def test_a_damaged_state_says_what_to_do_and_that_helps(whole, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    document = json.loads((folder / "sweep.json").read_text())
    del document["cells"][0]["order"]
    (folder / "sweep.json").write_text(json.dumps(document))
    with pytest.raises(ReplayError, match=r"sweep\.json: is damaged \('order' is missing\); remove it, and the same"):
        run_sweep(PLAN, folder, QuietProgress())
    (folder / "sweep.json").unlink()
    run_sweep(PLAN, folder, QuietProgress(), Asked(jobs=1))
    assert without_times(folder) == without_times(whole)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ReplayError, match="holds something else than a sweep"):
        run_sweep(PLAN, tmp_path, QuietProgress())


def test_a_sweep_of_which_no_cell_can_run_is_an_error(tmp_path):
    with pytest.raises(ReplayError, match=r"no cell can run: .* tensor parallelism 1"):
        run_sweep(replace(PLAN, grids=(Grid(tp=(1,)),)), tmp_path / "s", QuietProgress())
    assert not (tmp_path / "s").exists()


def test_clocks_that_the_gpu_does_not_have_become_the_nearest_once(tmp_path):
    news = []
    progress = QuietProgress()
    progress.say = news.append
    grid = Grid(tp=(2,), freq_mhz=(1200, 1201, 1205), rate_rps=(1.0,))
    document = run_sweep(replace(PLAN, grids=(grid,), repeats=1), tmp_path / "s", progress)
    assert [cell["freq_mhz"] for cell in document["cells"]] == [1200]
    assert sum("in the list already" in line for line in news) == 2


def test_failed_cells_are_run_again_only_when_asked(whole, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    document = json.loads((folder / "sweep.json").read_text())
    cell = next(cell for cell in document["cells"] if cell["state"] == "complete")
    cell |= {"state": "failed", "why": "the disk was full", "energy_per_request_j": None, "ttft_p99_ms": None}
    shutil.rmtree(folder / cell["run"])
    (folder / "sweep.json").write_text(json.dumps(document))
    run_sweep(PLAN, folder, QuietProgress())
    assert not (folder / cell["run"]).exists()
    run_sweep(PLAN, folder, QuietProgress(), Asked(retry_failed=True))
    assert without_times(folder) == without_times(whole)
