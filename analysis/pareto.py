"""Pareto fronts: the settings that no other one is better than in everything asked for."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.sweep import SOUND
from analysis.sweep_file import SETTING

# Energy against a latency; `pareto_<name>` says whether a setting is on the front.
FRONTS = {"ttft": "ttft_p99_ms", "tbt": "tbt_mean_ms"}
ENERGY = "energy_per_request_j"


def front(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of `values` (n, k), of each of which less is better, no other row dominates; none with a NaN is.

    A row dominates another where it is nowhere more and somewhere less; of rows that are equal all are on the front.
    """
    known = np.asarray(~np.isnan(values).any(axis=1))
    no_more = (values[:, None, :] <= values[None, :, :]).all(axis=2)
    less = (values[:, None, :] < values[None, :, :]).any(axis=2)
    dominated = (no_more & less & known[:, None]).any(axis=0)
    return np.asarray(known & ~dominated)


def with_fronts(settings: pl.DataFrame) -> pl.DataFrame:
    """`SweepTable.settings` with `pareto_ttft` and `pareto_tbt`: on the front of J/request and that latency.

    Fronts are of the sound settings at one rate, of one group, that have most of the repeats they were planned with: a
    mean over some of them may be of the cheap ones. Null for others.
    """
    have = pl.col("repeats") / pl.col("planned")
    sound = settings.filter(pl.col("standing") == SOUND)
    whole = sound.filter(have == have.max().over("rate_rps", "group"))
    parts = [
        part.with_columns(
            pl.Series(
                f"pareto_{name}",
                front(part.select(pl.col(ENERGY, latency).cast(pl.Float64).fill_null(float("nan"))).to_numpy()),
            )
            for name, latency in FRONTS.items()
        )
        for part in whole.partition_by("rate_rps", "group", maintain_order=True)
    ]
    if not parts:
        return settings.with_columns(pl.lit(None, pl.Boolean).alias(f"pareto_{name}") for name in FRONTS)
    keys = [*SETTING, "group"]
    found = pl.concat(parts).select(*keys, *(f"pareto_{name}" for name in FRONTS))
    return settings.join(found, on=keys, how="left", nulls_equal=True, maintain_order="left")
