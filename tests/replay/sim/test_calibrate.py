"""`replay sim calibrate`: known constants come back, held-out data stay unseen, bad files are one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.rundir import POWER, STEPS, write_manifest
from replay.sim.calibrate import calibrate, held_out_points, read_data
from replay.sim.calibration_report import hardware_file, plain, summary
from replay.sim.evidence import PointEvidence, StepEvidence
from replay.sim.fit import Constant, constants_of, fit, with_constants
from replay.sim.hardware import Hardware, Work
from replay.sim.points import SCHEMA, Load, read_points, simulate_points
from replay.sim.profile import Profile, load_profile
from replay.sim.published import step_times
from replay.sim.run_evidence import read_run
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


def settings() -> pl.DataFrame:
    """A few settings, with values to be filled in."""
    rows = [
        (rate, tp, mhz, bucket, 1.0, 1.0)
        for tp in (2, 8)
        for bucket in ("SS", "MM")
        for rate in (1.0, 1.5, 2.0, 2.5)
        for mhz in (800, 1400, 1980)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


@pytest.fixture(scope="module")
def measured(other: Profile) -> pl.DataFrame:
    """What `other` would measure, its power in a unit of 10 W."""
    found = simulate_points(other, settings(), LOAD)
    return found.select(
        "load_rps", "tp", "sm_clock_mhz", "bucket", power_like=pl.col("sim_power_w") / 10, ttft_s=pl.col("sim_ttft_s")
    )


@pytest.fixture(scope="module")
def points_csv(measured: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("points") / "points.csv"
    measured.write_csv(path)
    return path


def test_constants_that_made_points_and_step_times_come_back(
    profile: Profile, other: Profile, measured: pl.DataFrame
) -> None:
    published = step_times(profile)
    steps = tuple(step._replace(published_ms=step.simulated_ms(Hardware(other, step.tp))) for step in published)
    points = PointEvidence(measured, LOAD)
    found = fit(profile, [points, StepEvidence(steps)], list(MOVED))
    for constant, factor in MOVED.items():
        assert constant.of(found.profile) == pytest.approx(factor * constant.of(profile), rel=0.03), constant.name
    assert np.abs(points.residuals(found.profile)).mean() < 0.5 * np.abs(points.residuals(profile)).mean()


def test_the_smooth_stand_in_is_equal_where_it_was_made_and_smooth_around(
    profile: Profile, measured: pl.DataFrame
) -> None:
    points = PointEvidence(measured, LOAD)
    near = points.near(profile)
    assert near(profile) == pytest.approx(points.residuals(profile), abs=1e-4)  # steps end at whole nanoseconds
    efficiency = Constant("time", "compute_efficiency")
    one, two = (near(with_constants(profile, [efficiency], [efficiency.of(profile) * f])) for f in (1.0001, 1.0002))
    slope = (one - near(profile)) / 1e-4
    assert (two - one) / 1e-4 == pytest.approx(slope, rel=0.05, abs=0.5)


def test_a_constant_that_the_points_cannot_tell_stays_and_says_so(profile: Profile, measured: pl.DataFrame) -> None:
    # At one TP size and without a slow clock nothing shows where traffic begins to slow.
    told, untold = Constant("time", "compute_efficiency"), Constant("time", "traffic_knee_mhz")
    fast = measured.filter((pl.col("sm_clock_mhz") == 1980) & (pl.col("tp") == 8) & (pl.col("bucket") == "SS"))
    found = fit(profile, [PointEvidence(fast, LOAD)], [told, untold])
    errors = dict(zip(found.constants, found.error_rel, strict=True))
    assert errors[untold] > 5 * errors[told]
    assert untold.of(found.profile) == pytest.approx(untold.of(profile), rel=0.1)


def test_held_out_points_do_not_change_the_fit(
    profile: Profile, points_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.sim.calibrate.constants_of", lambda _: [Constant("power", "awake_w")])
    data = read_data([points_csv], profile, LOAD, holdout=0.25, seed=3)
    assert data.points is not None
    spoilt = tmp_path / "spoilt.csv"
    factor = pl.when(data.points["held_out"]).then(1.5).otherwise(1.0)
    data.points.with_columns(pl.col("power_like") * factor).select(list(SCHEMA)).write_csv(spoilt)
    again = read_data([spoilt], profile, LOAD, holdout=0.25, seed=3)
    one, two = (calibrate(profile, each, holdout=0.25, seed=3) for each in (data, again))
    assert one.profile == two.profile
    ratios = [summary(each)["ratios"] for each in (one, two)]
    assert ratios[0]["fitted"] == ratios[1]["fitted"]


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_the_rates_is_held_out_whole_and_spread_over_the_cells(seed: int) -> None:
    rows = [
        (0.5 * rate, tp, mhz, bucket, 1.0, 1.0)
        for tp in (2, 4, 8)
        for bucket in ("SS", "SM", "LL")
        for rate in range(1, 11)
        for mhz in (800, 1980)
    ]
    points = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    marked = points.with_columns(held_out=held_out_points(points, 0.2, seed))
    by_setting = marked.group_by("tp", "bucket", "load_rps").agg(pl.col("held_out").n_unique())
    assert by_setting["held_out"].to_list() == [1] * by_setting.height
    assert set(marked.group_by("tp", "bucket").agg(pl.col("held_out").mean())["held_out"]) == {0.2}


def test_nothing_is_held_out_of_a_share_of_zero(measured: pl.DataFrame) -> None:
    assert not held_out_points(measured, 0.0, 0).any()


def test_the_written_hardware_file_simulates_as_the_fit_did(
    profile: Profile, other: Profile, points_csv: Path, tmp_path: Path
) -> None:
    data = read_data([points_csv], profile, LOAD, holdout=0.2, seed=0)
    found = replace(calibrate(profile, data, holdout=0.2, seed=0, refit=False), before=other)
    path = tmp_path / "mine.toml"
    path.write_text(hardware_file(found), encoding="utf-8")
    read = load_profile(str(path), "llama-2-70b")
    assert read.calibrated
    work = Work(1000.0, 12.0, 9000.0, 500_000.0)
    for mhz in (800.0, 1500.0, 1980.0):
        assert Hardware(read, 4).step_j(work, mhz) == pytest.approx(Hardware(other, 4).step_j(work, mhz), rel=1e-4)
    assert json.loads(json.dumps(plain(summary(found)), allow_nan=False))["calibration"]["points"] == 48


def write_run(path: Path, profile: Profile, tp: int, clock_mhz: int) -> Path:
    """A run of mixed steps as `profile` would take them, its sensors ideal: windows of 25 ms every 100 ms."""
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
            "instances": [{"instance": 0, "host": "here", "gpus": [0], "tp": tp, "freq_mhz": clock_mhz}],
            "gpus": [{"host": "here", "gpu": 0, "sensors": sensors}],
        },
    )
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


HEADER = ",".join(SCHEMA)
GOOD = "0.5,2,800,SS,50,0.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("load_rps,tp\n1,2\n", "lacks the columns sm_clock_mhz, bucket, power_like, ttft_s"),
        (f"{HEADER}\n", "holds no points"),
        (f"{HEADER}\n{GOOD}\n1.0,2,800,SS,x,0.2\n", "row 3: power_like must be a number above 0"),
        (f"{HEADER}\n1.0,2,800,SS,50,-1\n", "row 2: ttft_s must be a number above 0"),
        (f"{HEADER}\n1.0,2,800,XS,50,0.2\n", "row 2: bucket must be two of S, M, L"),
        (f"{HEADER}\n0.01,2,800,SS,50,0.2\n", "row 2: no request arrives at this rate"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", "row 3: a point that was there before"),
        (f"{HEADER}\n1.0,3,800,SS,50,0.2\n", "has TP 3, at which llama-2-70b on dgx-h100 cannot run"),
        (f"{HEADER}\n1.0,2,8000,SS,50,0.2\n", "has 8000 MHz"),
        ("", "cannot be read"),
    ],
)
def test_bad_points_are_one_line(profile: Profile, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReplayError, match=message) as caught:
        read_data([path], profile, Load(), holdout=0.2, seed=0)
    assert "\n" not in str(caught.value)


def test_points_and_runs_do_not_mix(profile: Profile, points_csv: Path, runs: list[Path]) -> None:
    with pytest.raises(ReplayError, match="one CSV file, or run directories only"):
        read_data([points_csv, runs[0]], profile, LOAD, holdout=0.2, seed=0)


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


def test_the_published_arrivals_are_the_source_s(tmp_path: Path) -> None:
    # numpy's legacy generator with seed 100: the first gap is -ln(1 - 0.5434...) of the mean.
    arrivals_s = Load().arrivals_ns(0.5) / 1e9
    assert arrivals_s[0] == pytest.approx(-2 * np.log(1 - 0.54340494), abs=1e-6)
    assert arrivals_s[-1] < 20
    assert (np.diff(arrivals_s) > 0).all()


def test_a_long_prompt_ends_at_the_models_context() -> None:
    assert [Load().tokens(bucket) for bucket in ("SS", "ML", "LS", "LL")] == [
        (467, 96),
        (1010, 600),
        (4085, 11),
        (4085, 11),
    ]


def test_constants_given_by_data_sheets_are_not_fitted(profile: Profile) -> None:
    names = {constant.name for constant in constants_of(profile)}
    assert {"time.compute_efficiency", "power.awake_w"} <= names
    assert names.isdisjoint({"time.peak_flops", "time.memory_bytes_per_s", "power.cap_w", "power.idle_unloaded_w"})


def test_read_points_takes_columns_in_any_order_and_drops_others(points_csv: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "points.csv"
    pl.read_csv(points_csv).select(pl.lit(1).alias("more"), *reversed(list(SCHEMA))).write_csv(shuffled)
    assert read_points(shuffled, LOAD).equals(read_points(points_csv, LOAD))
