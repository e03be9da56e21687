"""The simulated engine: a real HTTP server in a process of its own, with simulated time, power and GPUs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import polars as pl

from replay.engines.attach import ask_models
from replay.engines.base import Served
from replay.engines.process import ServerProcess
from replay.rundir import has_table, scan_table
from replay.sim.arguments import capped
from replay.sim.hardware import Hardware
from replay.sim.truth import shapley_truth


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
    ) -> None:
        """`board` is the simulated driver's file; steps and segments are recorded into `run_dir`.

        `hardware` has `vllm_args` in it already; the server has to be told them. `power_cap_w` is on the board.
        Steps are numbered from `first_step` on.
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
