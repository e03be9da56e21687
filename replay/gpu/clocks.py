"""How GPUs run now, and giving them back to their driver: `replay clocks show` and `replay clocks reset`.

Whether a clock is locked cannot be shown: no driver tells it. What tells is the SM clock beside the supported ones,
and the reasons that throttle it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from replay.gpu.base import GpuInfo, Gpus
from replay.verdicts import THROTTLE_REASONS
from tracegen.errors import GpuError


def show(gpus: Gpus) -> list[dict[str, Any]]:
    """One entry a GPU: who it is, its clocks (MHz), power and limits (W), temperature (°C), utilization (%), processes.

    What a driver does not tell is None; `error` says why all of it is, on a GPU that does not answer.
    """
    return [_entry(gpus, device) for device in gpus.devices()]


def reset(gpus: Gpus, indices: Sequence[int]) -> tuple[list[str], list[str]]:
    """Unlock the SM clocks of `indices` and restore their default power limits: what was done, and what was refused.

    A GPU that refuses does not keep the others from being reset.
    """
    done: list[str] = []
    refused: list[str] = []

    def attempt(step: Callable[[Gpus, int], str], gpu: int) -> None:
        try:
            done.append(step(gpus, gpu))
        except GpuError as error:
            refused.append(str(error))

    for gpu in indices:
        attempt(_unlock, gpu)
        attempt(_uncap, gpu)
    return done, refused


def _unlock(gpus: Gpus, gpu: int) -> str:
    gpus.unlock_clock(gpu)
    return f"GPU {gpu}: the SM clock is the driver's"


def _uncap(gpus: Gpus, gpu: int) -> str:
    state = gpus.state(gpu)
    limit_w, default_w = state.power_limit_w, state.power_limit_default_w
    if default_w is None or limit_w is None:
        return f"GPU {gpu}: it has no power limit that could be changed"
    if limit_w == default_w:
        return f"GPU {gpu}: the power limit is the default, {default_w:g} W"
    gpus.set_power_limit(gpu, default_w)
    return f"GPU {gpu}: the power limit is the default again, {default_w:g} W (it was {limit_w:g} W)"


def _entry(gpus: Gpus, device: GpuInfo) -> dict[str, Any]:
    """What `show` tells of `device`."""
    entry: dict[str, Any] = {"gpu": device.gpu, "uuid": device.uuid, "name": device.name, "error": None}
    try:
        return entry | _now(gpus, device.gpu)
    except GpuError as error:
        return entry | dict.fromkeys(_KEYS) | {"error": str(error)}


_KEYS = (
    "sm_clock_mhz", "sm_clock_lowest_mhz", "sm_clock_highest_mhz", "mem_clock_mhz", "throttled_by", "power_w",
    "power_limit_w", "power_limit_default_w", "power_limit_range_w", "temperature_c", "utilization", "mig", "processes",
)  # fmt: skip


def _now(gpus: Gpus, gpu: int) -> dict[str, Any]:
    """The values of `_KEYS` for `gpu`."""
    reading, state, clocks = gpus.read(gpu), gpus.state(gpu), gpus.supported_clocks_mhz(gpu)
    power_mw = reading.power_average_mw if reading.power_instant_mw is None else reading.power_instant_mw
    reasons = reading.throttle_reasons
    values = (
        reading.sm_clock_mhz,
        clocks[0] if clocks else None,
        clocks[-1] if clocks else None,
        reading.mem_clock_mhz,
        None if reasons is None else [name for bit, name in THROTTLE_REASONS.items() if reasons & bit],
        None if power_mw is None else power_mw / 1000,
        state.power_limit_w,
        state.power_limit_default_w,
        state.power_limit_range_w,
        reading.temperature_c,
        reading.utilization,
        state.mig,
        [asdict(process) for process in state.processes],
    )
    return dict(zip(_KEYS, values, strict=True))
