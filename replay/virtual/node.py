"""The power of a whole simulated node in virtual time: from engine steps to what its sensors show.

GPUs of an instance draw a step's power while it runs and, between steps, idle power with the model loaded; those that
nobody uses draw idle power without. What leakage adds to idle power is left out.

Readings come in blocks of whole sensor periods, in each of which every sensor updates once, so that the rows of a
block are in order of time. There is one row an update, dated by it: a sensor that was polled without delay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.hardware import Hardware
from replay.sim.profile import Profile
from replay.sim.readings import Pieces, SensorBank
from replay.sim.sensors import Ints, Readings, reach_ns

RecordArray = npt.NDArray[np.void]

_BLOCK_UPDATES = 1 << 14  # of each sensor: 27 minutes at 10 a second


class Block(NamedTuple):
    """Readings of some GPUs, in order of time: arrays [rows]."""

    gpu: Ints
    readings: Readings


@dataclass(eq=False)
class _Group:
    """GPUs that all draw the same power, and what has not been shown of it yet."""

    gpus: Sequence[int]  # in order of their sensors' updates
    bank: SensorBank
    idle_w: float
    lock_mhz: float
    pieces: Pieces  # from the last block's end on


class NodePower:
    """The sensors of all GPUs of one node."""

    def __init__(
        self,
        hardware: Hardware,
        groups: Sequence[Sequence[int]],
        clock_mhz: int,
        *,
        begin_ns: int,
        seed: int,
        block_updates: int = _BLOCK_UPDATES,
    ) -> None:
        """`groups`: the GPUs of each instance, their clock locked to `clock_mhz`. The first readings are at `begin_ns`.

        `begin_ns` is taken down to a whole sensor period.
        """
        profile = hardware.profile
        self._period_ns, self._lag_ns = profile.sensor.period_ns, profile.sensor.lag_ns
        self._block_ns = block_updates * self._period_ns
        self._begin_ns = begin_ns - begin_ns % self._period_ns
        used = {gpu for group in groups for gpu in group}
        unused = [gpu for gpu in range(profile.gpus_per_node) if gpu not in used]
        loaded_w, unloaded_w = hardware.idle_w(clock_mhz), hardware.idle_w(clock_mhz, loaded=False)
        self._groups = [self._group(profile, gpus, loaded_w, clock_mhz, seed) for gpus in groups]
        if unused:  # unlocked: their clock is the highest
            self._groups.append(self._group(profile, unused, unloaded_w, profile.clocks_mhz.max, seed))
        self._instances = len(groups)

    def run(self, instance: int, steps: RecordArray, zero_ns: int) -> Iterator[Block]:
        """Let `instance` do `steps` (STEP rows, times from `zero_ns`); whole blocks of readings, as they get ready."""
        if steps.size:
            group = self._groups[instance]
            self._append(group, self._step_pieces(group, steps, zero_ns))
            yield from self._blocks(group)

    def rest(self, instance: int, until_ns: int) -> Iterator[Block]:
        """Let `instance`, or with -1 the GPUs that no instance has, idle until then; likewise."""
        if instance < 0 and len(self._groups) == self._instances:
            return
        group = self._groups[instance]
        self._idle(group, until_ns)
        yield from self._blocks(group)

    def end(self, until_ns: int) -> Iterator[Block]:
        """Let all idle until then; what is left of the readings, up to that time and some more."""
        periods = -(-(until_ns + self._lag_ns - self._begin_ns) // self._period_ns) + 1
        end_ns = self._begin_ns - self._lag_ns + periods * self._period_ns
        for group in self._groups:
            self._idle(group, end_ns)
            yield from self._blocks(group)
            if group.pieces.watts.size:
                yield self._show(group, group.pieces)

    def _group(self, profile: Profile, gpus: Sequence[int], idle_w: float, lock_mhz: int, seed: int) -> _Group:
        phases_ns = profile.sensor.phases_ns
        ordered = sorted(gpus, key=lambda gpu: phases_ns[gpu % len(phases_ns)])
        start_ns = self._begin_ns - reach_ns(profile.sensor)
        bank = SensorBank(ordered, profile.sensor, profile.thermal, seed=seed, start_ns=start_ns, start_w=idle_w)
        nothing = Pieces(np.array([start_ns]), np.zeros(0), np.zeros(0), np.zeros(0, np.bool_), np.zeros(0, np.bool_))
        return _Group(ordered, bank, idle_w, float(lock_mhz), nothing)

    def _step_pieces(self, group: _Group, steps: RecordArray, zero_ns: int) -> Pieces:
        """`steps` and the pauses before them."""
        edges_ns = np.empty(2 * steps.size + 1, np.int64)
        edges_ns[0] = group.pieces.edges_ns[-1]
        edges_ns[1::2], edges_ns[2::2] = steps["start_ns"] + zero_ns, steps["end_ns"] + zero_ns
        real = edges_ns[1:] > edges_ns[:-1]  # most steps follow the one before at once

        def woven(idle: float, field: npt.NDArray[Any]) -> npt.NDArray[Any]:
            both = np.empty(2 * steps.size, field.dtype)
            both[::2], both[1::2] = idle, field
            return both[real]

        clock_mhz = steps["clock_mhz"].astype(np.float64)
        return Pieces(
            np.append(edges_ns[:-1][real], edges_ns[-1]),
            woven(group.idle_w, steps["gpu_w"]),
            woven(group.lock_mhz, clock_mhz),
            woven(False, steps["capped"]),
            woven(False, np.ones(steps.size, np.bool_)),
        )

    def _idle(self, group: _Group, until_ns: int) -> None:
        """Append a pause up to `until_ns`, or let the pause under way go on.

        Sums of power are then the same to the last bit wherever the engines' output was cut.
        """
        pieces, start_ns = group.pieces, int(group.pieces.edges_ns[-1])
        if until_ns <= start_ns:
            return
        if pieces.busy.size and not pieces.busy[-1]:
            group.pieces = pieces._replace(edges_ns=np.append(pieces.edges_ns[:-1], until_ns))
            return
        edges_ns, no = np.array([start_ns, until_ns]), np.zeros(1, np.bool_)
        self._append(group, Pieces(edges_ns, np.array([group.idle_w]), np.array([group.lock_mhz]), no, no))

    def _append(self, group: _Group, more: Pieces) -> None:
        edges_ns = np.concatenate([group.pieces.edges_ns, more.edges_ns[1:]])
        group.pieces = Pieces(
            edges_ns, *(np.concatenate(pair) for pair in zip(group.pieces[1:], more[1:], strict=True))
        )

    def _blocks(self, group: _Group) -> Iterator[Block]:
        """Show the whole blocks of what is there of `group`; keep the rest."""
        first_ns = self._begin_ns - self._lag_ns
        while True:
            shown = max(0, (int(group.pieces.edges_ns[0]) - first_ns) // self._block_ns)
            cut_ns = first_ns + (shown + 1) * self._block_ns
            if group.pieces.edges_ns[-1] < cut_ns:
                return
            head, group.pieces = _split(group.pieces, cut_ns)
            yield self._show(group, head)

    def _show(self, group: _Group, pieces: Pieces) -> Block:
        """What the sensors of `group` show during `pieces`."""
        by_gpu = group.bank.feed(pieces)
        columns = [np.stack(column, axis=1).ravel() for column in zip(*(by_gpu[g] for g in group.gpus), strict=True)]
        readings = Readings(*columns)
        return Block(np.resize(np.array(group.gpus), readings.sensor_ns.size), readings)


def _split(pieces: Pieces, cut_ns: int) -> tuple[Pieces, Pieces]:
    """`pieces` before and after `cut_ns`, which lies among them; one that holds across it is in both."""
    edges_ns = pieces.edges_ns
    before = int(np.searchsorted(edges_ns, cut_ns, "left"))  # edges before the cut: as many pieces begin before it
    after = int(np.searchsorted(edges_ns, cut_ns, "right")) - 1  # the piece that holds at the cut
    head = _part(pieces, np.append(edges_ns[:before], cut_ns), slice(before))
    if after == len(edges_ns) - 1:
        return head, _part(pieces, edges_ns[-1:], slice(0))
    return head, _part(pieces, np.append(cut_ns, edges_ns[after + 1 :]), slice(after, None))


def _part(pieces: Pieces, edges_ns: Ints, part: slice) -> Pieces:
    """The `part` of `pieces` that lies between `edges_ns`."""
    return Pieces(edges_ns, pieces.watts[part], pieces.clock_mhz[part], pieces.capped[part], pieces.busy[part])
