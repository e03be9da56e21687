"""What the sensors of a simulated GPU show, given the power that it truly draws.

Power is constant between changes. `History` is one GPU's changes with what they add up to, `read_updates` what each
sensor shows at its updates. The simulated board in wall time (`replay.gpu.sim`) and runs in virtual time
(`replay.sim.readings`) both read here, so the same power gives the same readings.

A sensor updates once every `period_ns`, each GPU at its own phase, with what happened up to `lag_ns` before: power as
the mean of a window, the energy counter since the history's start, clock and limits of that moment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from replay.sim.profile import SensorModel, ThermalModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Values = TypeVar("Values", float, Floats)

# NVML counts the share of time with a kernel over "between 1 second and 1/6 second depending on the product"
# (nvmlUtilization_t); which it is on these products is not published: assumed 1 s.
UTILIZATION_WINDOW_NS = 1_000_000_000
GPU_IDLE, SW_POWER_CAP = 0x1, 0x4  # nvmlClocksEventReasons

_NS_PER_S = 1e9
_NOISE, _GAIN = 0, 1  # streams of chance
_MASK = 2**64 - 1
_UNIFORM_BITS = 52  # so that half a step beside either end is still a float below 1


class History(NamedTuple):
    """Power of one GPU: change i holds from `t_ns[i]` up to `t_ns[i + 1]`, the last one for ever.

    All are arrays [n]; times do not decrease, and of changes at one time the last counts. `energy_j`, `busy_ns` and
    `temperature_c` are states at `t_ns`, the others hold from there on.
    """

    t_ns: Ints
    energy_j: Floats  # drawn since the history's start
    busy_ns: Ints  # spent in steps since then
    temperature_c: Floats
    watts: Floats
    clock_mhz: Floats  # that the GPU really runs at
    capped: Bools  # the power cap holds the clock down
    busy: Bools  # a step runs

    def since(self, t_ns: int) -> "History":
        """A copy without the changes before the one that holds at `t_ns`."""
        first = max(0, int(np.searchsorted(self.t_ns, t_ns, "right")) - 1)
        columns: list[Any] = [column[first:].copy() for column in self]
        return History(*columns)


class Readings(NamedTuple):
    """What a GPU's sensors show at some updates: arrays [n] of whole numbers."""

    sensor_ns: Ints  # of the update
    power_instant_mw: Ints
    power_average_mw: Ints
    energy_mj: Ints
    sm_clock_mhz: Ints
    temperature_c: Ints
    utilization: Ints  # percent
    throttle_reasons: Ints  # NVML bit mask


def find_changes(history_ns: Ints, t_ns: Ints) -> Ints:
    """The change that holds at each of `t_ns`, of changes at `history_ns`."""
    return np.searchsorted(history_ns, t_ns, "right") - 1


def read_updates(
    history: History,
    updates: Ints,
    gpu: int,
    sensor: SensorModel,
    thermal: ThermalModel,
    seed: int,
    find: Callable[[Ints, Ints], Ints] = find_changes,
) -> Readings:
    """What the sensors of `gpu` show at the numbered `updates` [n].

    `history` must begin `reach_ns` before the first of them. `find` is a faster `find_changes`, where there is one.

    Noise (relative, normal) belongs to an instant reading: reading it again shows the same. The average and the
    counter integrate over it. The gain of a board is one number for all its readings of power and for the counter:
    Yang et al., "Part-time Power Measurements" (SC'24) find errors proportional to power, another for each board,
    mostly within 5 %. That the counter shares it, and that boards lie uniformly within the bound, is assumed.

    No reason is given for a clock below its lock at the GPU's own limit under load: NVML documents none for it.
    """
    sensor_ns = update_ns(updates, gpu, sensor)
    end_ns = sensor_ns - sensor.lag_ns
    at = find(history.t_ns, end_ns)
    energy_j, busy_ns = _energy_j(history, at, end_ns), _busy_ns(history, at, end_ns)
    gain = board_gain(seed, gpu, sensor.gain_error_rel)
    power_w: dict[int, Floats] = {}
    for window_ns in {sensor.window_ns, sensor.average_window_ns, UTILIZATION_WINDOW_NS}:
        start_ns = end_ns - window_ns
        before = find(history.t_ns, start_ns)
        power_w[window_ns] = gain * (energy_j - _energy_j(history, before, start_ns)) / (window_ns / _NS_PER_S)
        if window_ns == UTILIZATION_WINDOW_NS:
            busy_ns -= _busy_ns(history, before, start_ns)
    instant_w = power_w[sensor.window_ns] * (1 + sensor.noise_rel * noise(seed, gpu, updates))
    elapsed_ns = (end_ns - history.t_ns[at]).astype(np.float64)
    temperature_c = warmed_c(history.temperature_c[at], history.watts[at], elapsed_ns, thermal)
    reasons = GPU_IDLE * ~history.busy[at] + SW_POWER_CAP * history.capped[at]
    return Readings(
        sensor_ns,
        np.maximum(_whole(instant_w * 1e3), 0),
        _whole(power_w[sensor.average_window_ns] * 1e3),
        np.floor(gain * energy_j * 1e3).astype(np.int64),
        _whole(history.clock_mhz[at]),
        np.maximum(_whole(temperature_c), 0),  # the table has no degrees below
        (200 * busy_ns + UTILIZATION_WINDOW_NS) // (2 * UTILIZATION_WINDOW_NS),
        reasons,
    )


