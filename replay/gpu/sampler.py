"""Read the power sensors in a process of its own, and keep every reading.

`Sampler` starts `python -m replay.gpu.sampler`, which polls each GPU at about a quarter of its sensor's period, writes
`power.parquet` (and `cpu_energy.parquet`) in parts a second apart and prints a status line now and then. Unchanged
readings are kept: a sensor that updates to the same value has still measured. A GPU that cannot be read any more gets
rows without values, one a try, while the others are read on.
"""

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import polars as pl

from replay.child import Child, parent_left, say
from replay.clock import NS_PER_MS, NS_PER_S, now_ns
from replay.gpu.base import PowerSource, Reading, open_power
from replay.gpu.rapl import POWERCAP, CpuEnergy
from replay.gpu.sensor_profiles import known_sensors
from replay.rundir import PartWriter
from replay.tables import CPU_ENERGY, POWER
from tracegen.errors import GpuError, WattraceError

_UNKNOWN_PERIOD_NS = 100 * NS_PER_MS  # polled as if it were this where a sensor's period is not published
_POLLS_PER_PERIOD = 4.35  # above 4 as the sensor must be dated to a quarter period; no whole number, so phases vary
_FLUSH_NS = NS_PER_S
_STATUS_NS = NS_PER_S // 2
_CPU_NS = 100 * NS_PER_MS  # RAPL counts every millisecond: its energy between two readings is exact at any distance
_RETRY_NS = NS_PER_S  # a driver can take long to say that a card is gone, and the others wait meanwhile
_BY_GPU = ("watts", "clocks_mhz", "throttle_reasons", "lost")


