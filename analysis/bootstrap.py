"""How far one mean is from another, and how sure that is: a hierarchical bootstrap over runs and their requests.

The figure is the ratio of means, on a logarithmic scale. A resample draws requests with replacement, the same in every
run where they are paired; where both sides have several runs it also draws runs, one fewer than there are, for then the
spread between resamples is an unbiased variance however few they are (Rao and Wu, "Resampling inference with complex
survey data", JASA 83, 1988; McCarthy and Snowden, 1985). The interval is the figure ± Student's t times that spread,
with Satterthwaite's degrees of freedom: percentiles of three runs' resamples would be far too narrow.

Above `CELLS` requests they are dealt into as many random groups, which are drawn instead: the variance is the same in
expectation, known to 5 % (Wolter, Introduction to Variance Estimation, 2nd ed. 2007, ch. 2), and the cost stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
CELLS = 1000
CONFIDENCE = 0.95
POWER = 0.8  # the usual chance to find an effect that is there (Cohen 1988)
SAME_REL = 1e-6  # runs whose means are closer were not run anew: no clock and no meter repeats so well
MOST_NEEDED = 10**7  # pairs or repeats that are advised; above, nobody makes them
MOST_REPEATS = 1000


@dataclass(frozen=True)
class Estimate:
    """The mean of b against that of a; `se` and `df` are of `log_ratio`."""

    mean_a: float
    mean_b: float
    log_ratio: float
    se: float
    df: float
    p_value: float
    effect_size: float | None  # Hedges' g over runs where both sides have several; else Cohen's d over requests
    low_percent: float
    high_percent: float
    smallest_percent: float | None  # what this much data would find in `POWER` of cases
    needed: int | None  # requests, or runs of each, to find a difference of this size; None: none, or too many

    @property
    def percent(self) -> float:
        """The difference in % of a."""
        return 100 * (self.mean_b / self.mean_a - 1)


class Draws:
    """Draws of n among n with replacement; the same for the same n, so that what is compared is drawn alike."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._kept: dict[int, Floats] = {}

    def __call__(self, n: int) -> Floats:
        """How often each is drawn in each resample, (RESAMPLES, n)."""
        if n not in self._kept:
            self._kept = {n: self.fresh(n)}
        return self._kept[n]

    def fresh(self, n: int) -> Floats:
        """Draws that nothing else shares."""
        drawn = self.rng.integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
        return np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)


def compare_means(a: Sequence[Floats], b: Sequence[Floats], draws: Draws, *, paired: bool) -> Estimate | None:
    """The mean of runs `b` against that of runs `a`, an array of requests each; None where a mean is not positive.

    `paired`: all arrays are of the same requests in the same order.
    """
    means = [np.array([run.mean() for run in side]) for side in (a, b)]
    if min(side.min() for side in means) <= 0:
        return None
    resampled = _paired(a, b, draws) if paired else [_alone(side, draws) for side in (a, b)]
    several = len(a) > 1 and len(b) > 1
    if several:
        resampled = [_draw_runs(side, draws.rng) for side in resampled]
    logs = [np.log(side.mean(axis=1)) for side in resampled]
    se = float(np.std(logs[1] - logs[0], ddof=1))
    spread = [float(np.var(np.log(side), ddof=1)) if several else 0.0 for side in means]
    requests_df = len(a[0]) - 1 if paired else sum(len(run) - 1 for run in (*a, *b))
    df = _degrees(spread, [len(a), len(b)], se, requests_df) if several else float(max(requests_df, 1))
    mean_a, mean_b = (float(side.mean()) for side in means)
    log_ratio = float(np.log(mean_b / mean_a))
    se = se if se > 1e-12 else 0.0  # equal runs differ by rounding alone
    t_value = float(student.ppf((1 + CONFIDENCE) / 2, df))
    reach = t_value + float(student.ppf(POWER, df))
    low, high = (_percent(log_ratio + sign * t_value * se) for sign in (-1, 1))
    return Estimate(
        mean_a,
        mean_b,
        log_ratio,
        se,
        df,
        _p_value(log_ratio, se, df),
        _hedges_g(means) if several else _cohens_d(a, b, paired=paired),
        low,
        high,
        _percent(reach * se),
        _runs_needed(log_ratio, se, spread, means) if several else _needed(log_ratio, reach * se, len(a[0])),
    )


def _percent(log_ratio: float) -> float:
    """The difference in % that a logarithm of a ratio is; beyond e^20 it is cut, for JSON has no infinity."""
    return 100 * float(np.expm1(min(log_ratio, 20.0)))


