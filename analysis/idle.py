"""Power at rest: measured before and after the run, model loaded and clock locked; never fitted.

On a busy engine idle power cannot be told from the cost of a step, so a fit of both finds neither. Between the two
measurements it goes in a straight line, as with temperature; where the clock was changed in between it jumps there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
CONTRADICTS_S, CONTRADICTS_REL = 5.0, 0.05  # so much idleness that is so far off speaks against a baseline
SOURCES = ("counter", "instant", "average")


@dataclass(frozen=True)
class Idle:
    """Idle power of one GPU from `before_w` at the window's start to `after_w` at its end, W, with its error."""

    before_w: float
    after_w: float
    se_w: float
    source: str
    why: str | None = None  # why it is not the baseline of the energy's own source
    changes_s: tuple[float, ...] = ()  # when the clock was changed
    levels_w: tuple[float, ...] = ()  # before the first change, between each two and after the last

    def at(self, t_s: Floats, duration_s: float) -> Floats:
        """Idle power at `t_s`, W."""
        if self.changes_s:
            return np.asarray(np.array(self.levels_w)[np.searchsorted(self.changes_s, t_s, side="right")])
        passed = np.clip(t_s / duration_s, 0.0, 1.0)
        return np.asarray(self.before_w + (self.after_w - self.before_w) * passed)


def idle_power(
    gpu: GpuData,
    source: str,
    curve: Curve,
    steps: Sequence[Steps],
    duration_s: float,
    path: str,
    *,
    changes_s: Sequence[float] = (),
) -> Idle:
    """Idle power of `gpu` as `source` reads it: from the manifest, else from the run's own idle stretches.

    `steps` are those of every instance that uses the GPU; `changes_s` when its clock was changed for long. Raises
    `AnalysisError` when neither baseline nor idle stretch is there.
    """
    told = _from_manifest(gpu, source)
    idle = (
        _from_run(gpu, curve, steps, duration_s, path)
        if told is None
        else _against_run(gpu, told, curve, steps, duration_s)
    )
    return _by_clock(gpu, idle, curve, steps, duration_s, changes_s) if len(changes_s) else idle


def _from_manifest(gpu: GpuData, source: str) -> Idle | None:
    """The baseline, by `source` where there is one."""
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
    return None


def _against_run(gpu: GpuData, idle: Idle, curve: Curve, steps: Sequence[Steps], duration_s: float) -> Idle:
    """`idle`, less certain and with a remark where the run's own idle stretches contradict it."""
    stretches = _stretches(steps, 0.0, duration_s)
    if not stretches:
        return idle
    level_w, seconds = _mean_w(curve, stretches)
    told_w = float(np.mean([np.mean(idle.at(np.array(ends), duration_s)) for ends in stretches]))
    off_w = abs(level_w - told_w)
    if seconds < CONTRADICTS_S or off_w <= max(3 * idle.se_w, CONTRADICTS_REL * told_w):
        return idle
    said = (
        f"{gpu.name}: the manifest's idle power is {told_w:,.1f} W, but {seconds:.0f} s without a request show "
        f"{level_w:,.1f} W; what is left over goes to idle time first"
    )
    return replace(idle, se_w=off_w, why="; ".join(text for text in (idle.why, said) if text))


def _from_run(gpu: GpuData, curve: Curve, steps: Sequence[Steps], duration_s: float, path: str) -> Idle:
    """What the run's own idle stretches show."""
    stretches = _stretches(steps, 0.0, duration_s)
    if not stretches:
        raise AnalysisError(
            f"{path}/{MANIFEST}: {gpu.name} has no idle_power_w, and the run has no idle stretch of "
            f"{LEAST_STRETCH_S:.0f} s to measure it in; add idle_power_w to the manifest's 'gpus'"
        )
    level, seconds = _mean_w(curve, stretches)
    why = f"{gpu.name}: no idle_power_w in the manifest, measured in {seconds:.1f} s of the run's own idleness"
    return Idle(level, level, UNKNOWN_REL * level, curve.source, why)


def _by_clock(
    gpu: GpuData,
    idle: Idle,
    curve: Curve,
    steps: Sequence[Steps],
    duration_s: float,
    changes_s: Sequence[float],
) -> Idle:
    """`idle` with a level for each clock: the baselines' at either end, else the run's own idleness at that clock.

    A clock of which neither is known has the level of the one before, which `why` says.
    """
    cuts_s = [0.0, *changes_s, duration_s]
    levels: list[float] = []
    guessed = []
    for k, (start_s, end_s) in enumerate(pairwise(cuts_s)):
        # A baseline before the run is of the first clock, one after it of the last.
        if k == 0 and (idle.source in gpu.idle_before_w or not gpu.idle_after_w):
            levels.append(idle.before_w)
        elif k == len(changes_s) and idle.source in gpu.idle_after_w:
            levels.append(idle.after_w)
        elif stretches := _stretches(steps, start_s, end_s):
            levels.append(_mean_w(curve, stretches)[0])
        else:
            levels.append(levels[-1] if levels else idle.before_w)
            guessed.append(f"{start_s:.0f} s")
    # Each level is known as well as a baseline taken once.
    se_w = UNKNOWN_REL * float(np.mean(levels))
    said = f"{gpu.name}: idle power at the clock from {', '.join(guessed)} on was not measured" if guessed else None
    why = "; ".join(text for text in (idle.why, said) if text) or None
    return replace(idle, se_w=se_w, why=why, changes_s=tuple(map(float, changes_s)), levels_w=tuple(levels))


def _mean_w(curve: Curve, stretches: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean power over `stretches`, W, and how long they are, s."""
    seconds = sum(b - a for a, b in stretches)
    return sum(curve.between(a, b) for a, b in stretches) / seconds, seconds


def _stretches(steps: Sequence[Steps], from_s: float, until_s: float) -> list[tuple[float, float]]:
    """Stretches between two times in which the GPU did nothing for anybody, less the time to settle."""
    start_s = np.concatenate([s.start_s for s in steps] or [np.zeros(0)])
    end_s = np.concatenate([s.end_s for s in steps] or [np.zeros(0)])
    order = np.argsort(start_s, kind="stable")
    begin = np.clip(np.maximum.accumulate(np.concatenate([[from_s], end_s[order]])), from_s, until_s)
    finish = np.clip(np.concatenate([start_s[order], [until_s]]), from_s, until_s)
    long = np.flatnonzero(finish - begin >= LEAST_STRETCH_S)
    return [(float(begin[i]) + SETTLE_S, float(finish[i])) for i in long]
