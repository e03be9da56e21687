"""How far attribution is from a simulated run's ground truth: the only reader of truth.parquet.

The truth is the simulator's own Shapley value of each step. It knows nothing of sensors, so its total is first scaled
to the total that was attributed: what is judged is how the energy was shared, not how much there was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.energy import Energy, attribute_methods
from analysis.requests import CORE, request_table
from analysis.split import MARGINAL
from replay.rundir import Run
from tracegen.errors import AnalysisError

BASELINE = "equal-time"  # what splitting every step equally among its requests would say


@dataclass(frozen=True)
class Error:
    """Error of `energy_j` against simulated ground truth, relative, over requests."""

    method: str
    requests: int
    median_rel: float
    p99_rel: float
    worst_bucket_rel: float  # of the buckets' mean energies, the one that is furthest off
    truth_over_attributed: float  # total of the truth over total attributed, before scaling


def evaluate(run: Run, methods: Sequence[str] = ("shapley", BASELINE)) -> list[Error]:
    """The error of each of `methods` on a simulated run. Raises `AnalysisError` where there is no truth."""
    return judge(run, attribute_methods(run, methods))


def judge(run: Run, energies: Mapping[str, Energy]) -> list[Error]:
    """The errors of attributions that are there already, but for `marginal`: the truth is no marginal cost."""
    if not run.has("truth"):
        raise AnalysisError(f"{run.path}: has no truth.parquet; only simulated runs know what each request really cost")
    truth = run.scan("truth").select("request_id", pl.col("energy_j").alias("truth_j")).collect()
    buckets = request_table(run, None, CORE).select("request_id", pl.col("bucket").cast(pl.String))
    truth = truth.join(buckets, on="request_id", how="left").filter(pl.col("truth_j") > 0)
    return [
        _error(run, method, energy.requests.join(truth, on="request_id"))
        for method, energy in energies.items()
        if method != MARGINAL
    ]


def _error(run: Run, method: str, table: pl.DataFrame) -> Error:
    table = table.drop_nulls("energy_j")
    if not table["energy_j"].sum():
        raise AnalysisError(f"{run.path / 'truth.parquet'}: has none of the requests that energy was attributed to")
    scale = float(table["truth_j"].sum()) / float(table["energy_j"].sum())
    table = table.with_columns(pl.col("truth_j") / scale)
    off = ((table["energy_j"] - table["truth_j"]) / table["truth_j"]).abs().to_numpy()
    means = table.group_by("bucket").agg(pl.col("energy_j", "truth_j").mean())
    worst = ((means["energy_j"] - means["truth_j"]) / means["truth_j"]).abs().to_numpy().max()
    return Error(method, table.height, float(np.median(off)), float(np.quantile(off, 0.99)), float(worst), float(scale))
