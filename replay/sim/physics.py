"""The duration and the power of one engine step, compiled: the formulas of `docs/simulator.md`.

`replay.sim.hardware` makes the constants from a profile and applies the formulas to one step or to arrays.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.compiled import compiled, inlined

FloatArray = npt.NDArray[np.float64]

_CAP_ITERATIONS = 8  # secant steps at most; the capped power is then the cap to rounding
_CAP_CLOSE = 1e-13  # of the cap


class Constants(NamedTuple):
    """What a step's time and power follow from: seconds at the boost clock on one GPU of the group, and watts."""

    # Arithmetic
    flops_token_s: float
    flops_attention_s: float  # for each token of `prefill_attention` and `context_tokens`
    # Memory traffic
    weights_s: float
    kv_token_s: float  # for each token written or read
    # What does not overlap
    exchange_token_s: float  # all-reduce
    sync_s: float
    launch_s: float
    sequence_s: float  # for each decode token
    # How they depend on the clock
    boost_mhz: float
    sustained_mhz: float
    knee: float  # fraction of the boost clock
    knee_sharpness: float
    overlap_sharpness: float
    # Power of one GPU, W
    cap_w: float
    idle_unloaded_w: float
    idle_loaded_w: float
    idle_exponent: float
    awake_w: float
    core_w: float
    memory_w: float
    memory_exponent: float
    compute_w: float
    compute_exponent: float
    voltage_rise: float
    voltage_mhz: float
    voltage_width_mhz: float


class AtClock(NamedTuple):
    """What of the formulas depends on the clock alone."""

    x: float  # fraction of the boost clock
    slower: float  # what memory traffic takes longer
    always_w: float  # power of a step without work in it
    compute_w: float  # of full arithmetic, above that


class Response(NamedTuple):
    """A step's outcome."""

    duration_s: float
    gpu_w: float  # of one GPU
    clock_mhz: float  # that it really ran at
    capped: bool  # whether the power cap held the clock down


class Thermal(NamedTuple):
    """How a GPU warms up, and what it then leaks (`replay.sim.profile.ThermalModel`)."""

    ambient_c: float
    resistance_c_per_w: float
    time_constant_s: float
    leakage_per_c: float
    reference_c: float


class _Demand(NamedTuple):
    """The parts of a step's time at the boost clock, s."""

    compute_s: float
    memory_s: float
    exchange_s: float
    fixed_s: float


@inlined
def idle_w(c: Constants, clock_mhz: float) -> float:
    """Power of one GPU with the model loaded that does nothing, W, with the clock locked to `clock_mhz`."""
    x = min(clock_mhz, c.sustained_mhz) / c.boost_mhz
    return c.idle_unloaded_w + c.idle_loaded_w * x**c.idle_exponent


@inlined
def at_lock(c: Constants, clock_mhz: float) -> AtClock:
    """The clock's part of the formulas, at the highest clock that is held with the lock at `clock_mhz`."""
    return _at(c, min(clock_mhz, c.sustained_mhz) / c.boost_mhz)


@inlined
def _at(c: Constants, x: float) -> AtClock:
    slower = (1.0 + (c.knee / x) ** c.knee_sharpness) ** (1.0 / c.knee_sharpness)  # 1 above the knee, knee / x below
    idle = c.idle_unloaded_w + c.idle_loaded_w * x**c.idle_exponent
    switching = x * _voltage_squared(c, x * c.boost_mhz) / _voltage_squared(c, c.boost_mhz)
    return AtClock(x, slower, idle + c.awake_w + c.core_w * switching, c.compute_w * switching)


@inlined
def _voltage_squared(c: Constants, clock_mhz: float) -> float:
    """The square of the cores' voltage over its floor: it ramps up between a floor and a ceiling."""
    return 1.0 + c.voltage_rise / (1.0 + np.exp((c.voltage_mhz - clock_mhz) / c.voltage_width_mhz))


