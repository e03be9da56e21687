"""Lock SM clocks for as long as a run lasts.

`ClockLock` starts a small process that locks the clocks and gives them back when its standard input closes: at the end
of the run, on an error, on Ctrl-C, and when replay is killed with SIGKILL. Whether the clocks held under load is told
by the readings (`replay.verdicts.clocks_held`).
"""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

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


class ClockLock:
    """SM clocks of some GPUs, locked while this async context lasts."""

    def __init__(self, spec: str, indices: Sequence[int], mhz: int) -> None:
        """`spec` as for `open_gpus`; `mhz` a supported clock."""
        self._argv = [sys.executable, "-m", "replay.gpu.clocks", spec, ",".join(map(str, indices)), str(mhz)]
        self._holder: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        """Lock. Raises `GpuError` when the driver refuses; then nothing is left changed."""
        self._holder = await asyncio.create_subprocess_exec(
            *self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._holder.stdout is not None
        try:
            line = await self._holder.stdout.readline()
        except BaseException:  # cancelled: a context that was not entered is not left either
            await self.__aexit__()
            raise
        answer = json.loads(line) if line else {"error": "the process that locks clocks ended without a word"}
        if "error" in answer:
            await self._holder.wait()
            raise GpuError(answer["error"])
        return self

    async def __aexit__(self, *_: object) -> None:
        """Restore, and wait until it is done."""
        if self._holder is not None and self._holder.stdin is not None:
            self._holder.stdin.close()
            await self._holder.wait()


def hold(spec: str, indices: Sequence[int], mhz: int) -> None:
    """Lock, say so on stdout, wait for stdin to close, restore."""
    with ExitStack() as stack:  # one GPU that refuses does not keep the others locked
        gpus = open_gpus(spec)
        stack.callback(gpus.close)
        for gpu in indices:
            gpus.lock_clock(gpu, mhz)
            stack.callback(gpus.unlock_clock, gpu)
        print(json.dumps({"locked_mhz": mhz}), flush=True)  # noqa: T201 - the answer to the parent
        sys.stdin.buffer.read()


def _main(argv: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        hold(argv[0], [int(gpu) for gpu in argv[1].split(",")], int(argv[2]))
    except WattraceError as error:
        print(json.dumps({"error": str(error)}), flush=True)  # noqa: T201 - the answer to the parent


if __name__ == "__main__":
    _main(sys.argv[1:])
