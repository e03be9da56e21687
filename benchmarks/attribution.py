"""Attribution end to end against the plain way: explode to request x step rows, join, split each step equally.

    python benchmarks/attribution.py RUN [ROUNDS]

All read the same run directory, files included, in turns within one process. The plain way is what an analyst would
write in Polars, pandas or DuckDB; it needs each step's energy, which it takes from the counter by interpolation. Ours
fits a model, prices work, splits, and states errors besides. RUN: any run of one instance with step records and energy
counters; `make demo` makes two. The three plain ways must agree, or there is no table.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl

from analysis.energy import attribute
from replay.rundir import Run

STEP_COLUMNS = ["step", "start_ns", "end_ns", "requests"]
SEGMENT_COLUMNS = ["request_id", "first_step", "last_step"]
POWER_COLUMNS = ["t_ns", "gpu", "energy_mj"]


def in_polars(run: Run) -> pl.DataFrame:
    """Joules of each request: every step's energy by the counter, shared equally among its requests."""
    steps = pl.read_parquet(run.path / "steps.parquet", columns=STEP_COLUMNS)
    power = pl.read_parquet(run.path / "power.parquet", columns=POWER_COLUMNS)
    energy_j = np.zeros(steps.height)
    for gpu in run.manifest["instances"][0]["gpus"]:
        frame = power.filter(pl.col("gpu") == gpu).sort("t_ns")
        energy_j += _counted_j(steps, frame["t_ns"], frame["energy_mj"])
    shares = steps.select("step", (pl.Series(energy_j) / pl.col("requests")).alias("energy_j"))
    segments = pl.read_parquet(run.path / "segments.parquet", columns=SEGMENT_COLUMNS)
    rows = segments.select(
        "request_id", pl.int_ranges("first_step", pl.col("last_step") + 1, dtype=pl.UInt64).alias("step")
    )
    return rows.explode("step").join(shares, on="step").group_by("request_id").agg(pl.col("energy_j").sum())


def in_pandas(run: Run) -> pd.DataFrame:
    """The same; rows are repeated by NumPy, for `DataFrame.explode` makes a Python list of each segment."""
    steps = pd.read_parquet(run.path / "steps.parquet", columns=STEP_COLUMNS)
    power = pd.read_parquet(run.path / "power.parquet", columns=POWER_COLUMNS)
    energy_j = np.zeros(len(steps))
    for gpu in run.manifest["instances"][0]["gpus"]:
        frame = power[power["gpu"] == gpu].sort_values("t_ns")
        energy_j += _counted_j(steps, frame["t_ns"], frame["energy_mj"])
    steps["energy_j"] = energy_j / steps["requests"]
    segments = pd.read_parquet(run.path / "segments.parquet", columns=SEGMENT_COLUMNS)
    first, last = (segments[name].to_numpy().astype(np.int64) for name in ("first_step", "last_step"))
    count = last - first + 1
    rows = segments[["request_id"]].loc[np.repeat(segments.index, count)]
    rows["step"] = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    joined = rows.merge(steps[["step", "energy_j"]].astype({"step": "int64"}), on="step")
    return joined.groupby("request_id", as_index=False)["energy_j"].sum()


def in_duckdb(run: Run) -> pd.DataFrame:
    """The same; an ASOF join for the counter takes DuckDB longer than NumPy's interpolation."""
    with duckdb.connect() as connection:
        tables = (f"read_parquet('{run.path / name}.parquet')" for name in ("steps", "power", "segments"))
        steps_file, power_file, segments_file = tables
        steps = connection.sql(f"SELECT {', '.join(STEP_COLUMNS)} FROM {steps_file}").df()
        energy_j = np.zeros(len(steps))
        for gpu in run.manifest["instances"][0]["gpus"]:
            frame = connection.sql(
                f"SELECT t_ns, energy_mj FROM {power_file} WHERE gpu = {int(gpu)} ORDER BY t_ns"
            ).df()
            energy_j += _counted_j(steps, frame["t_ns"], frame["energy_mj"])
        shares = pd.DataFrame({"step": steps["step"].astype("int64"), "energy_j": energy_j / steps["requests"]})
        connection.register("shares", shares)
        rows = (
            f"SELECT request_id, unnest(range(first_step::BIGINT, last_step::BIGINT + 1)) AS step FROM {segments_file}"
        )
        joined = (
            f"SELECT request_id, sum(energy_j) AS energy_j FROM ({rows}) JOIN shares USING (step) GROUP BY request_id"
        )
        return connection.sql(joined).df()


def _counted_j(steps: Any, t_ns: Any, energy_mj: Any) -> Any:
    """What a counter rose by in each step, linear between readings."""
    start_j, end_j = (np.interp(np.asarray(steps[edge]), t_ns, energy_mj) / 1e3 for edge in ("start_ns", "end_ns"))
    return end_j - start_j


def _by_request(table: Any) -> Any:
    """Joules in order of the request's id, null for others' work last."""
    frame = pl.DataFrame(table) if isinstance(table, pl.DataFrame) else pl.from_pandas(table)
    return frame.drop_nulls("request_id").sort("request_id")["energy_j"].to_numpy()


WAYS: dict[str, Callable[[Run], Any]] = {
    "Polars": in_polars,
    "pandas": in_pandas,
    "DuckDB": in_duckdb,
    "attribute": attribute,
}


def main() -> None:
    """Measure and print."""
    run = Run.open(sys.argv[1])
    if len(run.manifest["instances"]) != 1:
        sys.exit(f"{run.path}: has several instances; the plain ways here are written for one")
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    plain = {name: _by_request(way(run)) for name, way in WAYS.items() if way is not attribute}
    for name, joules in plain.items():
        np.testing.assert_allclose(joules, plain["Polars"], rtol=1e-6, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(run)
            seconds[name].append(time.perf_counter() - start)
    # The first round loads libraries and files.
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    best = min(medians[name] for name in plain)
    steps, requests = (run.scan(t).select(pl.len()).collect().item() for t in ("steps", "requests"))
    print(f"{run.name}: {requests:,} requests, {steps:,} steps, median of {rounds} rounds")
    print(f"{'':<20}{'seconds':>8}  {'of the best plain way':>22}")
    for name, value in medians.items():
        print(f"{name if name in plain else 'analysis (ours)':<20}{value:8.3f}  {value / best:22.2f}")


if __name__ == "__main__":
    main()
