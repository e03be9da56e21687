"""Steps that a power cap held back: which they are, and how much longer they take for it.

Where a step would draw more than the board may, the clock falls until it does not, and the step takes longer. What such
a step says of durations and power is not what a part of it would have cost: with fewer requests in it, it would have
run at full clock. So power is fitted on steps that ran free, and one exponent on the others: compute takes
(power without the cap / cap)^exponent times as long. Durations are fitted on both, compute in held steps being slower
as the clock was that was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.load import Floats, GpuData
from analysis.model import Model, soft_max
from analysis.steps import Bools, Ints, Steps
from analysis.timeline import Windows

# NVML's nvmlClocksEventReasonSwPowerCap and ...HwPowerBrakeSlowdown.
POWER_REASONS = 0x4 | 0x80
UNKNOWN, FREE, HELD = -1, 0, 1
LEAST_HELD = 50  # steps; of fewer the exponent is chance, and they matter little
EXPONENTS = np.linspace(0.0, 2.0, 201)  # power rises with the clock at least as fast as compute, often faster


@dataclass(frozen=True)
class Holding:
    """Of each step (n,) whether a power cap held it, and its clock over the clock of free steps; 1 where not known."""

    state: Ints  # HELD, FREE, or UNKNOWN where no GPU was read within it
    clock_rel: Floats

    def at(self, rows: Bools) -> "Holding":
        """Of the steps at `rows`."""
        return Holding(self.state[rows], self.clock_rel[rows])


def held_back(gpus: Sequence[GpuData], steps: Steps) -> Holding:
    """What the readings of `gpus` within each step say of its clock and why it was held."""
    state, clock_mhz = np.full(len(steps), UNKNOWN, dtype=np.int64), np.full(len(steps), np.inf)
    for gpu in gpus:
        if not gpu.throttle_reasons.size:
            continue
        k = np.searchsorted(steps.end_s, gpu.t_s)
        inside = (k < len(steps)) & np.isfinite(gpu.throttle_reasons)
        inside[inside] = steps.end_s[k[inside]] - steps.measured_s[k[inside]] <= gpu.t_s[inside]
        # Bits above 2^32 are none that NVML names, and the highest fits no signed integer.
        reasons = np.mod(gpu.throttle_reasons[inside], 2.0**32).astype(np.int64)
        np.maximum.at(state, k[inside], np.where(reasons & POWER_REASONS, HELD, FREE))
        read_mhz = gpu.sm_clock_mhz[inside]
        np.minimum.at(clock_mhz, k[inside], np.where(read_mhz > 0, read_mhz, np.inf))
    free_mhz = clock_mhz[(state == FREE) & np.isfinite(clock_mhz)]
    clock_rel = np.ones(len(steps))
    if free_mhz.size:
        slow = (state == HELD) & (clock_mhz < np.median(free_mhz))
        clock_rel[slow] = clock_mhz[slow] / np.median(free_mhz)
    return Holding(state, clock_rel)


def windows_within(window: Windows, idle_w: Floats, steps: Steps, chosen: Bools) -> tuple[Windows, Floats]:
    """The windows, and idle power in them, in which there were `chosen` (n,) of the steps and no others."""
    first = np.searchsorted(steps.end_s, window.start_s, side="right")
    last = np.searchsorted(steps.start_s, window.end_s, side="left")
    others = np.concatenate([[0], np.cumsum(~chosen)])
    rows = (last > first) & (others[np.maximum(last, first)] == others[first])
    arrays = (window.start_s[rows], window.end_s[rows], window.watts[rows])
    return Windows(window.source, *arrays), idle_w[rows]


def with_cap(model: Model, capped: Steps, cap_w: float) -> Model:
    """`model`, fitted on free steps, held to `cap_w` above idle power as the `capped` steps were."""
    z = model.columns(capped.work)
    c, a, b = model.times(z)
    over = np.maximum(model.watts(z) / cap_w, 1.0)
    missed = [
        float(np.mean(np.log((c + soft_max(a * over**e, b, model.exponent)) / capped.measured_s) ** 2))
        for e in EXPONENTS
    ]
    return replace(model, cap_w=cap_w, slows=float(EXPONENTS[int(np.argmin(missed))]))
