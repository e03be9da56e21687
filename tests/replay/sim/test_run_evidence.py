"""Calibration on runs: constants come back, what a run was is checked, and nothing is refused only after a fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from replay.cli import app
from replay.rundir import write_manifest
from replay.sim.arguments import capped
from replay.sim.calibrate import Calibration, Data, calibrate, read_data
from replay.sim.calibration_report import hardware_file, summary
from replay.sim.fit import Constant, Fitted, with_constants
from replay.sim.hardware import Hardware, Work
from replay.sim.points import Load
from replay.sim.profile import Profile, load_profile
from replay.sim.run_evidence import read_run
from replay.tables import POWER, STEPS
from tracegen.errors import ReplayError

LOAD = Load(arrivals_s=10.0)
MOVED = {
    Constant("time", "compute_efficiency"): 0.9,
    Constant("time", "memory_efficiency"): 0.85,
    Constant("power", "awake_w"): 1.3,
    Constant("power", "compute_w"): 0.85,
}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("dgx-h100", "llama-2-70b")


@pytest.fixture(scope="module")
def other(profile: Profile) -> Profile:
    """The same machine with some constants moved by known factors."""
    return with_constants(profile, MOVED, [constant.of(profile) * factor for constant, factor in MOVED.items()])


def write_run(path: Path, profile: Profile, tp: int, clock_mhz: int, cap_w: float | None = None) -> Path:
    """A run of mixed steps as `profile` would take them, its sensors ideal: windows of 25 ms every 100 ms."""
    profile = capped(profile, cap_w)
    rng = np.random.default_rng(tp)
    n = 600
    prefill = np.where(rng.random(n) < 0.3, rng.integers(1, 2000, n), 0)
    decode, context = rng.integers(1, 60, n), rng.integers(100, 40_000, n)
    work = Work(*(column.astype(float) for column in (prefill, decode, context, prefill**2 // 2)))
    hardware = Hardware(profile, tp)
    duration_ns = np.rint(hardware.step_s(work, float(clock_mhz)) * 1e9).astype(np.int64)
    gpu_w = hardware.step_w(work, float(clock_mhz)) / tp
    gap_ns = np.where(rng.random(n) < 0.1, 200_000_000, 0)
    start_ns = np.cumsum(duration_ns + gap_ns) - duration_ns
    path.mkdir()
    pl.DataFrame(
        {
            "instance": np.zeros(n), "step": np.arange(n), "start_ns": start_ns, "end_ns": start_ns + duration_ns,
            "prefill_tokens": prefill, "decode_tokens": decode, "context_tokens": context,
            "prefill_attention": prefill**2 // 2, "requests": decode, "waiting": np.zeros(n), "kv_usage": np.zeros(n),
        },
    ).cast(dict(STEPS)).write_parquet(path / "steps.parquet")  # fmt: skip
    end_ns = np.arange(100_000_000, int(start_ns[-1]), 100_000_000)
    fine_ns = end_ns[:, None] - np.arange(0, 25_000_000, 50_000) - 25_000
    place = np.searchsorted(start_ns, fine_ns, side="right") - 1
    busy = (place >= 0) & (fine_ns < (start_ns + duration_ns)[place])
    shown_w = np.where(busy, gpu_w[place], hardware.idle_w(clock_mhz)).mean(axis=1)
    columns = {
        "t_ns": end_ns, "sensor_ns": end_ns, "host": ["here"] * end_ns.size, "gpu": np.zeros(end_ns.size),
        "power_instant_mw": np.rint(1e3 * shown_w),
    }  # fmt: skip
    empty = {name: pl.Series(name, [None] * end_ns.size) for name in POWER if name not in columns}
    pl.DataFrame(columns | empty).cast(dict(POWER)).select(list(POWER)).write_parquet(path / "power.parquet")
    sensors = {"instant": {"period_ns": 100_000_000, "window_ns": 25_000_000, "lag_ns": 0}}
    write_manifest(
        path,
        {
            "schema_version": "1.0",
            "state": "complete",
            "engine": "simulated",
            "instances": [
                {
                    "instance": 0, "host": "here", "gpus": [0], "tp": tp, "freq_mhz": clock_mhz, "power_cap_w": cap_w,
                    "model": "meta-llama/Llama-2-70b-hf",
                }
            ],
            "gpus": [{"host": "here", "gpu": 0, "name": f"Simulated {profile.gpu_name}", "sensors": sensors}],
        },
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def runs(other: Profile, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"tp{tp}-{mhz}", other, tp, mhz) for tp in (2, 4) for mhz in (900, 1300, 1900)]


def test_constants_that_made_runs_come_back_all_at_once(profile: Profile, other: Profile, runs: list[Path]) -> None:
    data = read_data(runs, profile, LOAD, holdout=0.2, seed=0)
    found = calibrate(profile, data, holdout=0.2, seed=0)
    assert found.fitted is not None
    told = [c for c, e in zip(found.fitted.constants, found.fitted.error_rel, strict=True) if e < 0.01]
    assert {*MOVED} <= {*told}
    for constant in MOVED:
        assert constant.of(found.profile) == pytest.approx(constant.of(other), rel=0.05), constant.name
    held_out = [row for row in summary(found)["runs"] if row["held_out"]]
    assert len(held_out) == len(runs)
    for row in held_out:
        assert row["step"].median_abs < 0.01
        assert row["window"].median_abs < 0.01


def test_a_run_is_cut_into_parts_without_a_reading_or_a_step_in_both(profile: Profile, runs: list[Path]) -> None:
    (whole,) = read_run(runs[0], profile)
    parts = [whole.part(held_out=held_out, share=0.3, seed=1) for held_out in (False, True)]
    for name in ("use_steps", "use_windows"):
        one, two = (getattr(part, name) for part in parts)
        assert not (one & two).any()
        assert ((one | two) == getattr(whole, name)).all()
    assert 0.1 < parts[1].use_steps.mean() < 0.5


def test_windows_are_shared_among_the_steps_in_them(profile: Profile, other: Profile, runs: list[Path]) -> None:
    (run,) = read_run(runs[0], profile)
    share = run.overlap.sum(axis=1)
    assert (share <= 1 + 1e-12).all()
    assert share.max() == pytest.approx(1.0)
    step, window = run.errors(other)
    assert np.abs(step).max() < 1e-6
    assert np.quantile(np.abs(window), 0.95) < 0.01


def test_a_run_without_a_clock_or_steps_is_one_line(profile: Profile, runs: list[Path], tmp_path: Path) -> None:
    manifest = json.loads((runs[0] / "manifest.json").read_text(encoding="utf-8"))
    write_manifest(tmp_path, manifest)
    with pytest.raises(ReplayError, match=r"has no steps\.parquet"):
        read_run(tmp_path, profile)
    (tmp_path / "steps.parquet").write_bytes((runs[0] / "steps.parquet").read_bytes())
    manifest["instances"][0]["freq_mhz"] = None
    write_manifest(tmp_path, manifest)
    with pytest.raises(ReplayError, match="no TP size or locked clock"):
        read_run(tmp_path, profile)


def spoil(run: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of `run` with another manifest."""
    shutil.copytree(run, to)
    manifest = json.loads((to / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    write_manifest(to, manifest)
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["instances"][0].update(model="Qwen/Qwen3-8B"), "served Qwen/Qwen3-8B, not llama-2-70b; name what"),
        (lambda m: m["instances"][0].update(model=None), "names no model in manifest.json"),
        (lambda m: m["gpus"][0].update(name="NVIDIA H200"), "ran on NVIDIA H200; dgx-h100 has NVIDIA H100 80GB HBM3 "),
        (lambda m: m["gpus"][0].update(name="Simulated NVIDIA H200"), "ran on Simulated NVIDIA H200; dgx-h100 has"),
        (lambda m: m.update(gpus=[]), "ran on a GPU without a name; dgx-h100 has"),
        (lambda m: m["instances"][0].update(power_cap_w=900), "--power-cap 900: a simulated NVIDIA H100"),
    ],
)
def test_a_run_of_another_model_on_other_gpus_or_with_a_cap_that_cannot_be_is_one_line(
    profile: Profile, runs: list[Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = spoil(runs[0], tmp_path / "run", change)
    with pytest.raises(ReplayError) as caught:
        read_data([path], profile, LOAD, holdout=0.2, seed=0)
    assert str(caught.value).startswith(f"--points {path}: run, instance 0")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_with_a_power_cap_is_compared_with_that_cap(profile: Profile, other: Profile, tmp_path: Path) -> None:
    path = write_run(tmp_path / "capped", other, 2, 1900, 400.0)
    (run,) = read_run(path, profile)
    step, window = run.errors(other)
    assert np.abs(step).max() < 1e-6
    assert np.quantile(np.abs(window), 0.95) < 0.01
    step, window = replace(run, cap_w=None).errors(other)
    assert step.min() < -0.1
    assert window.max() > 0.1


def test_constants_fitted_to_simulated_runs_say_so_and_do_not_count_as_calibrated(
    profile: Profile, runs: list[Path], tmp_path: Path
) -> None:
    data = read_data(runs[:1], profile, LOAD, holdout=0.2, seed=0)
    assert data.runs[0].simulated
    measured = Data(data.files, LOAD, runs=tuple(replace(run, simulated=False) for run in data.runs))
    for name, each in {"simulated": data, "measured": measured}.items():
        found = Calibration(profile, Fitted(profile, (), (), 0.0), each, 0.2, 0, None, {})
        path = tmp_path / f"{name}.toml"
        path.write_text(hardware_file(found), encoding="utf-8")
        read = load_profile(str(path), "llama-2-70b")
        assert ("simulated = true" in path.read_text(encoding="utf-8")) == (name == "simulated")
        assert read.calibrated == (name == "measured")
        words = (f"uncalibrated: the constants of {path} were fitted to simulated runs",)
        assert read.assumed == (words if name == "simulated" else ())


def test_a_real_gpu_s_run_is_not_simulated_unless_its_engine_was(
    profile: Profile, runs: list[Path], tmp_path: Path
) -> None:
    def real_gpu(manifest: dict[str, Any]) -> None:
        manifest["gpus"][0]["name"] = profile.gpu_name

    def real(manifest: dict[str, Any]) -> None:
        real_gpu(manifest)
        manifest["engine"] = "vllm"

    assert read_run(spoil(runs[0], tmp_path / "engine", real_gpu), profile)[0].simulated
    assert not read_run(spoil(runs[0], tmp_path / "real", real), profile)[0].simulated


def calibrate_cli(*arguments: object) -> str:
    """What `replay sim calibrate` prints, or the one line that it fails with."""
    found = CliRunner().invoke(app, ["sim", "calibrate", *map(str, arguments)])
    if isinstance(found.exception, ReplayError):
        assert "\n" not in str(found.exception)
        return str(found.exception)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "there.toml"), "-o there.toml: exists already; a hardware file is never overwritten"),
        (("-o", "mine.txt"), "-o mine.txt: name a .toml file"),
        (("-o", "nowhere/mine.toml"), "-o nowhere/mine.toml: there is no folder nowhere"),
        (("-o", "mine.toml", "--no-fit"), "-o with --no-fit: nothing is fitted"),
        (("--plots", "residuals"), "--plots: drawn for a CSV file of points only"),
        (("--leave-clocks-out",), "--leave-clocks-out: done for a CSV file of points only"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_fitted(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    def fitted(*_: object, **__: object) -> None:
        raise AssertionError("it was fitted")

    monkeypatch.setattr("replay.sim.calibrate.fit", fitted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").write_text("mine", encoding="utf-8")
    assert calibrate_cli("--points", runs[0], *arguments).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]
    assert (tmp_path / "there.toml").read_text(encoding="utf-8") == "mine"
