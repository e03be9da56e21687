"""Standard errors of shared energy, calibrated against runs whose truth is known.

What is uncertain in a request's share is the step model's form: what a part of a step would have cost is never
measured. Two other answers to the same question show how far that can go: the linear model's, and the equal split's, by
which requests differ that have little in common with their batch. Noise and phase of sensors average out in a block of
the energy balance; what they leave open in the model's coefficients is as much less as there are more windows.

The constants were chosen on twenty made-up runs of ten minutes (`benchmarks/accuracy.py`: laws cap, fast-kink,
fast-soft, read and tile at 0.5 to 9 requests/s, seed 1), so that 90 % intervals, energy ± 1.645 standard errors, cover
the scaled truth of about 94 % of all requests, and `POWER_REL` on five of them with sensors of one second;
docs/accuracy.md has the cells.
"""

import numpy as np

from analysis.load import Floats

FLOOR_REL = 0.0008  # what is left of noise and dating even where all answers agree
DURATION_REL = 0.4  # of the durations' misfit, which requests of a kind have in common
POWER_REL = 3.0  # of what noise leaves open of a mean power: coefficients are less certain than means
SPLIT_REL = 0.0035  # of the difference from an equal split of every step
FORM_REL = 0.75  # of the difference from the linear model's answer


def shapley_variance(
    energy_j: Floats, linear_j: Floats, equal_j: Floats, duration_rel: float, power_rel: float, dating_rel: Floats
) -> Floats:
    """Variance (n,) of each request's energy by `shapley`, J², from sums by request alone, all of shape (n,).

    `variance = energy_j²·own² + (SPLIT·(equal_j - energy_j))² + (FORM·(linear_j - energy_j))²`
    `own² = FLOOR² + (DURATION·d)² + (POWER·w)² + r²`
    with d = `duration_rel`, the relative rms of the model's step durations, w = `power_rel`, that of its sensor windows
    over the root of how many there are that do not overlap, and r = `dating_rel`, the bound of the clock offset between
    engine and meter over the time that the request was in steps.
    """
    own = FLOOR_REL**2 + (DURATION_REL * duration_rel) ** 2 + (POWER_REL * power_rel) ** 2 + dating_rel**2
    form = (SPLIT_REL * (equal_j - energy_j)) ** 2 + (FORM_REL * (linear_j - energy_j)) ** 2
    return np.asarray(energy_j**2 * own + form)
