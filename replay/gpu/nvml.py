"""NVIDIA GPUs through NVML; the only module that imports pynvml."""

from collections.abc import Callable
from typing import Any

import pynvml

from replay.gpu.base import GpuInfo, Reading, Sensor
from tracegen.errors import GpuError

_MS = 1_000_000
_HOPPER_AMPERE = {
    "instant": Sensor(period_ns=100 * _MS, window_ns=25 * _MS, lag_ns=0),
    "average": Sensor(period_ns=100 * _MS, window_ns=1000 * _MS, lag_ns=0),
}
# Published behaviour of the power sensors by model ("Part-time Power Measurements", SC'24).
_SENSORS = {
    "H100": _HOPPER_AMPERE,
    "A100": {"instant": Sensor(period_ns=100 * _MS, window_ns=25 * _MS, lag_ns=0)},
    "V100": {"instant": Sensor(period_ns=20 * _MS, window_ns=10 * _MS, lag_ns=0)},
}
_NO_PERMISSION = (
    "changing clocks needs root or CAP_SYS_ADMIN; run with sudo, or without --freq at the driver's own clocks"
)


class NvmlGpus:
    """`replay.gpu.base.Gpus` over libnvidia-ml."""

    def __init__(self) -> None:
        """Load the driver's library. Raises `GpuError` when there is none or no GPU."""
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError as error:
            raise GpuError(f"no NVIDIA GPU can be reached ({error}); to run without one use --engine sim") from None
        if not self._handles:
            raise GpuError("the NVIDIA driver lists no GPU; to run without one use --engine sim")

    def devices(self) -> list[GpuInfo]:
        """All GPUs, by NVML index."""
        return [
            GpuInfo(i, _text(_ask(pynvml.nvmlDeviceGetUUID, h)), _text(_ask(pynvml.nvmlDeviceGetName, h)))
            for i, h in enumerate(self._handles)
        ]

    def read(self, gpu: int) -> Reading:
        """One reading of every sensor of `gpu`; None for what this model does not have."""
        handle = self._handle(gpu)
        instant, average = _power_fields(handle)
        usage = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
        return Reading(
            power_instant_mw=instant,
            power_average_mw=average,
            energy_mj=_optional(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),
            sm_clock_mhz=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            mem_clock_mhz=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            temperature_c=_optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            utilization=None if usage is None else usage.gpu,
            throttle_reasons=_optional(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
        )

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """The published behaviour of this model's power sensors; empty where none is published."""
        name = _text(_ask(pynvml.nvmlDeviceGetName, self._handle(gpu)))
        return next((sensors for model, sensors in _SENSORS.items() if model in name), {})

    def supported_clocks_mhz(self, gpu: int) -> list[int]:
        """The SM clocks at the highest memory clock, ascending."""
        handle = self._handle(gpu)
        memory = _ask(pynvml.nvmlDeviceGetSupportedMemoryClocks, handle)
        return sorted(_ask(pynvml.nvmlDeviceGetSupportedGraphicsClocks, handle, max(memory))) if memory else []

    def lock_clock(self, gpu: int, mhz: int) -> None:
        """Lock the SM clock of `gpu` to `mhz`."""
        _ask(pynvml.nvmlDeviceSetGpuLockedClocks, self._handle(gpu), mhz, mhz)

    def unlock_clock(self, gpu: int) -> None:
        """Give the SM clock of `gpu` back to the driver."""
        _ask(pynvml.nvmlDeviceResetGpuLockedClocks, self._handle(gpu))

    def close(self) -> None:
        """Release the library."""
        pynvml.nvmlShutdown()

    def _handle(self, gpu: int) -> Any:
        if not 0 <= gpu < len(self._handles):
            raise GpuError(f"GPU {gpu} does not exist; this host has GPUs 0 to {len(self._handles) - 1}")
        return self._handles[gpu]


def _power_fields(handle: Any) -> tuple[int | None, int | None]:
    """Instant and average power in mW; `nvmlDeviceGetPowerUsage` alone would be a 1 s average on Hopper."""
    ids = [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE]
    fields = _optional(pynvml.nvmlDeviceGetFieldValues, handle, ids)
    ok = pynvml.NVML_SUCCESS
    instant, average = (f.value.uiVal if f.nvmlReturn == ok else None for f in fields) if fields else (None, None)
    return instant, _optional(pynvml.nvmlDeviceGetPowerUsage, handle) if average is None else average


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML; its errors become one clear line."""
    try:
        return function(*arguments)
    except pynvml.NVMLError_NoPermission:
        raise GpuError(f"the driver refused {function.__name__}: {_NO_PERMISSION}") from None
    except pynvml.NVMLError as error:
        raise GpuError(f"{function.__name__} failed: {error}") from None


def _optional(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML; None where this GPU has no such sensor."""
    try:
        return function(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
    except pynvml.NVMLError as error:
        raise GpuError(f"{function.__name__} failed: {error}") from None


def _text(value: str | bytes) -> str:
    """NVML's strings, which some driver bindings give as bytes."""
    return value.decode() if isinstance(value, bytes) else value
