"""How sure a mean over repeats is."""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of `values` by Student's t; None of fewer than two."""
    from scipy.stats import t as student

    count = len(values)
    if count < 2:
        return None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(count)


def tight(values: Sequence[float], share: float) -> bool:
    """Whether the 95 % interval of the mean of `values` is within `share` of it to either side."""
    half = half_width(values)
    return half is not None and half <= share * abs(float(np.mean(values)))
