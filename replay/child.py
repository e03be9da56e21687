"""A process beside the run, which answers in lines of JSON and ends when its standard input closes.

That happens on every way that replay can end, SIGKILL included, so what such a process undoes or finishes is undone
and finished always. `Child` is the parent's side of it; `say` and `parent_left` are the process's own.
"""

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from replay.clock import NS_PER_S, now_ns


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

    async def start(self, first: bytes | None = None) -> dict[str, Any] | None:
        """Start it; its first message, None when it ended without one. Cancelled, it leaves no process.

        `first`: a line that it is told before.
        """
        self.process = await asyncio.create_subprocess_exec(
            *self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        if first is not None:
            self.tell(first)
        try:
            return await anext(self.messages(), None)
        except BaseException:
            await self.stop()
            raise

    def tell(self, line: bytes) -> None:
        """Write `line` to its standard input."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(line + b"\n")

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


def say(message: Mapping[str, Any]) -> None:
    """Tell the parent, which may have died: then there is nobody to tell, and the process goes on to its end."""
    # Unbuffered: what a closed pipe did not take would be an error again when the interpreter ends.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")


def parent_left(until_ns: int) -> bool:
    """Wait for standard input to close, at most until `until_ns`; whether it has."""
    timeout_s = max(0.0, (until_ns - now_ns()) / NS_PER_S)
    readable, _, _ = select.select([0], [], [], timeout_s)
    return bool(readable) and os.read(0, 4096) == b""
