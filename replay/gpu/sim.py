"""A simulated node's GPUs: a memory-mapped file in the driver's place, shared between processes.

The simulated engine writes each GPU's power as it changes; power between two changes is constant. `SimGpus` reads the
file as a driver shows its sensors, by the rules of `replay.sim.sensors`. Locked clocks are in the file too, for the
engine to read.

Layout, native byte order: a page with a JSON description, then per GPU words of 8 bytes: the number of changes ever
written, the locked clock (0: none), the time up to which power is known, the power cap (0: none), and a ring of the
latest changes as arrays: the columns of `replay.sim.sensors.History`. Each GPU has at most one writer of power. It
stores a change first and its number after, whole words both, and a reader looks at the number again when it has read.

GPUs that no engine holds draw their unloaded idle power.
"""

import contextlib
import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from replay.gpu.base import GpuInfo, GpuState, Reading, Sensor
from replay.sim.profile import ClockRange, Profile, SensorModel, ThermalModel
from replay.sim.sensors import History, board_gain, last_update, reach_ns, read_updates, settled_c, update_ns, warmed_c
from tracegen.errors import GpuError

_MAGIC = b"wattrace simulated board 2\n"
_PAGE_BYTES = 4096
_WORD_BYTES = 8
_RING = 4096  # changes kept of each GPU: 20 s of steps at 200 a second
_RING_MARGIN = 64  # the oldest of them are left alone, for the writer may be replacing them
_COUNT, _LOCKED, _KNOWN_UNTIL, _CAP, _COLUMNS = 0, 1, 2, 3, 4
_WHOLE = {"t_ns": np.int64, "busy_ns": np.int64, "capped": np.bool_, "busy": np.bool_}  # the other columns are floats
_T, _ENERGY, _BUSY_NS, _TEMPERATURE, _WATTS, _CLOCK, _CAPPED, _BUSY = (
    _COLUMNS + i * _RING for i in range(len(History._fields))
)
_GPU_WORDS = _COLUMNS + len(History._fields) * _RING
_OWN_CLOCK = 0.0  # in place of a clock: whatever the GPU is locked to
_FOREVER_NS = 2**63 - 1
_STALLED_NS = 1_000_000_000  # a writer silent for longer has died; its last power then stands
_HISTORY_NS = 10_000_000_000  # the driver was loaded that long before, so that no window reaches beyond its start
_NS_PER_S = 1e9


class _Description(msgspec.Struct, frozen=True):
    """What the board's first page says of its GPUs."""

    gpu_name: str
    gpus: int
    memory_clock_mhz: int
    clocks_mhz: ClockRange
    sensor: SensorModel
    thermal: ThermalModel
    power_cap_w: tuple[float, float]  # the lowest and the highest that can be set; the latter is the default
    seed: int  # of the sensors' noise and gain


