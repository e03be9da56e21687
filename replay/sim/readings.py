"""Sensors of simulated GPUs in virtual time: millions of readings, fed with power chunk after chunk.

Memory is bounded by a chunk and the sensors' longest window. How a history is cut into chunks changes no reading.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.sim.compiled import compiled
from replay.sim.profile import SensorModel, ThermalModel
from replay.sim.sensors import (
    Bools,
    Floats,
    History,
    Ints,
    Readings,
    kept_after,
    last_update,
    reach_ns,
    read_updates,
    settled_c,
)

_NS_PER_S = 1e9


class Pieces(NamedTuple):
    """True power of one GPU, constant from `edges_ns[i]` to `edges_ns[i + 1]`."""

    edges_ns: Ints  # [n + 1], not decreasing
    watts: Floats  # [n]
    clock_mhz: Floats  # [n], that the GPU really runs at; its lock when idle
    capped: Bools  # [n], the power cap holds the clock down
    busy: Bools  # [n], a step runs


class SensorBank:
    """The sensors of GPUs that all draw the same power, such as those of one tensor-parallel group."""

    def __init__(
        self,
        gpus: Sequence[int],
        sensor: SensorModel,
        thermal: ThermalModel,
        *,
        seed: int,
        start_ns: int,
        start_w: float,
    ) -> None:
        """`gpus`: their indices on the node. The history starts at `start_ns`, warm from `start_w` drawn before."""
        self._gpus, self._sensor, self._thermal, self._seed = gpus, sensor, thermal, seed
        self._end_ns = start_ns
        start = Pieces(np.array([start_ns]), np.zeros(0), np.zeros(0), np.zeros(0, np.bool_), np.zeros(0, np.bool_))
        self._history = _history(start, 0.0, 0, np.array([settled_c(start_w, thermal)]))
        self._readable_ns = start_ns + reach_ns(sensor) - sensor.lag_ns  # what updates show of earlier is not known

    def feed(self, pieces: Pieces) -> dict[int, Readings]:
        """Go on with `pieces`, which begin where the last ones ended; what is shown of the time up to their end.

        By GPU: its updates, ascending, that show times before the end of `pieces` and were not returned before. The
        first are those whose windows the history holds whole. Raises `ValueError` when `pieces` begin elsewhere.
        """
        if pieces.edges_ns[0] != self._end_ns:
            raise ValueError(f"power goes on from {self._end_ns} ns, not from {pieces.edges_ns[0]} ns")
        begin_ns, end_ns = max(self._end_ns, self._readable_ns), int(pieces.edges_ns[-1])
        history = self._extended(pieces)
        shown = {gpu: self._read(history, gpu, begin_ns, end_ns) for gpu in self._gpus}
        self._history = history.since(end_ns - reach_ns(self._sensor) + self._sensor.lag_ns)
        self._end_ns = end_ns
        return shown

    def _read(self, history: History, gpu: int, begin_ns: int, end_ns: int) -> Readings:
        """The updates of `gpu` that show times from `begin_ns` to before `end_ns`."""
        lag_ns = self._sensor.lag_ns
        first, last = (last_update(t_ns - 1 + lag_ns, gpu, self._sensor) + 1 for t_ns in (begin_ns, end_ns))
        return read_updates(history, np.arange(first, last), gpu, self._sensor, self._thermal, self._seed, _find)

    def _extended(self, pieces: Pieces) -> History:
        """The kept history and `pieces` after it, with what they add up to."""
        kept = self._history
        temperature_c = np.full(pieces.watts.size + 1, kept.temperature_c[-1])
        elapsed_ns = np.diff(pieces.edges_ns).astype(np.float64)
        _warm(temperature_c, settled_c(pieces.watts, self._thermal), kept_after(elapsed_ns, self._thermal))
        new = _history(pieces, kept.energy_j[-1], kept.busy_ns[-1], temperature_c)
        # The first of the new replaces the last of the old, which had no power yet.
        columns: list[Any] = [np.concatenate([before[:-1], after]) for before, after in zip(kept, new, strict=True)]
        return History(*columns)


def _history(pieces: Pieces, energy_j: float, busy_ns: int, temperature_c: Floats) -> History:
    """`pieces` and their end, which has no power yet; their sums go on from `energy_j` and `busy_ns`."""
    spans_ns = np.diff(pieces.edges_ns)
    # Added one by one, as on the board, sums do not depend on where chunks are cut.
    return History(
        t_ns=pieces.edges_ns,
        energy_j=np.cumsum(np.append(energy_j, pieces.watts * spans_ns / _NS_PER_S)),
        busy_ns=np.cumsum(np.append(busy_ns, pieces.busy * spans_ns)),
        temperature_c=temperature_c,
        watts=np.append(pieces.watts, 0.0),
        clock_mhz=np.append(pieces.clock_mhz, 0.0),
        capped=np.append(pieces.capped, False),
        busy=np.append(pieces.busy, False),
    )


@compiled
def _warm(temperature_c: Floats, settled_c: Floats, kept: Floats) -> None:
    """Fill in the temperature, °C, at each edge but the first: that of `replay.sim.sensors.warmed_c`, one by one."""
    for i in range(len(kept)):
        temperature_c[i + 1] = settled_c[i] + (temperature_c[i] - settled_c[i]) * kept[i]


@compiled
def _find(history_ns: Ints, t_ns: Ints) -> Ints:
    """`replay.sim.sensors.find_changes` where `t_ns` ascends: one pass through both."""
    found = np.empty(len(t_ns), np.int64)
    at = -1
    for i in range(len(t_ns)):
        while at + 1 < len(history_ns) and history_ns[at + 1] <= t_ns[i]:
            at += 1
        found[i] = at
    return found
