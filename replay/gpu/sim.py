"""A simulated node's GPUs: a memory-mapped file in the driver's place, shared between processes.

The simulated engine writes each GPU's power as it changes; power between two changes is constant. `SimGpus` reads the
file as a driver shows its sensors: each updates once a period, all at the GPU's own phase, and what it shows derives
from the energy E(t) that the changes add up to. Locked clocks are in the file too, for the engine to read.

Layout, native byte order: a page with a JSON description, then per GPU words of 8 bytes: the number of changes ever
written, the locked clock (0: none), the time up to which power is known, and a ring of the latest changes as three
arrays: time (ns), energy up to then (J), power from then on (W). Each GPU has at most one writer of power. It stores a
change first and its number after, whole words both, and a reader looks at the number again when it has read.

GPUs that no engine holds draw their unloaded idle power. There is no thermal model: temperature, utilization and
throttle reasons are null.
"""

import contextlib
import mmap
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from replay.gpu.base import GpuInfo, GpuState, Reading, Sensor
from replay.sim.hardware import ClockRange, Hardware, Profile, SensorModel
from tracegen.errors import GpuError

_MAGIC = b"wattrace simulated board 1\n"
_PAGE_BYTES = 4096
_WORD_BYTES = 8
_RING = 4096  # changes kept of each GPU: 20 s of steps at 200 a second
_RING_MARGIN = 64  # the oldest of them are left alone, for the writer may be replacing them
_COUNT, _LOCKED, _KNOWN_UNTIL, _TIMES = 0, 1, 2, 3
_ENERGIES, _POWERS = _TIMES + _RING, _TIMES + 2 * _RING
_GPU_WORDS = _TIMES + 3 * _RING
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
    seed: int  # of the sensor noise


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
        cls, path: str | Path, profile: Profile, *, seed: int = 0, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Self:
        """Make the board of one node of `profile` at `path`, all GPUs unloaded and unlocked, and open it.

        Raises `GpuError` when it cannot be written there.
        """
        description = _Description(
            profile.gpu_name, profile.gpus_per_node, profile.memory_clock_mhz, profile.clocks_mhz, profile.sensor, seed
        )
        page = (_MAGIC + msgspec.json.encode(description)).ljust(_PAGE_BYTES, b"\0")
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(page + bytes(profile.gpus_per_node * _GPU_WORDS * _WORD_BYTES))
            board = cls(partial)
            idle_w = Hardware(profile, profile.gpus_per_node).idle_w(profile.clocks_mhz.max, loaded=False)
            for gpu in range(profile.gpus_per_node):
                board.set_power(gpu, now_ns() - _HISTORY_NS, idle_w)
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

    def set_power(self, gpu: int, t_ns: int, watts: float, *, known_until_ns: int | None = None) -> None:
        """Let `gpu` draw `watts` from `t_ns` on.

        `known_until_ns`: no change will come before this time; None means that the next one will be written as it
        happens. Sensors do not update beyond it, since the writer may run a little behind its own time.
        Raises `ValueError` when `t_ns` lies before the last change.
        """
        base = self._base(gpu)
        count = self._words[base + _COUNT]
        energy_j = 0.0
        if count:
            last = base + (count - 1) % _RING
            elapsed_ns = t_ns - self._words[last + _TIMES]
            if elapsed_ns < 0:
                raise ValueError(f"power of GPU {gpu} set {-elapsed_ns} ns before its last change")
            energy_j = self._floats[last + _ENERGIES] + self._floats[last + _POWERS] * elapsed_ns / _NS_PER_S
        slot = base + count % _RING
        self._words[slot + _TIMES] = t_ns
        self._floats[slot + _ENERGIES] = energy_j
        self._floats[slot + _POWERS] = watts
        self._words[base + _COUNT] = count + 1
        self._words[base + _KNOWN_UNTIL] = _FOREVER_NS if known_until_ns is None else known_until_ns

    def energy_j(self, gpu: int, t_ns: int) -> float:
        """Energy of `gpu` from the board's start to `t_ns`. Raises `GpuError` for a time older than the ring."""
        base = self._base(gpu)

        def time_ns(change: int) -> int:
            return self._words[base + _TIMES + change % _RING]

        while True:
            count = self._words[base + _COUNT]
            oldest = max(0, count - _RING + _RING_MARGIN)
            change = bisect_right(range(count), t_ns, lo=oldest, key=time_ns) - 1
            slot = base + change % _RING
            elapsed_ns = t_ns - time_ns(change)
            energy_j = self._floats[slot + _ENERGIES] + self._floats[slot + _POWERS] * elapsed_ns / _NS_PER_S
            if self._words[base + _COUNT] < oldest + _RING:  # else the writer has come round meanwhile
                break
        if change < oldest:
            raise GpuError(f"the simulated board's power of GPU {gpu} does not reach back to {t_ns} ns")
        return energy_j

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

    def clock_mhz(self, gpu: int) -> int:
        """The SM clock of `gpu`: the locked one, else the highest."""
        return self._words[self._base(gpu) + _LOCKED] or self.description.clocks_mhz.max

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

    def devices(self) -> list[GpuInfo]:
        """All GPUs of the simulated node; their names say that they are simulated."""
        name = f"Simulated {self._board.description.gpu_name}"
        return [GpuInfo(gpu, f"SIM-GPU-{gpu}", name) for gpu in range(self._board.description.gpus)]

    def read(self, gpu: int) -> Reading:
        """What every sensor of `gpu` shows now: its latest update."""
        board, sensor = self._board, self._board.description.sensor
        known_ns = board.known_until_ns(gpu, self._now_ns())
        phase_ns = sensor.phases_ns[gpu % len(sensor.phases_ns)]
        update = (known_ns - phase_ns) // sensor.period_ns
        end_ns = update * sensor.period_ns + phase_ns - sensor.lag_ns
        energy_j = board.energy_j(gpu, end_ns)
        instant_w = self._mean_w(gpu, end_ns, sensor.window_ns)
        average_w = self._mean_w(gpu, end_ns, sensor.average_window_ns)
        # Noise belongs to the update, so that reading it again shows the same. The average and the counter
        # integrate over it.
        noise = np.random.default_rng([board.description.seed, gpu, update]).standard_normal()
        return Reading(
            power_instant_mw=max(0, round(instant_w * (1 + sensor.noise_rel * noise) * 1e3)),
            power_average_mw=round(average_w * 1e3),
            energy_mj=int(energy_j * 1e3),
            sm_clock_mhz=board.clock_mhz(gpu),
            mem_clock_mhz=board.description.memory_clock_mhz,
            temperature_c=None,
            utilization=None,
            throttle_reasons=None,
        )

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
        """A simulated GPU is nobody else's; memory and power caps are not simulated."""
        self._board.clock_mhz(gpu)  # refuses an index that does not exist
        return GpuState(
            mig=False,
            memory_total_mib=None,
            memory_used_mib=None,
            processes=(),
            power_limit_w=None,
            power_limit_default_w=None,
            power_limit_range_w=None,
        )

    def set_power_limit(self, gpu: int, watts: float) -> None:
        """Raises `GpuError`: the simulated node's cap is its profile's."""
        raise GpuError(f"the simulated GPU {gpu} takes no power cap of {watts:g} W; its cap is in the profile")

    def close(self) -> None:
        """Close the board."""
        self._board.close()

    def _mean_w(self, gpu: int, end_ns: int, window_ns: int) -> float:
        energy_j = self._board.energy_j(gpu, end_ns) - self._board.energy_j(gpu, end_ns - window_ns)
        return energy_j / (window_ns / _NS_PER_S)
