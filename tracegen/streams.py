"""Named streams of random numbers: one seed, and an independent stream for each purpose."""

import numpy as np

from tracegen.errors import TraceError


def random_stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator that `seed` and `purpose` determine; different purposes of one seed are independent.

    A stream of its own for each purpose keeps fields from moving together, and a purpose that draws more numbers
    leaves the others as they were. Raises `TraceError` for a negative seed.
    """
    if seed < 0:
        raise TraceError(f"seed {seed} is negative; use 0 or more")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose.encode()])))
