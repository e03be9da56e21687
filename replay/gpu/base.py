"""The boundary to power sensors and GPUs: what is read from one and asked of one.

`PowerSource` is whatever tells power: a driver, an external meter's file, a monitoring endpoint. `Gpus` is a driver,
which can also be asked about its cards and told how to run them; the two are `replay.gpu.nvml.NvmlGpus` (the only
module that imports pynvml) and `replay.gpu.sim.SimGpus`. A process opens either from a short text, so that sampler and
settings holder, processes of their own, find the same board.
"""

from dataclasses import dataclass
from typing import Protocol

from tracegen.errors import GpuError


@dataclass(frozen=True)
class GpuInfo:
    """Who a GPU is."""

    gpu: int  # NVML index
    uuid: str
    name: str


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: int
    name: str | None  # None where it cannot be seen (another container's, another user's)
    memory_mib: int | None


@dataclass(frozen=True)
class GpuState:
    """How a GPU stands before a run; None where the driver does not tell."""

    mig: bool  # split into instances: its sensors measure the whole card, so nobody's share
    memory_total_mib: int | None
    memory_used_mib: int | None  # the driver's own reservation not included
    processes: tuple[GpuProcess, ...]
    power_limit_w: float | None
    power_limit_default_w: float | None
    power_limit_range_w: tuple[float, float] | None


@dataclass(frozen=True)
class Reading:
    """One poll of one GPU; None where the sensor does not exist."""

    power_instant_mw: int | None = None
    power_average_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    mem_clock_mhz: int | None = None
    temperature_c: int | None = None
    utilization: int | None = None  # percent
    throttle_reasons: int | None = None  # NVML bit mask
    sensor_ns: int | None = None  # when the value was measured, where the source itself says so


@dataclass(frozen=True)
class Sensor:
    """How a power sensor behaves: it updates every `period_ns` with the mean of `window_ns` that ended `lag_ns` ago."""

    period_ns: int
    window_ns: int
    lag_ns: int


class PowerSource(Protocol):
    """Something that tells the power of one host's GPUs. Every method raises `GpuError` with one clear line."""

    def devices(self) -> list[GpuInfo]:
        """All GPUs that it tells of, by index."""

    def read(self, gpu: int) -> Reading:
        """One reading of every sensor of `gpu`."""

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """The known behaviour of `instant` and `average` power of `gpu`; a missing key is unknown."""

    def close(self) -> None:
        """Release it."""


class Gpus(PowerSource, Protocol):
    """The GPUs of one host, through their driver."""

    def driver_version(self) -> str | None:
        """The driver's version; None where it tells none."""

    def state(self, gpu: int) -> GpuState:
        """How `gpu` stands now."""

    def supported_clocks_mhz(self, gpu: int) -> list[int]:
        """The SM clocks that `gpu` can be locked to, ascending."""

    def lock_clock(self, gpu: int, mhz: int) -> None:
        """Lock the SM clock of `gpu` to `mhz`, a supported clock."""

    def unlock_clock(self, gpu: int) -> None:
        """Give the SM clock of `gpu` back to its driver."""

    def set_power_limit(self, gpu: int, watts: float) -> None:
        """Cap the power of `gpu` at `watts`, within its range."""


def open_gpus(spec: str) -> Gpus:
    """The GPUs that `spec` names: `nvml` or `sim:PATH`. Raises `GpuError` when they cannot be reached."""
    kind, _, path = spec.partition(":")
    if kind == "nvml":
        from replay.gpu.nvml import NvmlGpus

        return NvmlGpus()
    if kind == "sim":
        from replay.gpu.sim import SimGpus

        return SimGpus(path)
    raise GpuError(f"'{spec}' names no GPUs; use nvml or sim:PATH")


def open_power(spec: str) -> PowerSource:
    """The power source that `spec` names: GPUs as `open_gpus` has them, `csv:PATH` or `prometheus:URL`.

    Raises `GpuError` when it cannot be reached.
    """
    kind, _, where = spec.partition(":")
    if kind == "csv":
        from replay.gpu.meter import CsvMeter

        return CsvMeter(where)
    if kind == "prometheus":
        from replay.gpu.prometheus import PrometheusPower

        return PrometheusPower(where)
    return open_gpus(spec)
