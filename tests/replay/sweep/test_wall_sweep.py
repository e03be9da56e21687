"""Sweeps in wall time on the simulated engine: one server a block, ended in order, gone on with."""

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from replay.live import QuietProgress
from replay.rundir import Run, has_table
from replay.sweep import cooldown, saturation, wall
from replay.sweep.cooldown import Baseline
from replay.sweep.planfile import read_plan
from replay.sweep.run import run_sweep

PLAN = """
mix = "chat"
duration = "3s"
repeats = 1
seed = 3
[[grid]]
tp = 8
freq = [1200, 1395]
rate = 2
[[grid]]  # one request at a time cannot serve that many
tp = 8
freq = 1395
rate = 20
batch-cap = 1
[run]
engine = "sim"
idle = "1s"
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(PLAN)
    return path


def cells_of(folder):
    path = folder / "sweep.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def test_a_block_has_one_server_and_an_interrupted_sweep_goes_on(plan, tmp_path, until, processes, monkeypatch):
    folder = tmp_path / "sweep"
    command = [Path(sys.executable).parent / "replay", "sweep", "--plan", plan, "-o", folder, "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def sending():
        running = [folder / cell["run"] for cell in cells_of(folder) if cell["state"] == "running"]
        return any(has_table(run, "requests") for run in running)  # whose manifest may still be empty

    until(sending, 120)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr.read()
    process.stderr.close()
    assert json.loads((folder / "sweep.json").read_text())["state"] == "interrupted"
    cut_off = [cell for cell in cells_of(folder) if cell["state"] == "interrupted"]
    assert len(cut_off) == 1
    until(lambda: not processes(folder))
    monkeypatch.setattr(saturation, "LEAST_SENT", 20)
    monkeypatch.setattr(saturation, "LEAST_WAITING", 10)
    monkeypatch.setattr(wall, "_LOOK_S", 0.1)
    document = run_sweep(read_plan(plan), folder, QuietProgress())
    assert document["state"] == "complete"
    states = {cell["batch_cap"]: cell["state"] for cell in document["cells"]}
    assert states == {None: "complete", 1: "saturated"}
    logs = {log.parent.name: log.read_text().count("SIMULATED engine:") for log in folder.glob("servers/*/server.log")}
    assert logs == {"tp8": 1 + (cut_off[0]["batch_cap"] is None), "tp8-b1": 1 + (cut_off[0]["batch_cap"] == 1)}
    for cell in document["cells"]:
        run = Run.open(folder / cell["run"])
        assert run.manifest["instances"][0]["freq_mhz"] == cell["freq_mhz"]
        assert run.manifest["sweep"]["cool_down"] == cell["cool_down"]
        steps = run.scan("steps").collect()
        assert steps["step"].min() == 0, "each run has the steps of its own"
        assert steps["start_ns"].min() >= run.manifest["measure_start_ns"]
        assert set(steps["clock_mhz"]) == {cell["freq_mhz"]}
        if cell["state"] == "complete":
            verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
            assert verdicts["steps_complete"] is True
            assert verdicts["clocks_held"] is True
        else:
            assert run.manifest["state"] == "interrupted"
            assert cell["why"] == run.manifest["stopped_early"]
    cooled = [cell["cool_down"] for cell in document["cells"] if cell["cool_down"]]
    assert all(one["back"] and one["waited_s"] > 1 for one in cooled)
    assert not list(folder.rglob(".board"))


def test_idle_power_is_back_within_five_percent_or_three_watts():
    base = Baseline(100.0, (0,), None, None, 10**9)
    assert [base.back(watts) for watts in (90.0, 105.0, 105.1)] == [True, True, False]
    assert [replace(base, idle_w=20.0).back(watts) for watts in (23.0, 23.1)] == [True, False]


@pytest.mark.parametrize("watts", [[120.0, 110.0, 104.0], [120.0] * 50, [None]])
def test_cooling_down_ends_when_power_is_back_or_the_time_is_over_or_nobody_can_say(tmp_path, monkeypatch, watts):
    now, left = [0], list(watts)

    async def measured(*_):
        now[0] += 10**9
        return left.pop(0)

    class NoSampler:
        def __init__(self, *_):
            pass

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(cooldown, "_measure", measured)
    monkeypatch.setattr(cooldown, "Sampler", NoSampler)
    monkeypatch.setattr(cooldown, "now_ns", lambda: now[0])
    base = Baseline(100.0, (0,), None, None, 10**9)
    found = asyncio.run(cooldown.cool_down(base, "nvml", "nvml", tmp_path / "c", 20 * 10**9, lambda _: None))
    assert found["back"] is (watts[-1] == 104.0)
    assert found["idle_w"] == watts[-1]
    assert len(watts) - len(left) == {3: 3, 50: 20, 1: 1}[len(watts)]
    assert not (tmp_path / "c").exists()


VLLM_PLAN = """
mix = "chat"
duration = "2s"
repeats = 1
cool-down-max = "20s"
[[grid]]
tp = 1
freq = [1200, 1980]
rate = 5
[run]
engine = "vllm"
model = "org/model"
idle = "1s"
record-steps = false
overlong = "clip"
"""


@pytest.mark.parametrize("mode", ["", "die"])
def test_a_launched_server_serves_its_block_or_all_of_it_has_failed(
    mode, tmp_path, command, driver, vllm_package, processes
):
    (tmp_path / "p.toml").write_text(VLLM_PLAN)
    env = {**driver(gpus=1), "PYTHONPATH": str(vllm_package), "FAKE_VLLM_MODE": mode}
    process = command("sweep", "--plan", "p.toml", "-o", "s", "--quiet", env=env)
    _, err = process.communicate(timeout=120)
    cells = cells_of(tmp_path / "s")
    if mode == "die":
        assert process.returncode == 2
        assert "CUDA out of memory" in err.splitlines()[-1]
        assert [cell["state"] for cell in cells] == ["failed", "failed"]
        assert "the server of its block did not start" in cells[1]["why"]
        return
    assert process.returncode == 0, err
    assert [cell["state"] for cell in cells] == ["complete", "complete"]
    manifests = [Run.open(tmp_path / "s" / cell["run"]).manifest for cell in cells]
    commands = {tuple(manifest["instances"][0]["command"]) for manifest in manifests}
    assert len(commands) == 1, "the same port: one server"
    assert [manifest["instances"][0]["freq_mhz"] for manifest in manifests] == [cell["freq_mhz"] for cell in cells]
    assert {manifest["engine"] for manifest in manifests} == {"vllm"}
    assert [manifest.get("warmups") for manifest in manifests] == [8, None]
    assert cells[1]["cool_down"]["back"] in {True, False}
    assert not processes(tmp_path / "s")


def test_an_attached_server_that_is_simulated_makes_a_simulated_sweep(sim_server, tmp_path):
    (tmp_path / "p.toml").write_text(
        f'mix = "chat"\nduration = "1s"\nrepeats = 1\n[[grid]]\nrate = 8\n[run]\nengine = "{sim_server}"\n'
    )
    document = run_sweep(read_plan(tmp_path / "p.toml"), tmp_path / "s", QuietProgress())
    assert (document["simulated"], document["engine"], document["model"]) == (True, "simulated", "llama")
    assert [cell["state"] for cell in document["cells"]] == ["complete"]
    assert document["cells"][0]["energy_per_request_j"] is None
    assert not (tmp_path / "s" / "servers").exists()
