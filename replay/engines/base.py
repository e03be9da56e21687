"""The boundary to servers: how replay starts one, finds it and ends it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import polars as pl


@dataclass(frozen=True)
class Served:
    """What a server that is ready serves."""

    base_url: str  # without a trailing slash
    model: str
    max_model_len: int | None  # None where the server does not say
    simulated: bool = False  # whether the server says so of itself
    api_key: str | None = field(default=None, repr=False)  # sent as a bearer token; never written down


class Engine(Protocol):
    """A server for the length of a run, as an async context; leaving it ends what it started."""

    kind: str  # `simulated`, `vllm` or `attached`

    @property
    def command(self) -> list[str] | None:
        """What is started, without keys; None where nothing is."""

    @property
    def step_log(self) -> Path | None:
        """Where vLLM's step recorder logs; None where the engine writes its own steps, or none."""

    async def __aenter__(self) -> Self:
        """Start the server, if it is ours to start."""

    async def __aexit__(self, *error: object) -> None:
        """End the server, if it is ours to end."""

    async def ready(self) -> Served:
        """Wait until it answers. Raises `ReplayError` when it does not, in the server's own words."""

    def alive(self) -> bool:
        """Whether the server still runs, as far as can be seen."""

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """Each request's true energy where the engine is simulated, from the tables in `run_dir`."""
