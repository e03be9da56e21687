"""Calibrate a profile: fit its constants to measured points or to runs, hold a part out, and say what is left over.

Points are a CSV file (`replay.sim.points`): each is simulated in virtual time. Run directories need no simulation
(`replay.sim.run_evidence`). A share of the data is held out: the fit never sees it, and residuals are given for both.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from replay.sim.evidence import PointEvidence, StepEvidence
from replay.sim.fit import Evidence, Fitted, constants_of, fit
from replay.sim.points import Load, read_points, simulate_points
from replay.sim.profile import Profile
from replay.sim.published import step_times
from replay.sim.residuals import Spread, steady
from replay.sim.run_evidence import RunEvidence, read_run
from tracegen.errors import ReplayError

_SETTING = ("tp", "bucket", "load_rps")
Progress = Callable[[str, int, float], None]  # what is being fitted, which round, its best cost


class Data(NamedTuple):
    """What to calibrate on: points of one file, or the instances of run directories."""

    files: tuple[Path, ...]
    load: Load
    points: pl.DataFrame | None = None  # with `steady` and `held_out`
    runs: tuple[RunEvidence, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A fit and what it leaves."""

    before: Profile
    fitted: Fitted | None  # none: only compared
    data: Data
    holdout: float
    seed: int
    points: pl.DataFrame | None  # simulated with the fitted constants
    left_out: dict[int, pl.DataFrame]  # by clock: its points, simulated by a fit that had none at this clock

    @property
    def profile(self) -> Profile:
        """The constants to use."""
        return self.fitted.profile if self.fitted else self.before


def read_data(files: Sequence[Path], profile: Profile, load: Load, *, holdout: float, seed: int) -> Data:
    """The CSV file or the run directories `files`, with what is held out marked.

    Raises `ReplayError` for files that are neither, for a mixture, and for points that `profile` cannot run.
    """
    if not files:
        raise ReplayError("--points: name a CSV file of points or a run directory")
    folders = [path.is_dir() for path in files]
    if all(folders):
        return Data(tuple(files), load, runs=tuple(run for path in files for run in read_run(path, profile)))
    if any(folders) or len(files) > 1:
        raise ReplayError("--points: give one CSV file, or run directories only")
    points = read_points(files[0], load)
    unable = sorted(set(points["tp"]) - set(profile.tp_sizes()))
    if unable:
        raise ReplayError(f"--points {files[0]}: has TP {unable[0]}, at which {profile.name} cannot run")
    low_mhz, high_mhz, _ = profile.clocks_mhz
    outside = points.filter(~pl.col("sm_clock_mhz").is_between(low_mhz, high_mhz))
    if outside.height:
        mhz = outside["sm_clock_mhz"][0]
        raise ReplayError(f"--points {files[0]}: has {mhz} MHz; {profile.gpu_name} runs at {low_mhz}-{high_mhz} MHz")
    marked = points.with_columns(steady().alias("steady"), held_out_points(points, holdout, seed).alias("held_out"))
    return Data(tuple(files), load, points=marked)


def held_out_points(points: pl.DataFrame, share: float, seed: int) -> pl.Series:
    """Which points to hold out: `share` of the rates of each TP and bucket, drawn with `seed`, at all clocks.

    A ratio between two clocks is then of two points that are both held out or both not.
    """
    settings = points.select(_SETTING).unique().sort(_SETTING)
    rng = np.random.default_rng(seed)
    settings = settings.with_columns(pl.Series("draw", rng.random(settings.height))).sort("tp", "bucket", "draw")
    # Every 1/share-th along the cells, so that small cells have their part too.
    place = (np.arange(settings.height) + rng.random()) * share
    settings = settings.with_columns(pl.Series("held_out", np.floor(place + share) > np.floor(place)))
    return points.join(settings, on=_SETTING, how="left", maintain_order="left")["held_out"]


