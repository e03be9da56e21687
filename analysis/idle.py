"""Power at rest: measured before and after the run, model loaded and clock locked; never fitted.

On a busy engine idle power cannot be told from the cost of a step, so a fit of both finds neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.load import Floats, GpuData
from analysis.steps import Steps
from analysis.timeline import Curve
from replay.rundir import MANIFEST
from tracegen.errors import AnalysisError

LEAST_STRETCH_S = 2.0  # of the run's own idleness, where no baseline was taken
SETTLE_S = 0.5  # sensor and board come to rest
UNKNOWN_REL = 0.02  # how far idle power is trusted when it was measured once
KNOWN_REL = 0.005  # and when it was measured before and after
SOURCES = ("counter", "instant", "average")


@dataclass(frozen=True)
class Idle:
    """Idle power of one GPU from `before_w` at the window's start to `after_w` at its end, W, with its error."""

    before_w: float
    after_w: float
    se_w: float
    source: str
    why: str | None = None  # why it is not the baseline of the energy's own source

    def at(self, t_s: Floats, duration_s: float) -> Floats:
        """Idle power at `t_s`, W."""
        return np.interp(t_s, [0.0, duration_s], [self.before_w, self.after_w])


def idle_power(gpu: GpuData, source: str, curve: Curve, steps: Sequence[Steps], duration_s: float, path: str) -> Idle:
    """Idle power of `gpu` as `source` reads it: from the manifest, else from the run's own idle stretches.

    Raises `AnalysisError` when neither is there.
    """
    for other in sorted(SOURCES, key=lambda s: s != source):
        before, after = gpu.idle_before_w.get(other), gpu.idle_after_w.get(other)
        known = [w for w in (before, after) if w is not None]
        if not known:
            continue
        first, last = known[0], known[-1]
        level = (first + last) / 2
        se_w = max(abs(last - first) / 2, (KNOWN_REL if len(known) > 1 else UNKNOWN_REL) * level)
        why = None if other == source else f"{gpu.name}: no idle power from the {source}, taken from {other}"
        return Idle(first, last, se_w, other, why)
    stretches = _stretches(steps, duration_s)
    if not stretches:
        raise AnalysisError(
            f"{path}/{MANIFEST}: {gpu.name} has no idle_power_w, and the run has no idle stretch of "
            f"{LEAST_STRETCH_S:.0f} s to measure it in; add idle_power_w to the manifest's 'gpus'"
        )
    seconds = sum(b - a for a, b in stretches)
    level = sum(curve.between(a, b) for a, b in stretches) / seconds
    why = f"{gpu.name}: no idle_power_w in the manifest, measured in {seconds:.1f} s of the run's own idleness"
    return Idle(level, level, UNKNOWN_REL * level, curve.source, why)


def _stretches(steps: Sequence[Steps], duration_s: float) -> list[tuple[float, float]]:
    """Idle stretches of the window in which the engine did nothing, less the time to settle."""
    start_s = np.concatenate([s.start_s for s in steps] or [np.zeros(0)])
    end_s = np.concatenate([s.end_s for s in steps] or [np.zeros(0)])
    begin = np.concatenate([[0.0], np.maximum(end_s, 0.0)])
    finish = np.concatenate([np.minimum(start_s, duration_s), [duration_s]])
    return [(float(a) + SETTLE_S, float(b)) for a, b in zip(begin, finish, strict=True) if b - a >= LEAST_STRETCH_S]
