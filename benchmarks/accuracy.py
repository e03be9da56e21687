"""Errors of attribution, and what its intervals cover, on made-up runs with ground truth.

    python benchmarks/accuracy.py [--slow-sensor] [--no-counter] [--client] [SECONDS [SEED [LAW ...]]]

For each law (`made_runs.LAWS`; by default those quick enough for 9 requests/s) and rate: the median and 99th percentile
of the relative error of a request, the worst bucket mean of those with ten requests or more, the same of an equal
split, and the share of requests whose 90 % interval has the truth. Truth is first scaled to the attributed total.
`--slow-sensor`: samples are means over a second; `--client`: without step records.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from made_runs import Load, make_run

from analysis.energy import Energy, attribute_methods
from analysis.requests import request_table
from replay.rundir import Run

QUICK = ("cap", "fast-kink", "fast-soft", "read", "tile")
RATES = (0.5, 3.0, 6.0, 9.0)
Z90 = 1.645
LEAST = 10  # requests of a bucket that is judged


def errors(run: Run, energy: Energy) -> tuple[float, float, float, float]:
    """Median, p99 and worst bucket error, relative, and the share of truths inside 90 % intervals."""
    truth = run.scan("truth").select("request_id", truth_j="energy_j").collect()
    buckets = request_table(run).select("request_id", "bucket")
    table = energy.requests.join(truth, on="request_id").join(buckets, on="request_id").drop_nulls("energy_j")
    scale = table["truth_j"].sum() / table["energy_j"].sum()
    table = table.with_columns(pl.col("truth_j") / scale)
    off_j = (table["energy_j"] - table["truth_j"]).abs().to_numpy()
    off = off_j / table["truth_j"].to_numpy()
    means = table.group_by("bucket").agg(pl.col("energy_j", "truth_j").mean(), pl.len()).filter(pl.col("len") >= LEAST)
    worst = (means["energy_j"] / means["truth_j"] - 1).abs().max() if means.height else float("nan")
    covered = float(np.mean(off_j <= Z90 * table["energy_se_j"].to_numpy()))
    return float(np.median(off)), float(np.quantile(off, 0.99)), float(str(worst)), covered


def main() -> None:
    """Make the runs, one at a time, and print a table in Markdown."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("--")]
    flags = set(sys.argv[1:]) - set(arguments)
    sensor = {"window_s": 1.0} if "--slow-sensor" in flags else {}
    seconds = float(arguments[0]) if arguments else 600.0
    seed = int(arguments[1]) if len(arguments) > 1 else 1
    print("| law | requests/s | median | p99 | worst bucket | equal split: median / p99 / bucket | 90 % covers |")
    print("|---|---|---|---|---|---|---|")
    for law in arguments[2:] or QUICK:
        for rate in RATES:
            with tempfile.TemporaryDirectory() as folder:
                load = Load(rate=rate, duration_s=seconds, seed=seed, law=law, noise_rel=0.02, **sensor)
                load = replace(load, counter="--no-counter" not in flags)
                run = make_run(Path(folder) / "run", load)
                if "--client" in flags:
                    for table in ("steps", "segments"):
                        (run.path / f"{table}.parquet").unlink()
                energies = attribute_methods(run, ["shapley", "equal-time"])
                ours, equal = (errors(run, energies[m]) for m in ("shapley", "equal-time"))
            shown = " | ".join(f"{100 * value:.2f} %" for value in ours[:3])
            beside = " / ".join(f"{100 * value:.0f} %" for value in equal[:3])
            print(f"| {law} | {rate:g} | {shown} | {beside} | {100 * ours[3]:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