class SimBoard:
    """The board's file, opened by the engine (which writes power) or by a reader; a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open the board at `path`. Raises `GpuError` when there is none."""
        try:
            with Path(path).open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
            raise GpuError(f"{path}: no simulated board ({error}); 'replay run --engine sim' makes one") from None
        page = self._map[:_PAGE_BYTES]
        if not page.startswith(_MAGIC):
            self._map.close()
            raise GpuError(f"{path}: not a simulated board; 'replay run --engine sim' makes one")
        self.description = msgspec.json.decode(page[len(_MAGIC) :].rstrip(b"\0"), type=_Description)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[_PAGE_BYTES:].cast("q")
        self._floats = self._bytes[_PAGE_BYTES:].cast("d")  # the same words, as floats

    @classmethod
    def create(
        cls,
        path: str | Path,
        profile: Profile,
        *,
        seed: int = 0,
        now_ns: Callable[[], int] = time.monotonic_ns,
        counters: Mapping[int, tuple[int, int]] | None = None,
    ) -> Self:
        """Make the board of one node of `profile` at `path`, all GPUs unloaded and unlocked, and open it.

        `counters`: of a node that is there already, when each GPU's energy counter was read last, ns, and what it
        showed, mJ; the GPU has been unloaded since. Raises `GpuError` when it cannot be written there.
        """
        description = _Description(
            profile.gpu_name, profile.gpus_per_node, profile.memory_clock_mhz, profile.clocks_mhz, profile.sensor,
            profile.thermal, profile.power_caps_w, seed,
        )  # fmt: skip
        page = (_MAGIC + msgspec.json.encode(description)).ljust(_PAGE_BYTES, b"\0")
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(page + bytes(profile.gpus_per_node * _GPU_WORDS * _WORD_BYTES))
            board = cls(partial)
            for gpu in range(profile.gpus_per_node):
                begin_ns, shown_mj = (counters or {}).get(gpu, (now_ns() - _HISTORY_NS, None))
                board.set_power(gpu, begin_ns, profile.power.idle_unloaded_w)
                if shown_mj is not None:  # sensors show whole mJ of what was drawn, times their gain
                    gain = board_gain(seed, gpu, profile.sensor.gain_error_rel)
                    board._floats[board._base(gpu) + _ENERGY] = (shown_mj + 1) / 1e3 / gain
            partial.replace(path)
        except OSError as error:
            raise GpuError(f"{path}: cannot make a simulated board there ({error.strerror})") from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        return board

    def __enter__(self) -> Self:
        """The open board."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Unmap the file; closing twice is no error."""
        for view in (self._words, self._floats, self._bytes):
            view.release()
        self._map.close()

    def set_power(
        self,
        gpu: int,
        t_ns: int,
        watts: float,
        *,
        clock_mhz: float | None = None,
        capped: bool = False,
        busy: bool = False,
        known_until_ns: int | None = None,
    ) -> None:
        """Let `gpu` draw `watts` from `t_ns` on, at `clock_mhz` (None: whatever it is locked to).

        `capped`: the power cap holds the clock down; `busy`: a step runs.
        `known_until_ns`: no change will come before this time; None means that the next one will be written as it
        happens. Sensors do not update beyond it, since the writer may run a little behind its own time.
        Raises `ValueError` when `t_ns` lies before the last change.
        """
        base, thermal, words, floats = self._base(gpu), self.description.thermal, self._words, self._floats
        count = words[base + _COUNT]
        energy_j, busy_ns, temperature_c = 0.0, 0, settled_c(watts, thermal)
        if count:
            last = base + (count - 1) % _RING
            elapsed_ns = t_ns - words[last + _T]
            if elapsed_ns < 0:
                raise ValueError(f"power of GPU {gpu} set {-elapsed_ns} ns before its last change")
            energy_j = floats[last + _ENERGY] + floats[last + _WATTS] * elapsed_ns / _NS_PER_S
            busy_ns = words[last + _BUSY_NS] + words[last + _BUSY] * elapsed_ns
            temperature_c = warmed_c(floats[last + _TEMPERATURE], floats[last + _WATTS], float(elapsed_ns), thermal)
        slot = base + count % _RING
        words[slot + _T], floats[slot + _ENERGY], words[slot + _BUSY_NS] = t_ns, energy_j, busy_ns
        floats[slot + _TEMPERATURE], floats[slot + _WATTS] = temperature_c, watts
        floats[slot + _CLOCK] = _OWN_CLOCK if clock_mhz is None else clock_mhz
        words[slot + _CAPPED], words[slot + _BUSY] = capped, busy
        self._words[base + _COUNT] = count + 1
        self._words[base + _KNOWN_UNTIL] = _FOREVER_NS if known_until_ns is None else known_until_ns

    def history(self, gpu: int, since_ns: int) -> History:
        """The changes of `gpu` from the one on that holds at `since_ns`.

        Raises `GpuError` for a time older than the ring.
        """
        base = self._base(gpu)
        while True:
            count = self._words[base + _COUNT]
            oldest = max(0, count - _RING + _RING_MARGIN)
            times_ns = self._changes(base, oldest, count, columns=1)[0]
            first = oldest + int(np.searchsorted(times_ns, since_ns, "right")) - 1
            history = History(*self._changes(base, max(first, oldest), count))
            if self._words[base + _COUNT] < oldest + _RING:  # else the writer has come round meanwhile
                break
        if first < oldest:
            raise GpuError(f"the simulated board's power of GPU {gpu} does not reach back to {since_ns} ns")
        return history

    def energy_j(self, gpu: int, t_ns: int) -> float:
        """Energy of `gpu` from the board's start to `t_ns`. Raises `GpuError` for a time older than the ring."""
        then = self.history(gpu, t_ns)
        return float(then.energy_j[0] + then.watts[0] * (t_ns - then.t_ns[0]) / _NS_PER_S)

    def temperature_c(self, gpu: int, t_ns: int) -> float:
        """Temperature of `gpu` at `t_ns`, °C. Raises `GpuError` for a time older than the ring."""
        then = self.history(gpu, t_ns)
        elapsed_ns = float(t_ns - then.t_ns[0])
        return float(warmed_c(then.temperature_c[0], then.watts[0], elapsed_ns, self.description.thermal))

    def expect_change(self, gpu: int, t_ns: int) -> None:
        """Let the sensors of `gpu` not update beyond `t_ns`: a change at that time is about to be written."""
        self._words[self._base(gpu) + _KNOWN_UNTIL] = t_ns

    def known_until_ns(self, gpu: int, now_ns: int) -> int:
        """The latest time up to `now_ns` at which the energy of `gpu` is final."""
        return max(min(now_ns, self._words[self._base(gpu) + _KNOWN_UNTIL]), now_ns - _STALLED_NS)

    def lock_clock(self, gpu: int, mhz: int | None) -> None:
        """Lock the SM clock of `gpu`, or give it back with None. Raises `GpuError` for an unsupported clock."""
        base, clocks = self._base(gpu), self.description.clocks_mhz
        if mhz is not None and mhz not in range(clocks.min, clocks.max + 1, clocks.step):
            raise GpuError(
                f"GPU {gpu} cannot be locked to {mhz} MHz; it supports {clocks.min} to {clocks.max} MHz "
                f"in steps of {clocks.step}"
            )
        self._words[base + _LOCKED] = mhz or 0

    def set_cap(self, gpu: int, watts: float) -> None:
        """Set the power cap of `gpu`. Raises `GpuError` for one that it does not take."""
        base, (low, high) = self._base(gpu), self.description.power_cap_w
        if not low <= watts <= high:
            raise GpuError(f"GPU {gpu} takes no power cap of {watts:g} W; it takes {low:g} to {high:g} W")
        self._floats[base + _CAP] = watts

    def cap_w(self, gpu: int) -> float:
        """The power cap of `gpu`."""
        return self._floats[self._base(gpu) + _CAP] or self.description.power_cap_w[1]

    def clock_mhz(self, gpu: int) -> int:
        """The SM clock of `gpu`: the locked one, else the highest."""
        return self._words[self._base(gpu) + _LOCKED] or self.description.clocks_mhz.max

    def _changes(self, base: int, first: int, end: int, columns: int = len(History._fields)) -> list[Any]:
        """The first `columns` of the numbered changes `first` to before `end`, copied."""
        slots = np.arange(first, end) % _RING
        words = np.frombuffer(self._map, np.int64, columns * _RING, _PAGE_BYTES + (base + _COLUMNS) * _WORD_BYTES)
        ring = words.reshape(columns, _RING)[:, slots]
        return [
            column.astype(_WHOLE[name]) if name in _WHOLE else column.view(np.float64)
            for name, column in zip(History._fields, ring, strict=False)
        ]

    def _base(self, gpu: int) -> int:
        """The first word of `gpu`."""
        if not 0 <= gpu < self.description.gpus:
            raise GpuError(f"GPU {gpu} does not exist; the simulated node has GPUs 0 to {self.description.gpus - 1}")
        return gpu * _GPU_WORDS