@inlined
def step(
    c: Constants, at: AtClock, hot: float, prefill: float, decode: float, context: float, attention: float
) -> Response:
    """A step of this work (as in `steps.parquet`) at the lock `at`; no work is still a pass over the weights.

    `hot` multiplies the power: what leakage adds (`heat`). When a GPU would exceed its power cap, its clock falls
    until it does not, and the step takes longer.
    """
    tokens = prefill + decode
    demand = _Demand(
        c.flops_token_s * tokens + c.flops_attention_s * (attention + context),
        c.weights_s + c.kv_token_s * (context + tokens),
        c.exchange_token_s * tokens,
        c.launch_s + c.sequence_s * decode,
    )
    duration_s, gpu_w = _respond(c, at, hot, demand)
    if gpu_w <= c.cap_w:
        return Response(duration_s, gpu_w, at.x * c.boost_mhz, False)
    # Power grows with the clock nearly as a power law: a secant in log-log converges in a few steps.
    target = np.log(c.cap_w)
    x0, y0 = np.log(at.x), np.log(gpu_w) - target
    x1 = x0 - y0  # as if power were proportional to the clock
    for _ in range(_CAP_ITERATIONS):
        duration_s, gpu_w = _respond(c, _at(c, np.exp(x1)), hot, demand)
        y1 = np.log(gpu_w) - target
        if abs(y1) < _CAP_CLOSE or y1 == y0:
            break
        x0, y0, x1 = x1, y1, x1 - y1 * (x1 - x0) / (y1 - y0)
    return Response(duration_s, gpu_w, np.exp(x1) * c.boost_mhz, True)


@inlined
def _respond(c: Constants, at: AtClock, hot: float, demand: _Demand) -> tuple[float, float]:
    """Duration, s, and power of one GPU, W, at the clock `at`, without the cap."""
    p = c.overlap_sharpness
    compute_s, memory_s = demand.compute_s / at.x, demand.memory_s * at.slower
    # (a^p + b^p)^(1/p), one power less
    high, low = max(compute_s, memory_s), min(compute_s, memory_s)
    overlapped_s = high * (1.0 + (low / high) ** p) ** (1.0 / p)
    duration_s = overlapped_s + demand.exchange_s * at.slower + c.sync_s / at.x + demand.fixed_s
    compute_w = at.compute_w * (compute_s / duration_s) ** c.compute_exponent
    memory_w = c.memory_w * (demand.memory_s / duration_s) ** c.memory_exponent
    return duration_s, hot * (at.always_w + compute_w + memory_w)


@inlined
def warmed(t: Thermal, temperature_c: float, gpu_w: float, elapsed_s: float) -> float:
    """The temperature of a GPU, C, after drawing `gpu_w` for `elapsed_s`: a first-order lag."""
    end_c = t.ambient_c + t.resistance_c_per_w * gpu_w
    return end_c + (temperature_c - end_c) * np.exp(-elapsed_s / t.time_constant_s)


@inlined
def heat(t: Thermal, temperature_c: float) -> float:
    """What leakage multiplies the power with."""
    return 1.0 + t.leakage_per_c * (temperature_c - t.reference_c)


@compiled
def many_steps(c: Constants, work: FloatArray, clock_mhz: FloatArray, hot: FloatArray, out: FloatArray) -> None:
    """`step` for [n] steps: `work` is [4, n]; `out` [3, n] is duration, s, power of one GPU, W, and MHz."""
    at = at_lock(c, clock_mhz[0])
    for i in range(work.shape[1]):
        if i and clock_mhz[i] != clock_mhz[i - 1]:
            at = at_lock(c, clock_mhz[i])
        found = step(c, at, hot[i], work[0, i], work[1, i], work[2, i], work[3, i])
        out[0, i], out[1, i], out[2, i] = found.duration_s, found.gpu_w, found.clock_mhz
