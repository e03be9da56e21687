"""A process beside the run, which answers in lines of JSON and ends when its standard input closes.

That happens on every way that replay can end, SIGKILL included, so what such a process undoes or finishes is undone
and finished always.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any


class Child:
    """`python -m MODULE ARGUMENTS` in a session of its own, so that Ctrl-C in the terminal does not reach it."""

    def __init__(self, module: str, *arguments: object) -> None:
        """What to start."""
        self.argv = [sys.executable, "-m", module, *map(str, arguments)]
        self.process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.returncode is None

    async def start(self) -> dict[str, Any] | None:
        """Start it; its first message, None when it ended without one. Cancelled, it leaves no process."""
        self.process = await asyncio.create_subprocess_exec(
            *self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            return await anext(self.messages(), None)
        except BaseException:
            await self.stop()
            raise

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it says from now on, to its end."""
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            yield json.loads(line)

    def close(self) -> None:
        """Tell it to end."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    async def stop(self) -> list[dict[str, Any]]:
        """Tell it to end, and wait until it has; its last messages."""
        self.close()
        if self.process is None:
            return []
        last = [message async for message in self.messages()]
        await self.process.wait()
        return last