class SimGpus:
    """The board's GPUs as a driver shows them (implements `replay.gpu.base.Gpus`)."""

    def __init__(self, path: str | Path, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Open the board at `path`; `now_ns` is the clock that the engine uses too."""
        self._board = SimBoard(path)
        self._now_ns = now_ns
        self._latest: dict[int, tuple[int, Reading]] = {}  # of each GPU: its update that was read last

    def devices(self) -> list[GpuInfo]:
        """All GPUs of the simulated node; their names say that they are simulated."""
        name = f"Simulated {self._board.description.gpu_name}"
        return [GpuInfo(gpu, f"SIM-GPU-{gpu}", name) for gpu in range(self._board.description.gpus)]

    def read(self, gpu: int) -> Reading:
        """What every sensor of `gpu` shows now: its latest update."""
        board, about = self._board, self._board.description
        update = last_update(board.known_until_ns(gpu, self._now_ns()), gpu, about.sensor)
        if gpu not in self._latest or self._latest[gpu][0] != update:
            self._latest[gpu] = update, self._read_update(gpu, update)
        reading = self._latest[gpu][1]
        return reading if reading.sm_clock_mhz else replace(reading, sm_clock_mhz=board.clock_mhz(gpu))

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """How `instant` and `average` power of `gpu` behave, from the board's profile."""
        self._board.clock_mhz(gpu)  # refuses an index that does not exist
        sensor = self._board.description.sensor
        windows_ns = {"instant": sensor.window_ns, "average": sensor.average_window_ns}
        return {name: Sensor(sensor.period_ns, window_ns, sensor.lag_ns) for name, window_ns in windows_ns.items()}

    def supported_clocks_mhz(self, gpu: int) -> list[int]:
        """The SM clocks of the profile, ascending."""
        self._board.clock_mhz(gpu)  # refuses an index that does not exist
        clocks = self._board.description.clocks_mhz
        return [*range(clocks.min, clocks.max + 1, clocks.step)]

    def lock_clock(self, gpu: int, mhz: int) -> None:
        """Lock the SM clock of `gpu`; the engine takes it up with its next step. Raises `GpuError` if unsupported."""
        self._board.lock_clock(gpu, mhz)

    def unlock_clock(self, gpu: int) -> None:
        """Give the SM clock of `gpu` back: it then runs at its highest."""
        self._board.lock_clock(gpu, None)

    def driver_version(self) -> str | None:
        """There is no driver."""
        return None

    def state(self, gpu: int) -> GpuState:
        """A simulated GPU is nobody else's; its memory is not simulated."""
        return GpuState(
            mig=False,
            memory_total_mib=None,
            memory_used_mib=None,
            processes=(),
            power_limit_w=self._board.cap_w(gpu),
            power_limit_default_w=self._board.description.power_cap_w[1],
            power_limit_range_w=self._board.description.power_cap_w,
        )

    def set_power_limit(self, gpu: int, watts: float) -> None:
        """Set the power cap of `gpu`; the engine takes it up with its next step. Raises `GpuError` if unsupported."""
        self._board.set_cap(gpu, watts)

    def close(self) -> None:
        """Close the board."""
        self._board.close()

    def _read_update(self, gpu: int, update: int) -> Reading:
        """What the numbered `update` of `gpu` shows; its clock is 0 where that is whatever the GPU is locked to."""
        about, updates = self._board.description, np.array([update])
        since_ns = int(update_ns(updates, gpu, about.sensor)[0]) - reach_ns(about.sensor)
        history = self._board.history(gpu, since_ns)
        shown = read_updates(history, updates, gpu, about.sensor, about.thermal, about.seed)
        values = {name: int(column[0]) for name, column in zip(shown._fields, shown, strict=True)}
        del values["sensor_ns"]  # a driver does not tell
        return Reading(**values, mem_clock_mhz=about.memory_clock_mhz)
