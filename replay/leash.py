"""Run a command that does not outlive this program's parent: `python -m replay.leash -- COMMAND ...`.

The leash sits between replay and a server. It ends the server's whole process group when its standard input closes,
which happens on every way that replay can end, SIGKILL included. It has a session of its own, so Ctrl-C in the
terminal reaches replay alone, which decides what to do.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

_GRACE_S = 10.0  # between SIGTERM and SIGKILL
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Run `argv[1:]` behind `--`; return its exit code."""
    if argv[:1] != ["--"] or len(argv) < 2:
        print("usage: python -m replay.leash -- COMMAND ...", file=sys.stderr)  # noqa: T201 - a program's usage line
        return 2
    ending = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: ending.set())
    child = subprocess.Popen(
        argv[1:],
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - there are no threads yet
    )
    threading.Thread(target=_watch_stdin, args=(ending,), daemon=True).start()
    while child.poll() is None and not ending.wait(_POLL_S):
        pass
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    # The server's own children (engine core, workers) may have outlived it.
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _watch_stdin(ending: threading.Event) -> None:
    """Set `ending` once standard input is closed."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    ending.set()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    """Have the kernel end this process should the leash itself be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
