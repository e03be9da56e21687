"""Run GPUs at a clock and under a power cap for as long as a run lasts.

`GpuSettings` starts a small process that sets both and gives both back when its standard input closes: at the end of
the run, on an error, on Ctrl-C, and when replay is killed with SIGKILL. Whether the clocks held under load is told by
the readings (`replay.verdicts.clocks`).

A clock is given back by unlocking it, for a driver does not tell whether, and at what, it was locked before; a cap by
restoring the limit that was there before. Should that process itself be killed with SIGKILL, replay restores both when
the run ends; where it was killed too, they stay as they are until `replay clocks reset`.
"""

import asyncio
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Self

from replay.child import Child, say
from replay.gpu.base import Gpus, open_gpus
from tracegen.errors import GpuError, WattraceError


def nearest_clock(gpus: Gpus, indices: Sequence[int], mhz: int) -> int:
    """The supported SM clock nearest to `mhz` (the lower of two).

    Raises `GpuError` when `mhz` lies outside what one of the cards supports.
    """
    nearest = mhz
    for gpu in indices:
        clocks = gpus.supported_clocks_mhz(gpu)
        if not clocks:
            raise GpuError(f"GPU {gpu} lists no supported SM clocks; run without --freq")
        if not clocks[0] <= mhz <= clocks[-1]:
            raise GpuError(
                f"--freq {mhz}: GPU {gpu} supports SM clocks from {clocks[0]} to {clocks[-1]} MHz; choose one of these"
            )
        nearest = min(clocks, key=lambda clock: (abs(clock - mhz), clock))
    return nearest


def check_power_cap(gpus: Gpus, indices: Sequence[int], watts: float) -> dict[int, float]:
    """The power limit in W that each card has now, to restore after a cap at `watts`.

    Raises `GpuError` when one of the cards cannot be capped at `watts`, with the range that it takes.
    """
    limits_w = {}
    for gpu in indices:
        state = gpus.state(gpu)
        # Without the limit that is there now it could not be restored.
        if state.power_limit_range_w is None or state.power_limit_w is None:
            raise GpuError(f"--power-cap {watts:g}: GPU {gpu} takes no power cap; run without --power-cap")
        low, high = state.power_limit_range_w
        if not low <= watts <= high:
            raise GpuError(f"--power-cap {watts:g}: GPU {gpu} takes {low:g} to {high:g} W; choose a cap in this range")
        limits_w[gpu] = state.power_limit_w
    return limits_w


class GpuSettings:
    """Clock and power cap of some GPUs, held while this async context lasts."""

    def __init__(
        self, spec: str, indices: Sequence[int], mhz: int | None = None, power_cap_w: float | None = None
    ) -> None:
        """`spec` as for `open_gpus`; `mhz` a supported clock; None leaves clock or cap as they are."""
        wanted = json.dumps({"indices": [*indices], "mhz": mhz, "power_cap_w": power_cap_w})
        self._spec, self._indices, self._mhz = spec, [*indices], mhz
        self._limits_w: dict[int, float] = {}  # those that were there before
        self._holder = Child("replay.gpu.settings", spec, wanted)
        self.not_restored: str | None = None  # afterwards: what could not be given back, and why

    async def __aenter__(self) -> Self:
        """Set. Raises `GpuError` when the driver refuses; then nothing is left changed."""
        answer = await self._holder.start() or {"error": "the process that sets the GPUs ended without a word"}
        if "error" in answer:
            await self._holder.stop()
            raise GpuError(answer["error"])
        self._limits_w = {int(gpu): watts for gpu, watts in answer["limits_w"].items()}
        return self

    async def __aexit__(self, *_: object) -> None:
        """Restore, and wait until it is done. What a lost GPU refuses is in `not_restored`: it spoils no run."""
        words = await self._holder.stop()
        self.not_restored = next((word["error"] for word in words if "error" in word), None)
        if self._holder.process is not None and self._holder.process.returncode:  # killed: nobody has restored
            self.not_restored = await asyncio.to_thread(restore, self._spec, self._indices, self._mhz, self._limits_w)


def restore(spec: str, indices: Sequence[int], mhz: int | None, limits_w: Mapping[int, float]) -> str | None:
    """Unlock clocks, if `mhz` was locked, and set power limits to `limits_w`; what was refused, None: nothing."""
    refused: list[str] = []
    try:
        with closing(open_gpus(spec)) as gpus:
            for gpu in indices:
                if mhz is not None:
                    _give_back(refused, "the clock", gpus.unlock_clock, gpu)
                if gpu in limits_w:
                    _give_back(refused, "the power limit", gpus.set_power_limit, gpu, limits_w[gpu])
    except GpuError as error:  # there is no driver any more
        refused.append(f"clocks and power limits are not given back: {error}")
    return "; ".join(refused) or None


def hold(
    spec: str, indices: Sequence[int], mhz: int | None, power_cap_w: float | None, wait: Callable[[], None]
) -> None:
    """Set, say so on stdout, `wait`, restore. Raises `GpuError` with all that was refused, setting or restoring."""
    refused: list[str] = []
    try:
        with closing(open_gpus(spec)) as gpus, ExitStack() as settings:
            limits_w = {} if power_cap_w is None else check_power_cap(gpus, indices, power_cap_w)
            for gpu in indices:
                if mhz is not None:
                    gpus.lock_clock(gpu, mhz)
                    settings.callback(_give_back, refused, "the clock", gpus.unlock_clock, gpu)
                if power_cap_w is not None:
                    gpus.set_power_limit(gpu, power_cap_w)
                    settings.callback(_give_back, refused, "the power limit", gpus.set_power_limit, gpu, limits_w[gpu])
            say({"mhz": mhz, "power_cap_w": power_cap_w, "limits_w": limits_w})
            wait()
    except GpuError as error:
        refused.insert(0, str(error))
    if refused:
        raise GpuError("; ".join(refused))


def _give_back(refused: list[str], what: str, function: Callable[..., None], gpu: int, *arguments: float) -> None:
    """Call `function` for `gpu`; one that refuses is noted in `refused` and does not keep the others set."""
    try:
        function(gpu, *arguments)
    except GpuError as error:
        refused.append(f"{what} of GPU {gpu} is not given back: {error}")


def _main(argv: list[str]) -> None:
    # A signal ends the waiting and interrupts nothing: neither setting nor restoring is left half done.
    signalled, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        hold(argv[0], **json.loads(argv[1]), wait=lambda: _wait([0, signalled]))
    except WattraceError as error:
        say({"error": str(error)})


def _wait(descriptors: list[int]) -> None:
    """Return when one of `descriptors` has something to say, or has closed."""
    select.select(descriptors, [], [])


if __name__ == "__main__":
    _main(sys.argv[1:])
