"""The boundary to GPUs: what is read from one and asked of one.

Two implementations: `replay.gpu.nvml.NvmlGpus` (the only module that imports pynvml) and `replay.gpu.sim.SimGpus`.
A process opens either from a short text, so that sampler and clock holder, processes of their own, find the same
board: `nvml`, or `sim:PATH` with the simulated board's file.
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
class Reading:
    """One poll of one GPU; None where the sensor does not exist."""

    power_instant_mw: int | None
    power_average_mw: int | None
    energy_mj: int | None
    sm_clock_mhz: int | None
    mem_clock_mhz: int | None
    temperature_c: int | None
    utilization: int | None  # percent
    throttle_reasons: int | None  # NVML bit mask


@dataclass(frozen=True)
class Sensor:
    """How a power sensor behaves: it updates every `period_ns` with the mean of `window_ns` that ended `lag_ns` ago."""

    period_ns: int
    window_ns: int
    lag_ns: int


class Gpus(Protocol):
    """The GPUs of one host. Every method raises `GpuError` with one clear line."""

    def devices(self) -> list[GpuInfo]:
        """All GPUs, by NVML index."""

    def read(self, gpu: int) -> Reading:
        """One reading of every sensor of `gpu`."""

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """The published behaviour of `instant` and `average` power on this model; a missing key is unknown."""

    def supported_clocks_mhz(self, gpu: int) -> list[int]:
        """The SM clocks that `gpu` can be locked to, ascending."""

    def lock_clock(self, gpu: int, mhz: int) -> None:
        """Lock the SM clock of `gpu` to `mhz`, a supported clock."""

    def unlock_clock(self, gpu: int) -> None:
        """Give the SM clock of `gpu` back to its driver."""

    def close(self) -> None:
        """Release the driver."""


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
