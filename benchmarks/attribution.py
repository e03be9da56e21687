"""Attribution end to end against the plain way: explode to request x step rows, join, split each step equally.

    python benchmarks/attribution.py RUN [ROUNDS]

Both read the same run directory, files included, in turns within one process. The plain way is what an analyst would
write in Polars; it needs each step's energy, which it takes from the counter by interpolation. Ours fits a model,
prices work, splits, and states errors besides. RUN: any run with step records; `make demo` makes two.
"""

import sys
import time

import numpy as np
import polars as pl

from analysis.energy import attribute
from replay.rundir import Run


def plain(run: Run) -> pl.DataFrame:
    """Joules of each request: every step's energy by the counter, shared equally among its requests."""
    steps = run.scan("steps").collect()
    power = run.scan("power").filter(pl.col("gpu").is_in(run.manifest["instances"][0]["gpus"])).collect()
    energy_j = np.zeros(steps.height)
    for frame in power.sort("t_ns").partition_by("gpu", maintain_order=True):
        ends = [
            np.interp(steps[edge].to_numpy(), frame["t_ns"], frame["energy_mj"] / 1e3)
            for edge in ("start_ns", "end_ns")
        ]
        energy_j += ends[1] - ends[0]
    shares = steps.select("step", (pl.Series(energy_j) / pl.col("requests")).alias("share_j"))
    exploded = (
        run.scan("segments")
        .collect()
        .select("request_id", pl.int_ranges("first_step", pl.col("last_step") + 1, dtype=pl.UInt64).alias("step"))
    )
    return exploded.explode("step").join(shares, on="step").group_by("request_id").agg(pl.col("share_j").sum())


def main() -> None:
    """Measure and print."""
    run = Run.open(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    seconds: dict[str, list[float]] = {"plain equal split": [], "attribute": []}
    for _ in range(rounds + 1):
        for name, function in (("plain equal split", plain), ("attribute", attribute)):
            start = time.perf_counter()
            function(run)
            seconds[name].append(time.perf_counter() - start)
    # The first round loads libraries and files.
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    steps, requests = (run.scan(t).select(pl.len()).collect().item() for t in ("steps", "requests"))
    print(f"{run.name}: {requests} requests, {steps} steps, median of {rounds} rounds")
    for name, value in medians.items():
        print(f"{name:<20}{value:8.3f} s")
    print(f"attribute / plain = {medians['attribute'] / medians['plain equal split']:.2f}")


if __name__ == "__main__":
    main()
