"""The rates at which the simulated DGX-H100 saturates, by several rules, beside what is published.

    python benchmarks/saturation.py POINTS.csv

Two things are published of Llama-2-70B on one DGX-H100, both in the repository jovans2/jovan-vllm: the sweeps of the
calibration points (POINTS.csv), and the loads that the authors' cluster experiments gave an instance at most
(`cluster_experiments/pool_manager.py`). Most of those loads at TP4 and TP8 are where the sweeps ended, not where TTFT
rose. All at the highest clock.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from replay.sim.physics import FloatArray
from replay.sim.points import SCHEMA, Load, read_points, simulate_points
from replay.sim.profile import load_profile
from tracegen.console import print_table, say

BUCKETS = ("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL")
MAX_LOAD_RPS = {
    2: (5.0, 2.5, 1.0, 2.5, 1.0, 0.5, 0.0, 0.0, 0.0),
    4: (7.0, 5.5, 4.0, 3.0, 2.6, 1.6, 2.0, 1.5, 0.5),
    8: (9.5, 7.0, 5.0, 3.5, 3.5, 3.0, 2.5, 2.0, 1.9),
}
SLO_S = {"S": 0.25, "M": 0.4, "L": 2.0}
RULES: dict[str, Callable[[str, FloatArray], FloatArray]] = {
    "TTFT above 3 x the lowest rate's": lambda _bucket, ttft_s: 3 * ttft_s[:1],
    "TTFT above its SLO (0.25, 0.4, 2 s)": lambda bucket, _ttft_s: np.array([SLO_S[bucket[0]]]),
    "TTFT above 1 s": lambda _bucket, _ttft_s: np.array([1.0]),
}
STEP_RPS, BEYOND = 0.5, {"S": 16.0, "M": 8.0, "L": 4.0}


def sustained(
    cells: pl.DataFrame, column: str, rule: Callable[[str, FloatArray], FloatArray]
) -> dict[tuple[int, str], float]:
    """The highest rate below the first that `rule` calls saturated, by TP and bucket; the sweep's last if none is."""
    found = {}
    for tp, bucket in cells.select("tp", "bucket").unique().iter_rows():
        cell = cells.filter((pl.col("tp") == tp) & (pl.col("bucket") == bucket)).sort("load_rps")
        rates, ttft_s = cell["load_rps"].to_numpy(), cell[column].to_numpy()
        beyond = np.flatnonzero(ttft_s > rule(bucket, ttft_s))
        found[tp, bucket] = float(rates[-1] if not beyond.size else rates[beyond[0] - 1] if beyond[0] else 0.0)
    return found


def close(one: dict[tuple[int, str], float], two: dict[tuple[int, str], float]) -> int:
    """How many cells agree within a step."""
    return sum(abs(rate - two[cell]) <= STEP_RPS + 1e-9 for cell, rate in one.items())


def main() -> None:
    """Simulate the sweeps, and longer ones, and print the agreement by rule and the rates by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, metavar="POINTS.csv")
    load, profile = Load(), load_profile("dgx-h100", "llama-2-70b")
    points = read_points(parser.parse_args().points, load)
    top_mhz = int(points["sm_clock_mhz"].to_numpy().max())
    swept = simulate_points(profile, points.filter(pl.col("sm_clock_mhz") == top_mhz), load)
    rows = [
        (float(rate), tp, top_mhz, bucket, 1.0, 1.0)
        for tp in MAX_LOAD_RPS
        for bucket in BUCKETS
        for rate in np.arange(STEP_RPS, BEYOND[bucket[0]] + STEP_RPS / 2, STEP_RPS)
    ]
    longer = simulate_points(profile, pl.DataFrame(rows, schema=SCHEMA, orient="row"), load)
    loads = {
        (tp, bucket): rate for tp, rates in MAX_LOAD_RPS.items() for bucket, rate in zip(BUCKETS, rates, strict=True)
    }
    counts, columns = [], []
    for name, rule in RULES.items():
        measured, simulated = (sustained(swept, column, rule) for column in ("ttft_s", "sim_ttft_s"))
        beyond = sustained(longer, "sim_ttft_s", rule)
        figures = [close(measured, simulated), close(loads, simulated), close(loads, measured), close(loads, beyond)]
        counts.append([name, *(f"{count} of {len(loads)}" for count in figures)])
        columns += [measured, simulated, beyond]
    say(f"Cells that agree within {STEP_RPS} requests/s, {top_mhz} MHz")
    heads = ("saturated", "simulated, points", "simulated, loads", "points, loads", "simulated further, loads")
    print_table(heads, counts)
    say("\nHighest rate sustained, requests/s: points / simulated over the same sweep / simulated further")
    cells = [
        [f"TP{tp} {bucket}", f"{loads[tp, bucket]:g}"]
        + [" / ".join(f"{column[tp, bucket]:g}" for column in columns[i : i + 3]) for i in range(0, len(columns), 3)]
        for tp, bucket in loads
    ]
    print_table(("cell", "published load", *RULES), cells)


if __name__ == "__main__":
    main()
