"""A load worker: `python -m replay.worker RUN_DIR NUMBER`, started by `replay.workers`.

It is told on standard input what to send (a line of JSON, `replay.workload.Config`) and, when it has said that it is
ready, from when on (`Begin`). It says on standard output how it stands, four times a second, and at its end how exact
its times are. When standard input closes, which happens on every way that replay can end, it gives up what is in
flight, writes the records and ends.
"""

import errno
import gc
import os
import resource
import signal
import sys
import traceback
from typing import Any, Protocol

import msgspec

from replay.tally import tell
from replay.workload import Begin, Config

_LINE_LIMIT = 1 << 20


class Path(Protocol):
    """A way to send requests and read their answers; made, it is ready."""

    def run(self, epoch_ns: int) -> None:
        """Send from `epoch_ns` on, until all have ended or standard input closes."""

    def last_message(self) -> dict[str, Any]:
        """What there is to say at the end."""


def read_line() -> bytes | None:
    """The next line of standard input, read by itself alone: nothing behind it is taken; None where it ends."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _LINE_LIMIT:
        if not (byte := os.read(0, 1)):
            return None
        line += byte
    return bytes(line)


def _send(config: Config) -> None:
    """Make ready, wait for the beginning, and send."""
    path: Path
    if config.fast:
        from replay.fastpath import FastPath

        path = FastPath(config, tell)
    else:
        from replay.generalpath import GeneralPath

        path = GeneralPath(config, tell)
    # No collector pauses while requests are timed; reference counting goes on.
    gc.collect()
    gc.freeze()
    gc.disable()
    tell({"ready": True, "pid": os.getpid()}, wait=True)
    if (line := read_line()) is None:
        return
    path.run(msgspec.json.decode(line, type=Begin).epoch_ns)
    tell(path.last_message(), wait=True)


def main() -> int:
    """Be a load worker; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # stdin tells
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if (line := read_line()) is None:
        return 0
    try:
        _send(msgspec.json.decode(line, type=Config))
    except OSError as error:
        what = "disk" if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS} else "error"
        tell({what: error.errno, "why": f"{error.strerror or error}"}, wait=True)
        return 1
    except Exception:  # noqa: BLE001 - a bug is told to the one who started this
        tell({"bug": traceback.format_exc()}, wait=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