class UpdateClock:
    """Dates a periodic sensor's updates from polls.

    A changed value was updated between two polls. Intersecting these intervals modulo the period narrows the phase;
    with the phase known, updates to an unchanged value are dated too.
    """

    def __init__(self, period_ns: int | None) -> None:
        """`period_ns`: the sensor's update period, None where it is not known."""
        self._period_ns = period_ns
        self._last_poll_ns: int | None = None
        self._last_value: object = None
        self._update: tuple[int, int] | None = None  # the latest update lies in (low, high]

    def poll(self, t_ns: int, value: object) -> int | None:
        """Take a poll; return when the sensor last updated (the upper bound of what is known), None if unknown."""
        before, self._last_poll_ns = self._last_poll_ns, t_ns
        changed, self._last_value = value != self._last_value, value
        if before is None:
            return None
        self._advance(t_ns)
        if changed:
            low, high = self._update or (before, t_ns)
            low, high = max(low, before), min(high, t_ns)
            # An empty intersection means that the sensor's clock has drifted against ours: start anew.
            self._update = (low, high) if low < high else (before, t_ns)
        return self._update[1] if self._update else None

    def _advance(self, t_ns: int) -> None:
        """Move the known update on by the whole periods that have surely passed by `t_ns`."""
        if self._update is not None and self._period_ns is not None:
            periods = max(0, (t_ns - self._update[1]) // self._period_ns)
            self._update = (self._update[0] + periods * self._period_ns, self._update[1] + periods * self._period_ns)


@dataclass(frozen=True)
class Status:
    """What the sampler says while it runs."""

    t_ns: int
    written_ns: int  # all readings up to here are in the run directory
    watts: dict[int, float | None]
    clocks_mhz: dict[int, int | None]
    throttle_reasons: dict[int, int | None] = field(default_factory=dict)  # NVML bit mask of the latest reading
    lost: dict[int, str] = field(default_factory=dict)  # GPUs that cannot be read now, and why
    error: str | None = None  # why there is no sampler


class Sampler:
    """The sampler process, as an async context."""

    def __init__(
        self,
        spec: str,
        indices: Sequence[int],
        run_dir: Path,
        host: str,
        *,
        with_cpu: bool = False,
        powercap: Path = POWERCAP,
    ) -> None:
        """`spec` as for `open_power`; `indices` the GPUs to read; `with_cpu`: the CPUs' energy too, from `powercap`."""
        gpus = ",".join(map(str, indices))
        cpu = ["--with-cpu", powercap] if with_cpu else []
        self._child = Child("replay.gpu.sampler", spec, gpus, run_dir, host, *cpu)
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self.status: Status | None = None

    async def __aenter__(self) -> Self:
        """Start, and wait for the first reading. Raises `GpuError` when there is none."""
        self._take(await self._child.start() or {"error": "the power sampler did not start"})
        if self.status is None or self.status.error:
            await self._child.stop()
            raise GpuError(self.status and self.status.error)
        self._reader = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; every reading is written when this returns."""
        self._child.close()
        if self._reader is not None:
            await self._reader
        await self._child.stop()

    @property
    def alive(self) -> bool:
        """Whether the sampler still runs."""
        return self._child.alive

    async def written_until(self, t_ns: int) -> None:
        """Return when all readings up to `t_ns` are in the run directory, or the sampler has ended."""
        while self.alive and (self.status is None or self.status.written_ns < t_ns):
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), 1.0)

    async def _follow(self) -> None:
        async for message in self._child.messages():
            self._take(message)
        self._news.set()

    def _take(self, message: dict[str, Any]) -> None:
        for key in _BY_GPU:
            message[key] = {int(gpu): value for gpu, value in message.get(key, {}).items()}
        self.status = Status(**{"t_ns": 0, "written_ns": 0, **message})
        self._news.set()


@dataclass
class _Polled:
    """Where the polling of one GPU stands."""

    clock: UpdateClock
    latest: Reading | None = None
    lost: str | None = None  # why the latest poll failed
    pause_ns: int = 0  # until the next try; doubled with each one that fails
    due_ns: int = 0


class _Loop:
    """The polling loop inside the sampler process."""

    def __init__(
        self, gpus: PowerSource, indices: Sequence[int], run_dir: Path, host: str, cpu: CpuEnergy | None = None
    ) -> None:
        self._gpus, self._host, self._cpu = gpus, host, cpu
        self._writer = PartWriter(run_dir, "power")
        self._cpu_writer = PartWriter(run_dir, "cpu_energy") if cpu else None
        self._rows: list[tuple[Any, ...]] = []
        self._cpu_rows: list[tuple[Any, ...]] = []
        periods = _periods_ns(gpus, indices)
        self._polled = {g: _Polled(UpdateClock(periods.get(g))) for g in indices}
        self._poll_ns = round(min(periods.values(), default=_UNKNOWN_PERIOD_NS) / _POLLS_PER_PERIOD)
        self._written_ns = 0

    def run(self) -> None:
        """Poll until stdin closes; flush at the end. Raises `GpuError` when a GPU's first poll fails."""
        due_ns = next_flush_ns = next_status_ns = next_cpu_ns = now_ns()
        try:
            while not parent_left(due_ns):
                for gpu in self._polled:
                    self._poll(gpu)
                t_ns = now_ns()
                if t_ns >= next_cpu_ns:
                    self._poll_cpu()
                    next_cpu_ns = _next_on_grid(next_cpu_ns, _CPU_NS)
                if t_ns >= next_flush_ns:
                    self._flush(t_ns)
                    next_flush_ns = t_ns + _FLUSH_NS
                if t_ns >= next_status_ns:
                    _report(t_ns, self._written_ns, self._polled)
                    next_status_ns = t_ns + _STATUS_NS
                due_ns = _next_on_grid(due_ns, self._poll_ns)
        finally:
            self._flush(now_ns())

    def _poll(self, gpu: int) -> None:
        """Add a row of `gpu`: its reading, or one without values when it fails after it could be read before."""
        polled, before_ns = self._polled[gpu], now_ns()
        if before_ns < polled.due_ns:
            return
        try:
            reading = self._gpus.read(gpu)
            polled.lost, polled.pause_ns = None, 0
        except GpuError as error:
            if polled.latest is None:
                raise
            reading, polled.lost = Reading(), str(error)
            polled.pause_ns = min(_RETRY_NS, 2 * polled.pause_ns or self._poll_ns)
        after_ns = now_ns()
        t_ns = (before_ns + after_ns) // 2
        polled.latest, polled.due_ns = reading, after_ns + polled.pause_ns
        values = asdict(reading)
        sensor_ns = values.pop("sensor_ns")
        if sensor_ns is None and reading.power_instant_mw is not None:
            sensor_ns = polled.clock.poll(t_ns, reading.power_instant_mw)
        self._rows.append((t_ns, sensor_ns, self._host, gpu, *values.values()))

    def _poll_cpu(self) -> None:
        for reading in self._cpu.read() if self._cpu else ():
            self._cpu_rows.append((reading.t_ns, self._host, reading.domain, reading.energy_uj))

    def _flush(self, t_ns: int) -> None:
        self._writer.append(pl.DataFrame(self._rows, schema=POWER, orient="row"))
        self._rows.clear()
        if self._cpu_writer is not None:
            self._cpu_writer.append(pl.DataFrame(self._cpu_rows, schema=CPU_ENERGY, orient="row"))
            self._cpu_rows.clear()
        self._written_ns = t_ns


def _next_on_grid(due_ns: int, period_ns: int) -> int:
    """When it is due again after `due_ns`; what is late is not made up for, but skipped."""
    return due_ns + period_ns * max(1, math.ceil((now_ns() - due_ns) / period_ns))


def _periods_ns(gpus: PowerSource, indices: Sequence[int]) -> dict[int, int]:
    """How often the instant sensors of `indices` update, as probed on this card, else as published; unknown: no key."""
    known = {
        device.gpu: known_sensors(device, gpus.sensors(device.gpu))[0]
        for device in gpus.devices()
        if device.gpu in indices
    }
    return {gpu: sensors["instant"].period_ns for gpu, sensors in known.items() if "instant" in sensors}


def _report(t_ns: int, written_ns: int, polled: dict[int, _Polled]) -> None:
    """Tell the parent how it stands."""
    latest = {gpu: p.latest or Reading() for gpu, p in polled.items()}
    watts = {
        gpu: None if (mw := _first(r.power_instant_mw, r.power_average_mw)) is None else mw / 1000
        for gpu, r in latest.items()
    }
    message = {
        "t_ns": t_ns,
        "written_ns": written_ns,
        "watts": watts,
        "clocks_mhz": {gpu: r.sm_clock_mhz for gpu, r in latest.items()},
        "throttle_reasons": {gpu: r.throttle_reasons for gpu, r in latest.items()},
        "lost": {gpu: p.lost for gpu, p in polled.items() if p.lost is not None},
    }
    say(message)


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)


def _main(argv: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    spec, indices, run_dir, host, *with_cpu = argv
    try:
        cpu = CpuEnergy.open(Path(with_cpu[1])) if with_cpu else None
        with contextlib.closing(open_power(spec)) as gpus:
            _Loop(gpus, [int(gpu) for gpu in indices.split(",")], Path(run_dir), host, cpu).run()
    except WattraceError as error:
        say({"error": str(error)})
    except OSError as error:  # a full disk ends the run too, which says so
        say({"error": f"{run_dir}: power cannot be written ({error.strerror or error})"})


if __name__ == "__main__":
    _main(sys.argv[1:])
