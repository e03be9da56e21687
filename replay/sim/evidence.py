"""What a profile can be held against: operating points, published step times and idle powers.

Residuals are logarithms of simulated over measured, in units of how well a good fit is expected to meet them, so that
kinds of evidence weigh against each other. A run's own steps and sensor windows are in `replay.sim.run_evidence`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.sim.hardware import Hardware
from replay.sim.physics import FloatArray
from replay.sim.points import Load, play, simulate_points, with_outcomes
from replay.sim.profile import Profile
from replay.sim.published import StepTime
from replay.sim.residuals import steady

# What a good fit is expected to leave. TTFTs are P99s of ten to two hundred requests, power ratios means over a run.
_TTFT, _TTFT_RATIO, _POWER, _POWER_RATIO = 0.08, 0.05, 0.04, 0.02
_STEP_TIME = 0.03


@dataclass(frozen=True)
class PointEvidence:
    """Operating points (`replay.sim.points.SCHEMA`): levels of TTFT and power, and ratios to the highest clock.

    Points beyond saturation are left out: they tell how long a queue got. Power counts up to one unknown factor.
    """

    points: pl.DataFrame
    load: Load

    @cached_property
    def kept(self) -> pl.DataFrame:
        """The points below saturation."""
        return self.points.filter(pl.col("steady")) if "steady" in self.points.columns else self.points.filter(steady())

    @cached_property
    def _twins(self) -> npt.NDArray[np.int64]:
        """Rows of `kept` with the row of the same setting at the highest clock, [n, 2]."""
        rows = self.kept.with_row_index("row")
        setting = ("tp", "bucket", "load_rps")
        top = pl.col("sm_clock_mhz") == pl.col("sm_clock_mhz").max()
        pairs = rows.filter(~top).join(rows.filter(top), on=setting, suffix="_top").select("row", "row_top")
        return pairs.to_numpy().astype(np.int64)

    def residuals(self, profile: Profile) -> FloatArray:
        """Simulate the points with `profile`: TTFT, its ratios, power, its ratios."""
        return self._off(simulate_points(profile, self.kept, self.load))

    def near(self, profile: Profile) -> Callable[[Profile], FloatArray]:
        """Residuals with the batches as `profile` forms them: smooth, where a P99 jumps when batches change."""
        played = play(profile, self.kept, self.load)
        return lambda other: self._off(with_outcomes(other, self.kept, played))

    def _off(self, found: pl.DataFrame) -> FloatArray:
        """Residuals of simulated points."""
        ttft = np.log((found["sim_ttft_s"] / found["ttft_s"]).to_numpy())
        power = np.log((found["sim_power_w"] / found["power_like"]).to_numpy())
        point, top = self._twins.T
        return np.concatenate(
            [
                ttft / _TTFT,
                (ttft[point] - ttft[top]) / _TTFT_RATIO,
                (power - np.median(power)) / _POWER,
                (power[point] - power[top]) / _POWER_RATIO,
            ]
        )


@dataclass(frozen=True)
class StepEvidence:
    """Published step times; each weighs like `weight` points."""

    steps: tuple[StepTime, ...]
    weight: float = 20.0

    def residuals(self, profile: Profile) -> FloatArray:
        """How far off the simulated durations are."""
        hardware = {tp: Hardware(profile, tp) for tp in {step.tp for step in self.steps}}
        off = [np.log(step.simulated_ms(hardware[step.tp]) / step.published_ms) for step in self.steps]
        return np.asarray(np.sqrt(self.weight) * np.array(off) / _STEP_TIME)

    def near(self, _profile: Profile) -> Callable[[Profile], FloatArray]:
        """Step times are smooth anyway."""
        return self.residuals
