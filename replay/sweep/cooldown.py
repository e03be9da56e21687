"""Between two cells in wall time: wait until idle power is what it was before the block's first cell."""

import asyncio
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from replay.clock import NS_PER_S, now_ns
from replay.gpu.baseline import idle_power_w
from replay.gpu.sampler import Sampler
from replay.gpu.settings import GpuSettings
from replay.manifest import host
from replay.rundir import scan_table
from replay.summary import summarize

BACK_SHARE, BACK_W = 0.05, 3.0  # idle power is back within either; sensors are that exact ("Part-time Power
# Measurements", SC'24: gain error up to 5 %), and 3 W a few degrees of leakage
_SETTLE_S = 0.5  # as `replay.prepare` leaves between the last work and a baseline
_LEAST_WINDOW_NS = NS_PER_S


@dataclass(frozen=True)
class Baseline:
    """Idle power before a block's first cell, and what the GPUs were set to then."""

    idle_w: float
    gpus: tuple[int, ...]
    freq_mhz: int | None
    power_cap_w: float | None
    window_ns: int

    @classmethod
    def of(cls, run_dir: Path, manifest: Mapping[str, Any]) -> Self | None:
        """What the run in `run_dir` measured before it began; None where it measured none."""
        found, first = summarize(run_dir), manifest["instances"][0]
        window_ns = int(manifest["arguments"]["idle_ns"])
        if found["idle_power_w"] is None or not window_ns:
            return None
        window_ns = max(window_ns, _LEAST_WINDOW_NS)
        return cls(found["idle_power_w"], tuple(found["gpus"]), first["freq_mhz"], first["power_cap_w"], window_ns)

    def back(self, idle_w: float) -> bool:
        """Whether `idle_w` is as it was."""
        return idle_w - self.idle_w <= max(BACK_SHARE * self.idle_w, BACK_W)


async def cool_down(
    baseline: Baseline, spec: str, power_spec: str, folder: Path, max_ns: int, status: Callable[[str], None]
) -> dict[str, Any]:
    """Wait until the idle power of the GPUs, set as for `baseline`, is back, at most `max_ns`; what was waited for.

    `spec` and `power_spec` name the GPUs and where their power is read (`open_gpus`, `open_power`); `folder` takes the
    readings and is removed. The least that is waited is one measurement. Raises `GpuError` as a run would.
    """
    started_s, end_ns = time.monotonic(), now_ns() + max_ns
    idle_w, back = None, False
    _make_empty(folder)
    async with AsyncExitStack() as stack:
        if baseline.freq_mhz is not None or baseline.power_cap_w is not None:
            settings = GpuSettings(spec, baseline.gpus, baseline.freq_mhz, baseline.power_cap_w)
            await stack.enter_async_context(settings)
        sampler = await stack.enter_async_context(Sampler(power_spec, baseline.gpus, folder, host()))
        await asyncio.sleep(_SETTLE_S)
        while not back and (idle_w is None or now_ns() < end_ns):
            said = "" if idle_w is None else f": {idle_w:.0f} W, {baseline.idle_w:.0f} W before the first cell"
            status(f"cooling down until idle power is back{said}")
            idle_w = await _measure(sampler, baseline, folder)
            if idle_w is None:
                break
            back = baseline.back(idle_w)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "waited_s": round(time.monotonic() - started_s, 3), "idle_w": idle_w, "first_idle_w": baseline.idle_w,
        "back": back,
    }  # fmt: skip


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


async def _measure(sampler: Sampler, baseline: Baseline, folder: Path) -> float | None:
    """Idle power of all GPUs over one window, W; None where one does not say."""
    start_ns = now_ns()
    end_ns = start_ns + baseline.window_ns
    await asyncio.sleep(baseline.window_ns / NS_PER_S)
    await sampler.written_until(end_ns)
    power = scan_table(folder, "power").collect()
    total_w = 0.0
    for gpu in baseline.gpus:
        found = idle_power_w(power, gpu, start_ns, end_ns)
        if not found:
            return None
        total_w += found.get("counter") or found.get("instant") or found["average"]
    return total_w