def update_ns(updates: Ints, gpu: int, sensor: SensorModel) -> Ints:
    """When the numbered `updates` of the sensors of `gpu` happen."""
    return updates * sensor.period_ns + sensor.phases_ns[gpu % len(sensor.phases_ns)]


def last_update(t_ns: int, gpu: int, sensor: SensorModel) -> int:
    """The number of the latest update of `gpu` at or before `t_ns`."""
    return (t_ns - sensor.phases_ns[gpu % len(sensor.phases_ns)]) // sensor.period_ns


def reach_ns(sensor: SensorModel) -> int:
    """How far before an update its windows reach."""
    return sensor.lag_ns + max(sensor.window_ns, sensor.average_window_ns, UTILIZATION_WINDOW_NS)


def noise(seed: int, gpu: int, updates: Ints) -> Floats:
    """A standard normal number for each of the `updates` [n] of `gpu`: the same whenever and wherever it is asked for.

    Counter-based: a hash of seed, GPU and update through the normal distribution's inverse.
    """
    normal: Floats = ndtri(_uniform(seed, _NOISE, gpu, updates))
    return normal


def board_gain(seed: int, gpu: int, gain_error_rel: float) -> float:
    """What the sensors of `gpu` show per watt drawn: uniform within `gain_error_rel` of 1, fixed for a board."""
    uniform = _uniform(seed, _GAIN, gpu, np.zeros(1, np.int64))[0]
    return 1 + gain_error_rel * float(2 * uniform - 1)


def settled_c(watts: Values, thermal: ThermalModel) -> Values:
    """The temperature, °C, of a GPU that draws `watts` for long."""
    return thermal.ambient_c + thermal.resistance_c_per_w * watts


def kept_after(elapsed_ns: Values, thermal: ThermalModel) -> Values:
    """How much of its distance to the settled temperature a GPU still has after `elapsed_ns`."""
    kept: Values = np.exp(-elapsed_ns / (thermal.time_constant_s * _NS_PER_S))
    return kept


def warmed_c(start_c: Values, watts: Values, elapsed_ns: Values, thermal: ThermalModel) -> Values:
    """The temperature, °C, `elapsed_ns` after it was `start_c`, at `watts` all the while.

    A first-order lag: dT/dt = (ambient + resistance · P - T) / time constant.
    """
    end_c = settled_c(watts, thermal)
    return end_c + (start_c - end_c) * kept_after(elapsed_ns, thermal)


def _energy_j(history: History, at: Ints, t_ns: Ints) -> Floats:
    """Energy up to `t_ns`, where changes `at` hold."""
    energy_j: Floats = history.energy_j[at] + history.watts[at] * (t_ns - history.t_ns[at]) / _NS_PER_S
    return energy_j


def _busy_ns(history: History, at: Ints, t_ns: Ints) -> Ints:
    """Time in steps up to `t_ns`, where changes `at` hold."""
    busy_ns: Ints = history.busy_ns[at] + history.busy[at] * (t_ns - history.t_ns[at])
    return busy_ns


def _whole(values: Floats) -> Ints:
    return np.rint(values).astype(np.int64)


def _uniform(seed: int, stream: int, gpu: int, counters: Ints) -> Floats:
    """A number between 0 and 1, neither included, for each of `counters` [n]."""
    key = np.array([seed & _MASK], np.uint64)
    for words in (np.array([stream], np.uint64), np.array([gpu], np.uint64), counters.astype(np.uint64)):
        key = _mix(key, words)
    return ((key >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64) + 0.5) * 2.0**-_UNIFORM_BITS


def _mix(key: npt.NDArray[np.uint64], words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of both: SplitMix64's finaliser on its `words`-th state (Steele, Lea and Flood, OOPSLA'14)."""
    z = key + np.uint64(0x9E3779B97F4A7C15) * (words + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
