"""Start a server process on a leash, wait until it is ready, end it with all its children."""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import aiohttp

from replay.clock import NS_PER_S, now_ns
from replay.stream import printable
from tracegen.errors import ReplayError

_POLL_S = 0.1
_LOG_BYTES = 64 * 1024  # of its end: a traceback of several processes
_LINE_CHARS = 100
# `(EngineCore pid=12) ERROR 11-23 03:11:52 [core.py:123] `, as vLLM's processes begin their lines.
_PREFIX = re.compile(r"^(\(\w+[^)]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s*)?")
_RAISED = re.compile(r"[\w.]*(Error|Exception|Exit)\b.*: ")
_CONSEQUENCE = re.compile(r"root cause|Engine core initialization failed|EngineDeadError")  # of an error said before


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise `ReplayError` when `port` of this host cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ReplayError(f"--port {port}: {why}; choose another, or leave --port out for a free one") from None


class ServerProcess:
    """A server process whose output goes to a log file."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """`name` is how errors call it; `env` is added to this process's environment."""
        self._name, self._argv, self._log = name, list(argv), log
        self._env = {**os.environ, **(env or {})}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "replay.leash", "--", *self._argv,
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._env, start_new_session=True,
            )  # fmt: skip

    async def wait_ready(self, base_url: str, timeout_s: float, progress: Callable[[str], None]) -> None:
        """Return when `/health` answers. Raises `ReplayError` with the log's last words when it ends or is too slow."""
        start_ns = now_ns()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while self.alive():
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with session.get(f"{base_url}/health") as answer:
                        if answer.status == 200:
                            return
                waited_s = (now_ns() - start_ns) / NS_PER_S
                if waited_s > timeout_s:
                    raise ReplayError(
                        f"{self._name} was not ready within {timeout_s:g} s (--ready-check-timeout-sec); "
                        f"its last words: {self.last_words()}"
                    )
                progress(f"waiting for {self._name} ({waited_s:.0f} s): {self._last_line()}")
                await asyncio.sleep(_POLL_S)
        raise ReplayError(f"{self._name} ended while starting; its last words: {self.last_words()}")

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.returncode is None

    async def stop(self) -> None:
        """End it and wait for it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()

    def last_words(self) -> str:
        """What the log says last: the error that began the end, else an error, else anything."""
        lines = self._lines()
        errors = [line for line in lines if "error" in line.lower()]
        # A validation error says what is wrong in the line after.
        pairs = pairwise([*lines, ""])
        said = [then if "validation error" in line else line for line, then in pairs if _RAISED.match(line)]
        causes = [line for line in said if not _CONSEQUENCE.search(line)]
        return (causes or errors or lines or ["(it said nothing)"])[-1][:300]

    def _last_line(self) -> str:
        return (self._lines() or ["it has said nothing yet"])[-1][:_LINE_CHARS]

    def _lines(self) -> list[str]:
        """The end of the log, without what logging puts before each message."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LOG_BYTES))
            text = log.read().decode(errors="replace")
        return [printable(line) for raw in text.splitlines() if (line := _PREFIX.sub("", raw).strip())]
