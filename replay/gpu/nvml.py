"""NVIDIA GPUs through NVML; the only module that imports pynvml."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

from replay.gpu.base import GpuInfo, GpuProcess, GpuState, Reading, Sensor
from tracegen.errors import GpuError

_MS = 1_000_000
_MIB = 1 << 20
_MW = 1000  # a watt's
_NAME_LENGTH = 60  # of a process: enough to know it by
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
# What to do without the permission to change something.
_NO_PERMISSION = {
    "nvmlDeviceSetGpuLockedClocks": "changing clocks needs root or CAP_SYS_ADMIN; run with sudo, or without --freq at "
    "the driver's own clocks",
    "nvmlDeviceResetGpuLockedClocks": "changing clocks needs root or CAP_SYS_ADMIN; run with sudo",
    "nvmlDeviceSetPowerManagementLimit": "changing power limits needs root or CAP_SYS_ADMIN; run with sudo, or "
    "without --power-cap",
}
_LOST = "it fell off the bus; the kernel's log (dmesg) tells why, a reset or a reboot brings it back"
# A driver without the function, a card without the sensor, and one that a container may not ask.
_NOT_TOLD = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission)


class NvmlGpus:
    """`replay.gpu.base.Gpus` over libnvidia-ml."""

    def __init__(self) -> None:
        """Load the driver's library. Raises `GpuError` when there is none, no GPU, or one that does not answer."""
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise GpuError(f"no NVIDIA GPU can be reached ({error}); to run without one use --engine sim") from None
        self._handles = [_open(gpu) for gpu in range(count)]
        if not self._handles:
            raise GpuError("the NVIDIA driver lists no GPU; to run without one use --engine sim")

    def devices(self) -> list[GpuInfo]:
        """All GPUs, by NVML index."""
        return [
            GpuInfo(
                gpu, _text(self._ask(pynvml.nvmlDeviceGetUUID, gpu)), _text(self._ask(pynvml.nvmlDeviceGetName, gpu))
            )
            for gpu in range(len(self._handles))
        ]

    def read(self, gpu: int) -> Reading:
        """One reading of every sensor of `gpu`; None for what this model does not have."""
        instant, average = self._power_mw(gpu)
        usage = self._optional(pynvml.nvmlDeviceGetUtilizationRates, gpu)
        return Reading(
            power_instant_mw=instant,
            power_average_mw=average,
            energy_mj=self._optional(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu),
            sm_clock_mhz=self._optional(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            mem_clock_mhz=self._optional(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
            temperature_c=self._optional(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
            utilization=None if usage is None else usage.gpu,
            throttle_reasons=self._optional(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu),
        )

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """The published behaviour of this model's power sensors; empty where none is published."""
        name = _text(self._ask(pynvml.nvmlDeviceGetName, gpu))
        return next((sensors for model, sensors in _SENSORS.items() if model in name), {})

    def driver_version(self) -> str | None:
        """The driver's version, as nvidia-smi shows it."""
        try:
            return _text(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return None

    def state(self, gpu: int) -> GpuState:
        """How `gpu` stands now; a driver too old to leave its own reservation out tells no used memory."""
        mig = self._optional(pynvml.nvmlDeviceGetMigMode, gpu)
        memory = self._optional(pynvml.nvmlDeviceGetMemoryInfo, gpu, pynvml.nvmlMemory_v2)
        any_memory = memory or self._optional(pynvml.nvmlDeviceGetMemoryInfo, gpu)
        limit_mw, default_mw, range_mw = (
            self._optional(function, gpu)
            for function in (
                pynvml.nvmlDeviceGetPowerManagementLimit,
                pynvml.nvmlDeviceGetPowerManagementDefaultLimit,
                pynvml.nvmlDeviceGetPowerManagementLimitConstraints,
            )
        )
        return GpuState(
            mig=mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
            memory_total_mib=None if any_memory is None else any_memory.total // _MIB,
            memory_used_mib=None if memory is None else memory.used // _MIB,
            processes=self._processes(gpu),
            power_limit_w=None if limit_mw is None else limit_mw / _MW,
            power_limit_default_w=None if default_mw is None else default_mw / _MW,
            power_limit_range_w=None if range_mw is None else (range_mw[0] / _MW, range_mw[1] / _MW),
        )

    def supported_clocks_mhz(self, gpu: int) -> list[int]:
        """The SM clocks at the highest memory clock, ascending; empty where the driver lists none."""
        memory = self._optional(pynvml.nvmlDeviceGetSupportedMemoryClocks, gpu)
        return sorted(self._ask(pynvml.nvmlDeviceGetSupportedGraphicsClocks, gpu, max(memory))) if memory else []

    def lock_clock(self, gpu: int, mhz: int) -> None:
        """Lock the SM clock of `gpu` to `mhz`."""
        self._ask(pynvml.nvmlDeviceSetGpuLockedClocks, gpu, mhz, mhz)

    def unlock_clock(self, gpu: int) -> None:
        """Give the SM clock of `gpu` back to the driver."""
        self._ask(pynvml.nvmlDeviceResetGpuLockedClocks, gpu)

    def set_power_limit(self, gpu: int, watts: float) -> None:
        """Cap the power of `gpu` at `watts`, within its range."""
        self._ask(pynvml.nvmlDeviceSetPowerManagementLimit, gpu, round(watts * _MW))

    def close(self) -> None:
        """Release the library."""
        pynvml.nvmlShutdown()

    def _power_mw(self, gpu: int) -> tuple[int | None, int | None]:
        """Instant and average power; `nvmlDeviceGetPowerUsage` alone would be a 1 s average on Hopper."""
        ids = [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE]
        fields = self._optional(pynvml.nvmlDeviceGetFieldValues, gpu, ids)
        ok = pynvml.NVML_SUCCESS
        instant, average = (f.value.uiVal if f.nvmlReturn == ok else None for f in fields) if fields else (None, None)
        return instant, self._optional(pynvml.nvmlDeviceGetPowerUsage, gpu) if average is None else average

    def _processes(self, gpu: int) -> tuple[GpuProcess, ...]:
        """Who computes or draws on `gpu`, by process id; a container sees only what its driver shows it."""
        compute = self._optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, gpu)
        if compute is None:
            compute = self._optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, gpu)
        graphics = self._optional(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, gpu)
        found = {process.pid: process.usedGpuMemory for process in [*(graphics or ()), *(compute or ())]}
        return tuple(
            GpuProcess(pid, _process_name(pid), None if used is None else used // _MIB)
            for pid, used in sorted(found.items())
        )

    def _ask(self, function: Callable[..., Any], gpu: int, *arguments: Any) -> Any:
        """Call NVML on `gpu`; its errors become one clear line."""
        handle = self._handle(gpu)
        try:
            return function(handle, *arguments)
        except pynvml.NVMLError as error:
            raise _failure(gpu, function.__name__, error) from None

    def _optional(self, function: Callable[..., Any], gpu: int, *arguments: Any) -> Any:
        """Call NVML on `gpu`; None where it is not told."""
        handle = self._handle(gpu)
        try:
            return function(handle, *arguments)
        except _NOT_TOLD:
            return None
        except pynvml.NVMLError as error:
            raise _failure(gpu, function.__name__, error) from None

    def _handle(self, gpu: int) -> Any:
        if not 0 <= gpu < len(self._handles):
            raise GpuError(f"GPU {gpu} does not exist; this host has GPUs 0 to {len(self._handles) - 1}")
        return self._handles[gpu]


def _open(gpu: int) -> Any:
    """NVML's handle of `gpu`; a driver that cannot give one of them is in no state to be measured on."""
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(gpu)
    except pynvml.NVMLError as error:
        raise _failure(gpu, "nvmlDeviceGetHandleByIndex", error) from None


def _failure(gpu: int, function: str, error: Exception) -> GpuError:
    """NVML's `error` in one line, with what to do about it where that is known."""
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return GpuError(f"GPU {gpu}: the driver refused {function}: {_NO_PERMISSION.get(function, error)}")
    lost = f": {_LOST}" if isinstance(error, pynvml.NVMLError_GpuIsLost) else ""
    return GpuError(f"GPU {gpu}: {function} failed: {error}{lost}")


def _process_name(pid: int) -> str | None:
    """The command of process `pid`, shortened; None where it cannot be seen from here."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        words = ""
    if not words:
        try:
            words = _text(pynvml.nvmlSystemGetProcessName(pid))
        except pynvml.NVMLError:
            return None
    return words if len(words) <= _NAME_LENGTH else words[: _NAME_LENGTH - 3] + "..."


def _text(value: str | bytes) -> str:
    """NVML's strings, which some driver bindings give as bytes."""
    return value.decode() if isinstance(value, bytes) else value
