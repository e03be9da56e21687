"""The simulated engine: a real HTTP server in a process of its own, with simulated time, power and GPUs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import aiohttp
import polars as pl

from replay.engines.attach import ask_models
from replay.engines.base import Served
from replay.engines.process import ServerProcess
from replay.rundir import has_table, scan_table
from replay.sim.api import RECORD_PATH
from replay.sim.arguments import capped
from replay.sim.hardware import Hardware
from replay.sim.truth import shapley_truth
from tracegen.errors import ReplayError


class SimEngine:
    """`replay.engines.base.Engine` for the simulated engine."""

    kind = "simulated"
    step_log = None

    def __init__(
        self,
        hardware: Hardware,
        gpus: Sequence[int],
        model: str,
        port: int,
        board: Path,
        run_dir: Path,
        instance: int,
        log: Path,
        timeout_s: float,
        progress: Callable[[str], None],
        *,
        vllm_args: Sequence[str] = (),
        power_cap_w: float | None = None,
        first_step: int = 0,
        record_root: Path | None = None,
    ) -> None:
        """`board` is the simulated driver's file; steps and segments are recorded into `run_dir`.

        `hardware` has `vllm_args` in it already; the server has to be told them. `power_cap_w` is on the board.
        Steps are numbered from `first_step` on. `record_root`: where further run directories will be, if any.
        """
        self._hardware = Hardware(capped(hardware.profile, power_cap_w), hardware.tp)
        self._base_url = f"http://127.0.0.1:{port}"
        self._model, self._timeout_s, self._progress = model, timeout_s, progress
        arguments: dict[str, object] = {
            "--port": port,
            "--tp": hardware.tp,
            "--gpus": ",".join(map(str, gpus)),
            "--board": board,
            "--record": run_dir,
            "--instance": instance,
            "--first-step": first_step,
            "--hardware": hardware.profile.hardware,
            "--model": hardware.profile.model_name,
            "--served-model-name": model,
        }
        argv = [sys.executable, "-m", "replay.sim.server", *(str(part) for pair in arguments.items() for part in pair)]
        argv += [f"--vllm-arg={argument}" for argument in vllm_args]
        argv += [] if record_root is None else ["--record-root", str(record_root)]
        self.command = argv
        self._server = ServerProcess("the simulated engine", argv, log)

    async def __aenter__(self) -> Self:
        """Start the server."""
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        """End it; its tables are written when this returns."""
        await self._server.stop()

    async def ready(self) -> Served:
        """Wait until it answers."""
        await self._server.wait_ready(self._base_url, self._timeout_s, self._progress)
        return await ask_models(self._base_url, self._model, self._timeout_s)

    async def record_into(self, run_dir: Path | None) -> None:
        """Have what it did written, and the rest recorded into `run_dir` (absolute); None: nowhere."""
        body = {"run_dir": None if run_dir is None else str(run_dir)}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s)) as session,
            session.post(f"{self._base_url}{RECORD_PATH}", json=body) as answer,
        ):
            if answer.status != 200:
                raise ReplayError(f"the simulated engine records no other run: {await answer.text()}")

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._server.alive()

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """Each request's Shapley value of the simulator's own step energies."""
        if not (has_table(run_dir, "steps") and has_table(run_dir, "segments")):
            return None
        return shapley_truth(
            scan_table(run_dir, "steps").collect(), scan_table(run_dir, "segments").collect(), self._hardware
        )