def _paired(a: Sequence[Floats], b: Sequence[Floats], draws: Draws) -> list[Floats]:
    """Means of each run over the same draws of requests, (RESAMPLES, runs) a side."""
    n = len(a[0])
    cells = _cells(n, draws.rng)
    weights = draws(min(n, CELLS))
    count = weights @ _sums(np.ones(n), cells)
    return [np.stack([(weights @ _sums(run, cells)) / count for run in side], axis=1) for side in (a, b)]


def _alone(side: Sequence[Floats], draws: Draws) -> Floats:
    """Means of each run over draws of its own requests, (RESAMPLES, runs)."""
    means = []
    for run in side:
        cells = _cells(len(run), draws.rng)
        weights = draws.fresh(min(len(run), CELLS))
        means.append((weights @ _sums(run, cells)) / (weights @ _sums(np.ones(len(run)), cells)))
    return np.stack(means, axis=1)


def _cells(n: int, rng: np.random.Generator) -> Ints | None:
    """The random group of each of `n` requests; None where each is its own."""
    return rng.permutation(np.arange(n) % CELLS) if n > CELLS else None


def _sums(values: Floats, cells: Ints | None) -> Floats:
    return values if cells is None else np.bincount(cells, values, CELLS).astype(np.float64)


def _draw_runs(resampled: Floats, rng: np.random.Generator) -> Floats:
    """Of each resample's runs one fewer than there are, drawn with replacement."""
    runs = resampled.shape[1]
    return np.take_along_axis(resampled, rng.integers(runs, size=(RESAMPLES, runs - 1)), axis=1)


def _degrees(spread: Sequence[float], runs: Sequence[int], se: float, requests_df: int) -> float:
    """Satterthwaite's degrees of freedom of a variance that is made of both sides' runs and of requests."""
    parts = [variance / count for variance, count in zip(spread, runs, strict=True)]
    rest = max(se**2 - sum(parts), 0.0)
    below = sum(part**2 / (count - 1) for part, count in zip(parts, runs, strict=True)) + rest**2 / max(requests_df, 1)
    # Never fewer than the poorer side alone has: chance in `se` must not take them all.
    return max((sum(parts) + rest) ** 2 / below, min(runs) - 1) if below > 0 else float(max(requests_df, 1))


def _p_value(log_ratio: float, se: float, df: float) -> float:
    if se == 0.0:
        return 1.0 if abs(log_ratio) < 1e-12 else 0.0
    return 2 * float(student.sf(abs(log_ratio) / se, df))


def _cohens_d(a: Sequence[Floats], b: Sequence[Floats], *, paired: bool) -> float | None:
    """The difference in standard deviations: of the pairs' differences (d_z), else of the requests, pooled."""
    if paired:
        difference = np.mean(b, axis=0) - np.mean(a, axis=0)
        deviation = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
        return float(difference.mean()) / deviation if deviation > 0 else None
    first, second = np.concatenate(a), np.concatenate(b)
    left = first.size + second.size - 2
    pooled = (first.var() * first.size + second.var() * second.size) / left if left > 0 else 0.0
    return float((second.mean() - first.mean()) / np.sqrt(pooled)) if pooled > 0 else None


def _hedges_g(means: Sequence[Floats]) -> float | None:
    """The difference in standard deviations between runs of one setting, corrected for few of them (Hedges 1981)."""
    sizes = [side.size - 1 for side in means]
    pooled = sum(float(side.var(ddof=1)) * n for side, n in zip(means, sizes, strict=True)) / sum(sizes)
    if pooled <= (SAME_REL * float(means[0].mean())) ** 2:
        return None
    correction = 1 - 3 / (4 * sum(sizes) - 1)
    return correction * float(means[1].mean() - means[0].mean()) / float(np.sqrt(pooled))


def _needed(log_ratio: float, reach: float, have: int) -> int | None:
    """How many requests would find this difference in `POWER` of cases."""
    if abs(log_ratio) < 1e-12:
        return None
    needed = int(np.ceil(have * min((reach / log_ratio) ** 2, MOST_NEEDED)))
    return needed if needed <= MOST_NEEDED else None


def _runs_needed(log_ratio: float, se: float, spread: Sequence[float], means: Sequence[Floats]) -> int | None:
    """How many runs of each would find this difference in `POWER` of cases, the requests staying the same."""
    variance = float(np.mean(spread))
    rest = max(se**2 - sum(v / m.size for v, m in zip(spread, means, strict=True)), 0.0)
    runs = np.arange(2, MOST_REPEATS + 1)
    reach = student.ppf((1 + CONFIDENCE) / 2, 2 * runs - 2) + student.ppf(POWER, 2 * runs - 2)
    found = reach * np.sqrt(2 * variance / runs + rest) <= abs(log_ratio)
    return int(runs[np.argmax(found)]) if found.any() else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's p-values (1979): as many questions at once, with the chance of one false answer kept."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    reached = 0.0
    for rank, place in enumerate(order):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = reached
    return adjusted.tolist()
