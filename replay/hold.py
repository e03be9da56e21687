"""Who writes into a run directory: one replay at a time, and others can tell whether it still does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracegen.errors import ReplayError


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Have `run_dir` to ourselves for as long as the context lasts; a kill gives it back too, and leaves no file.

    Raises `ReplayError` when another replay has it.
    """
    import fcntl

    folder = os.open(run_dir, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReplayError(f"{run_dir}: another replay is still writing there; wait for it, or end it") from None
        yield
    finally:
        os.close(folder)


def held(run_dir: Path) -> bool:
    """Whether a replay on this host writes into `run_dir` now."""
    try:
        with hold(run_dir):
            return False
    except ReplayError:
        return True
    except (ImportError, OSError):  # no such locks on this system or file system: nobody can tell
        return False
