"""Named streams of random numbers: one seed, and an independent stream for each purpose and window of time."""

import numpy as np

from tracegen.errors import TraceError

_NO_BYTE = 256  # what no byte of a purpose is, so that windows and purposes are told apart


def random_stream(seed: int, purpose: str, window: int = 0) -> np.random.Generator:
    """A generator that the arguments determine; those of other purposes or windows of one seed are independent of it.

    A stream of its own for each purpose keeps fields from moving together, and a purpose that draws more numbers
    leaves the others as they were. A stream for each window lets a part of a trace be made without the rest.
    Raises `TraceError` for a negative seed.
    """
    if seed < 0:
        raise TraceError(f"seed {seed} is negative; use 0 or more")
    if window < 0:
        purpose, window = f"{purpose} before the start", -window
    key = [seed, *purpose.encode(), *([_NO_BYTE + window] if window else [])]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
