"""Hold the simulated DGX-H100 against clocks that it was not fitted to: 1200 and 1600 MHz.

    python benchmarks/other_clocks.py POINTS.csv

The repository of the calibration points (jovans2/jovan-vllm, `cluster_experiments/characterization_performance.csv`
and `characterization.csv`) has seven clocks; POINTS.csv, which the constants are fitted to, has five of them. Typed
here from the other two: TP8 SS, SM and MM, TP4 ML and MS, TP2 SS and ML. Rates go up in steps of 0.5 requests/s
from 0.5.
"""

import argparse
from pathlib import Path

import polars as pl

from replay.sim.points import Load, read_points, simulate_points
from replay.sim.profile import load_profile
from replay.sim.residuals import add_ratios, spreads
from tracegen.console import print_table, say

# (TP, bucket, MHz): P99 TTFT in ms, and the source's "energy", by rate.
TTFT_MS = {
    (8, "SS", 1200): (
        95.3, 91.5, 105.1, 98.3, 105.1, 110.8, 111.1, 112.8, 111.8, 126.7, 117.0, 131.1, 150.3, 156.5,
        166.4, 155.8, 157.3, 165.9
    ),
    (8, "SS", 1600): (
        83.6, 80.2, 84.0, 85.2, 88.1, 85.2, 88.4, 87.8, 91.2, 90.4, 91.1, 104.3, 111.5, 109.6, 140.4, 116.8,
        135.8, 131.6
    ),
    (8, "SM", 1200): (93.5, 101.8, 106.7, 107.4, 104.7, 113.3, 113.0, 115.3, 114.9, 122.2, 122.1, 133.7, 162.8, 161.6),
    (8, "SM", 1600): (78.9, 80.9, 88.0, 88.4, 88.2, 88.5, 88.6, 93.7, 94.9, 95.4, 92.6, 129.7, 119.0, 135.8),
    (8, "MM", 1200): (164.8, 160.8, 175.3, 186.3, 243.1, 227.2, 233.6),
    (8, "MM", 1600): (132.6, 132.1, 146.4, 148.5, 156.2, 156.0, 168.8),
    (4, "ML", 1200): (235.4, 215.7, 251.5, 266.4, 291.2),
    (4, "ML", 1600): (186.7, 203.1, 200.7, 212.4, 216.1),
    (4, "MS", 1200): (235.9, 214.7, 245.1, 259.8, 315.4, 325.4),
    (4, "MS", 1600): (186.6, 184.0, 235.0, 203.5, 217.3, 251.8),
    (2, "SS", 1200): (173.9, 207.5, 210.1, 228.2, 223.8, 251.0, 247.5, 347.8, 359.2, 1494.5),
    (2, "SS", 1600): (148.4, 173.3, 171.5, 185.1, 193.1, 188.1, 207.2, 226.2, 226.2, 284.7),
    (2, "ML", 1200): (332.4,),
    (2, "ML", 1600): (288.4,),
}  # fmt: skip
POWER = {
    (8, "SS", 1200): (
        149.38, 165.53, 176.47, 184.00, 182.02, 184.95, 182.67, 184.94, 185.30, 186.01, 187.29, 187.98,
        190.35, 191.74, 193.24, 193.33, 193.63, 194.26
    ),
    (8, "SS", 1600): (
        194.26, 216.17, 237.13, 247.82, 248.88, 250.66, 248.33, 250.59, 251.60, 251.76, 252.72, 254.47,
        261.19, 259.38, 262.71, 263.46, 265.05, 267.79
    ),
    (8, "SM", 1200): (
        180.39, 181.09, 179.40, 178.71, 178.74, 179.65, 179.31, 180.64, 181.21, 180.34, 182.49, 180.63,
        181.54, 182.22
    ),
    (8, "SM", 1600): (
        246.79, 248.12, 241.58, 246.58, 242.81, 241.59, 243.47, 246.25, 244.49, 250.21, 247.98, 248.40,
        247.99, 245.50
    ),
    (8, "MM", 1200): (181.30, 184.01, 184.02, 188.29, 189.80, 193.21, 192.97),
    (8, "MM", 1600): (249.41, 251.09, 250.87, 259.10, 258.48, 262.80, 268.22),
    (4, "ML", 1200): (110.76, 110.84, 111.28, 110.83, 107.48),
    (4, "ML", 1600): (150.54, 152.76, 154.71, 152.55, 149.90),
    (4, "MS", 1200): (98.03, 110.25, 117.46, 119.13, 122.06, 124.67),
    (4, "MS", 1600): (125.42, 149.19, 163.01, 163.40, 170.72, 174.33),
    (2, "SS", 1200): (65.63, 67.74, 70.00, 70.58, 72.65, 73.86, 73.70, 73.38, 74.62, 75.02),
    (2, "SS", 1600): (85.43, 91.21, 95.41, 96.93, 99.24, 101.11, 101.72, 102.15, 102.62, 104.84),
    (2, "ML", 1200): (67.45,),
    (2, "ML", 1600): (91.82,),
}  # fmt: skip


def other_points() -> pl.DataFrame:
    """The typed points, in the form of `read_points`."""
    rows = [
        {
            "load_rps": 0.5 * (i + 1), "tp": tp, "sm_clock_mhz": mhz, "bucket": bucket, "power_like": power,
            "ttft_s": ttft_ms / 1e3,
        }
        for (tp, bucket, mhz), ttfts_ms in TTFT_MS.items()
        for i, (ttft_ms, power) in enumerate(zip(ttfts_ms, POWER[tp, bucket, mhz], strict=True))
    ]  # fmt: skip
    return pl.DataFrame(rows)


def main() -> None:
    """Simulate the points and print what is left of their ratios to the highest clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, metavar="POINTS.csv")
    parser.add_argument("--hardware", default="dgx-h100", help="a hardware file, for example of a fit")
    arguments = parser.parse_args()
    load, profile = Load(), load_profile(arguments.hardware)
    known = read_points(arguments.points, load)
    others = other_points()
    twins = known.filter(pl.col("sm_clock_mhz") == known["sm_clock_mhz"].max())
    wanted = others.select("tp", "bucket", "load_rps").unique()
    points = pl.concat([others, twins.join(wanted, on=["tp", "bucket", "load_rps"], how="semi").select(others.columns)])
    ratios = add_ratios(simulate_points(profile, points, load))
    rows = []
    for by in (("sm_clock_mhz",), ("tp", "bucket", "sm_clock_mhz")):
        for row in spreads(ratios, by):
            power, ttft = row["power"], row["ttft"]
            name = " ".join(str(row[key]) for key in by)
            rows.append(
                [
                    name, str(power.points), f"{row['power_measured']:.3f}", f"{row['power_simulated']:.3f}",
                    f"{power.median:+.1%}", f"{row['ttft_measured']:.3f}", f"{row['ttft_simulated']:.3f}",
                    f"{ttft.median:+.1%}",
                ]
            )  # fmt: skip
    say("Clocks that the constants were not fitted to: ratios to the highest clock, medians")
    columns = ("", "points", "power measured", "simulated", "error", "TTFT measured", "simulated", "error")
    print_table(columns, rows)


if __name__ == "__main__":
    main()
