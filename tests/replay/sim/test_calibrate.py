"""`replay sim calibrate`: known constants come back, held-out data stay unseen, bad files are one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from replay.cli import app
from replay.sim.calibrate import Calibration, Data, calibrate, held_out_points, read_data
from replay.sim.calibration_report import hardware_file, plain, summary
from replay.sim.evidence import PointEvidence, StepEvidence
from replay.sim.fit import UNTOLD, Constant, constants_of, fit, with_constants
from replay.sim.hardware import Hardware, Work
from replay.sim.points import SCHEMA, Load, read_points, simulate_points
from replay.sim.profile import Profile, load_profile
from replay.sim.published import step_times
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
    assert errors[untold] >= UNTOLD > 5 * errors[told]
    assert untold.of(found.profile) == untold.of(profile)
    assert told.of(found.profile) < 0.95 * told.of(profile)
    data = Data((), LOAD, points=fast.with_columns(steady=True, held_out=False))
    shown = Calibration(profile, found, data, 0.0, 0, simulate_points(found.profile, data.points, LOAD), {})
    lines = hardware_file(shown).splitlines()
    assert f"traffic_knee_mhz = {untold.of(profile)}  # as in dgx-h100: not told by the data" in lines
    assert [line.split(" = ")[0] for line in lines if "  # [fitted]" in line] == ["compute_efficiency"]


class Nothing:
    """Evidence that no constant changes."""

    def residuals(self, _profile: Profile) -> np.ndarray:
        return np.ones(3)

    def near(self, _profile: Profile) -> Callable[[Profile], np.ndarray]:
        return self.residuals


class Product:
    """Evidence of how fast the GPUs' arithmetic and links are, multiplied, and of nothing else."""

    def residuals(self, profile: Profile) -> np.ndarray:
        speed = profile.time.compute_efficiency * profile.time.link_bytes_per_s
        return 100 * np.log(np.array([1.1, 1.1, 1.1]) * 0.779 * 163e9 / speed)

    def near(self, _profile: Profile) -> Callable[[Profile], np.ndarray]:
        return self.residuals


def test_of_two_constants_that_show_only_as_a_product_one_stays_and_the_other_makes_up_for_it(profile: Profile) -> None:
    pair = [Constant("time", "compute_efficiency"), Constant("time", "link_bytes_per_s")]
    found = fit(profile, [Product()], pair)
    moved = [constant.of(found.profile) != constant.of(profile) for constant in pair]
    assert sorted(moved) == [False, True]
    assert [error < UNTOLD for error in found.error_rel] == moved
    assert np.abs(Product().residuals(found.profile)).max() < 0.1


def test_evidence_that_tells_nothing_leaves_every_constant_exactly_where_it_was(other: Profile) -> None:
    found = fit(other, [Nothing()], constants_of(other))
    assert found.profile == other
    assert min(found.error_rel) >= UNTOLD


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


def test_points_and_runs_do_not_mix(profile: Profile, points_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="one CSV file, or run directories only"):
        read_data([points_csv, tmp_path], profile, LOAD, holdout=0.2, seed=0)


def calibrate_cli(*arguments: object) -> str:
    """What `replay sim calibrate` prints, or the one line that it fails with."""
    found = CliRunner().invoke(app, ["sim", "calibrate", *map(str, arguments)])
    if isinstance(found.exception, ReplayError):
        assert "\n" not in str(found.exception)
        return str(found.exception)
    assert found.exit_code == 0, found.output
    return found.output


def test_plots_into_a_file_are_refused(points_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert calibrate_cli("--points", points_csv, "--plots", tmp_path / "file").endswith("is a file; name a folder")


def test_a_single_point_is_compared_and_says_that_there_is_no_ratio(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8")
    shown = calibrate_cli("--points", path, "--no-fit", "--plots", tmp_path / "plots")
    assert "none: no point below saturation has one at the highest clock" in shown
    document = json.loads(calibrate_cli("--points", path, "--no-fit", "--json"))
    assert (document["ratios"], document["ratios_by_tp_and_clock"]) == ({}, [])


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
