"""Servers that outlast a run: what starts one is done once for all cells of a sweep that it can serve."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import polars as pl

from replay.engines.base import Engine, Served
from tracegen.errors import WattraceError


@runtime_checkable
class Recording(Protocol):
    """An engine that writes its steps itself."""

    async def record_into(self, run_dir: Path | None) -> None:
        """Write what was recorded, and record into `run_dir` from now on; None: nowhere."""


class KeptServers:
    """The servers of several runs, one run after the other, as an async context; leaving it ends them."""

    def __init__(self, folder: Path) -> None:
        """Their logs, and what else belongs to all runs, go to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.broken: str | None = None  # why a server could not be started
        self.runs = 0  # that they were lent to
        self._engines: dict[int, Engine] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Nothing is started yet: the first run does."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """End all."""
        await self._stack.aclose()

    @property
    def started(self) -> bool:
        """Whether they have been started."""
        return bool(self._engines)

    @property
    def lost(self) -> bool:
        """Whether one has ended by itself, or was never ready."""
        return self.broken is not None or not all(engine.alive() for engine in self._engines.values())

    def lend(self, number: int, own: Engine, run_dir: Path) -> Engine:
        """The server of instance `number` for the run in `run_dir`, which would have started `own`."""
        self.runs += number == 0
        return _Lent(self, number, own, run_dir.resolve())

    async def take(self, number: int, own: Engine, run_dir: Path) -> Engine:
        """The server, started now if it was not before."""
        if number in self._engines:
            engine = self._engines[number]
            if isinstance(engine, Recording):
                await engine.record_into(run_dir)
            return engine
        self._engines[number] = await self._stack.enter_async_context(own)
        return own


class _Lent:
    """`replay.engines.base.Engine` of one run: a kept server, which goes on afterwards."""

    def __init__(self, servers: KeptServers, number: int, own: Engine, run_dir: Path) -> None:
        self.kind, self._servers, self._number, self._own, self._run_dir = own.kind, servers, number, own, run_dir
        self._engine: Engine | None = None

    @property
    def command(self) -> list[str] | None:
        """What was started."""
        kept = self._servers._engines.get(self._number)  # noqa: SLF001 - two halves of one thing
        return (kept or self._own).command

    @property
    def step_log(self) -> Path | None:
        """Where the server's recorder logs."""
        return (self._engine or self._own).step_log

    async def __aenter__(self) -> Self:
        """Borrow it."""
        self._engine = await self._servers.take(self._number, self._own, self._run_dir)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Give it back; the run's tables are written when this returns."""
        if isinstance(self._engine, Recording) and self.alive() and self._servers.broken is None:
            await self._engine.record_into(None)

    async def ready(self) -> Served:
        """Wait until it answers."""
        assert self._engine is not None
        try:
            return await self._engine.ready()
        except WattraceError as error:
            self._servers.broken = str(error)
            raise

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._engine is not None and self._engine.alive()

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """By what this run asked for: its power cap may differ from the first run's."""
        return self._own.truth(run_dir)