def calibrate(
    profile: Profile,
    data: Data,
    *,
    holdout: float,
    seed: int,
    refit: bool = True,
    leave_clocks_out: bool = False,
    progress: Progress = lambda _what, _round, _cost: None,
) -> Calibration:
    """Fit `profile` to `data` without what is held out, and simulate everything with the outcome.

    `leave_clocks_out` also fits once without each clock but the highest, to see how a clock is met that was not
    measured. Raises `ReplayError` when that is asked of runs.
    """
    if leave_clocks_out and data.points is None:
        raise ReplayError("--leave-clocks-out: done for a CSV file of points only; leave out runs at a clock instead")
    fitted = None
    if refit:
        evidence = _evidence(profile, data, holdout, seed)
        fitted = fit(profile, evidence, constants_of(profile), progress=lambda n, cost: progress("all clocks", n, cost))
    best = fitted.profile if fitted else profile
    simulated = None if data.points is None else simulate_points(best, data.points, data.load)
    left_out = {}
    if leave_clocks_out and data.points is not None:  # which the first lines made sure of
        for mhz in sorted(set(data.points["sm_clock_mhz"]))[:-1]:
            left_out[mhz] = _without(profile, data, mhz, progress)
    return Calibration(profile, fitted, data, holdout, seed, simulated, left_out)


def _evidence(profile: Profile, data: Data, holdout: float, seed: int) -> list[Evidence]:
    """What is fitted to: everything that is not held out."""
    if data.points is None:
        return [run.part(held_out=False, share=holdout, seed=seed) for run in data.runs]
    fitted_steps = tuple(step for step in step_times(profile) if step.fitted)
    points = PointEvidence(data.points.filter(~pl.col("held_out")), data.load)
    return [points, StepEvidence(fitted_steps)] if fitted_steps else [points]


def _without(profile: Profile, data: Data, mhz: int, progress: Progress) -> pl.DataFrame:
    """The points at `mhz` and at the highest clock, simulated by a fit to the points at all clocks but `mhz`."""
    assert data.points is not None
    others = PointEvidence(data.points.filter(pl.col("sm_clock_mhz") != mhz), data.load)
    steps = tuple(step for step in step_times(profile) if step.fitted and step.clock_mhz != mhz)
    evidence: list[Evidence] = [others, StepEvidence(steps)] if steps else [others]
    found = fit(
        profile, evidence, constants_of(profile), progress=lambda n, cost: progress(f"without {mhz} MHz", n, cost)
    )
    top = data.points["sm_clock_mhz"].max()
    return simulate_points(found.profile, data.points.filter(pl.col("sm_clock_mhz").is_in([mhz, top])), data.load)


def run_spreads(calibration: Calibration) -> list[dict[str, Any]]:
    """How far off durations and power windows of runs are, fitted and held out, one row an instance and part."""
    rows = []
    for run in calibration.data.runs:
        for held_out in (False, True):
            part = run.part(held_out=held_out, share=calibration.holdout, seed=calibration.seed)
            step, window = (Spread.of(pl.Series(errors)) for errors in part.errors(calibration.profile))
            rows.append({"run": run.name, "held_out": held_out, "step": step, "window": window})
    return rows


def provenance(calibration: Calibration) -> dict[str, Any]:
    """What `[calibration]` of a hardware file says: fitted to what and when, `simulated` if any run of it was."""
    data = calibration.data
    document: dict[str, Any] = {
        "models": [calibration.profile.model_name],
        "files": [path.name for path in data.files],
        "sha256": [_digest(path) for path in data.files],
        "date": datetime.now(UTC).date().isoformat(),
        "held_out_share": calibration.holdout,
        "seed": calibration.seed,
    }
    if data.points is not None:
        document["points"] = data.points.height
        document["held_out_points"] = int(data.points["held_out"].sum())
    else:
        if any(run.simulated for run in data.runs):
            document["simulated"] = True
        document["steps"] = sum(int(run.use_steps.sum()) for run in data.runs)
        document["windows"] = sum(int(run.use_windows.sum()) for run in data.runs)
    return document


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a run, of its steps.parquet."""
    file = path / "steps.parquet" if path.is_dir() else path
    if file.is_dir():
        return "of parts"
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
