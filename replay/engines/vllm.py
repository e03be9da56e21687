"""vLLM, launched as `vllm serve` on chosen GPUs."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import polars as pl

from replay.engines.attach import ask_models
from replay.engines.base import Served
from replay.engines.process import ServerProcess

DEFAULT_MODEL = "Qwen/Qwen3-8B"  # ungated, Apache-2.0, fits one 24 GB card in bf16


def vllm_installed() -> bool:
    """Whether this environment has vLLM."""
    return find_spec("vllm") is not None


class VllmEngine:
    """`replay.engines.base.Engine` for vLLM."""

    kind = "vllm"

    def __init__(
        self,
        model: str,
        tp: int,
        gpu_uuids: Sequence[str],
        port: int,
        python: str | None,
        arguments: Sequence[str],
        log: Path,
        timeout_s: float,
        progress: Callable[[str], None],
    ) -> None:
        """`python`: the interpreter whose vLLM serves, None for this one; `arguments` go to `vllm serve` as is."""
        self._base_url = f"http://127.0.0.1:{port}"
        self._timeout_s, self._progress = timeout_s, progress
        argv = [
            python or sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
            "--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(tp),
            "--enable-request-id-headers", *arguments,
        ]  # fmt: skip
        # UUIDs mean the same card in every library; indices do not.
        env = {"CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids)} if gpu_uuids else {}
        self._server = ServerProcess("vLLM", argv, log, env | {"VLLM_NO_USAGE_STATS": "1"})

    async def __aenter__(self) -> Self:
        """Start the server."""
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        """End it with its engine core and workers."""
        await self._server.stop()

    async def ready(self) -> Served:
        """Wait until the model is loaded."""
        await self._server.wait_ready(self._base_url, self._timeout_s, self._progress)
        # vLLM serves one model, under a name that the user's own arguments may set.
        return await ask_models(self._base_url, None, self._timeout_s)

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._server.alive()

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """A real engine's true energies are not known."""
        return None
