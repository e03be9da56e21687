"""Compare the simulated hardware with published measurements and print what is left over.

    python benchmarks/calibration.py POINTS.csv

POINTS.csv has the columns load_rps, tp, sm_clock_mhz, bucket, power_like, ttft_s: the characterization of
Llama-2-70B on a DGX-H100 in the repository jovans2/jovan-vllm (`cluster_experiments/characterization_*.csv`), by the
first author of Stojkovic et al., "Towards Greener LLMs". Each point is simulated in virtual time: Poisson arrivals
of equal requests to the scheduler and the hardware model of the simulated engine. All of it takes a few minutes.
"""

import argparse
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from replay.sim.hardware import Hardware, Profile, Work, load_profile
from replay.sim.scheduler import Request, Scheduler
from tracegen.console import print_table, say

# Prompts and outputs of the source's Short, Medium and Long. Its runs with long prompts stopped at Llama-2's 4096
# tokens, 11 after the prompt: LS, LM and LL show one and the same TTFT and power at every rate, TP and clock.
INPUT_TOKENS = {"S": 467, "M": 1010, "L": 4085}
OUTPUT_TOKENS = {"S": 96, "M": 256, "L": 600}
PUBLISHED_MAX_MODEL_LEN = 4096
# How long requests arrived in a published run: TTFTs beyond saturation climb in steps of one batch, and these steps
# fit about 20 s (at 60 s they would be three times as high).
ARRIVALS_S = 20.0
SEEDS = range(5)
REFERENCE_MHZ = 1980
SATURATED = 3.0  # times the TTFT at the lowest rate

# Mean TBT of ML at 0.5 requests/s, ms, and its ratios to 1980 MHz (same repository).
TBT_MS = {2: 37.1, 4: 24.9, 8: 18.4}
TBT_CLOCKS_MHZ = (800, 1000, 1400, 1800)
TBT_RATIOS = {2: (1.63, 1.30, 1.05, 1.01), 4: (1.64, 1.35, 1.08, 1.02), 8: (1.77, 1.44, 1.09, 1.01)}
# Splitwise (Patel et al., ISCA'24), perf_model.csv, medians at TP2: prefill ms by tokens, TBT ms by batch.
SPLITWISE_PREFILL_MS = {512: 84.0, 2048: 310.0, 8192: 1340.0}
SPLITWISE_TBT_MS = {1: 37.0, 16: 42.0, 32: 52.3}
SPLITWISE_CONTEXT_TOKENS = 1024
# Mean power while busy, W per GPU, of TP2 with small inputs: raw logs in the same repository, range over runs.
BUSY_W = {1410: (350, 370), 1605: (402, 421), 1800: (432, 458)}


@dataclass(frozen=True)
class Outcome:
    """What happened at one operating point."""

    ttft_p99_s: float
    power_w: float  # whole group, from the first arrival to the last token
    busy_w: float  # one GPU, while steps run


def simulate(
    hardware: Hardware, rate_rps: float, clock_mhz: float, prompt_tokens: int, output_tokens: int, *, seed: int
) -> Outcome:
    """Serve `ARRIVALS_S` of Poisson arrivals of equal requests to the end, in virtual time."""
    profile = hardware.profile
    scheduler = Scheduler(hardware.limits)
    arrival_s = {Request(n, prompt_tokens, output_tokens): t for n, t in enumerate(_arrivals_s(rate_rps, seed))}
    ttft_s: dict[Request, float] = {}
    coming = deque(arrival_s)
    now_s = busy_s = energy_j = 0.0
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running and not scheduler.waiting:
            now_s = max(now_s, arrival_s[coming[0]])
        while coming and arrival_s[coming[0]] <= now_s:
            scheduler.add(coming.popleft())
        batch = scheduler.schedule()
        duration_s = hardware.step_s(batch.work, clock_mhz)
        energy_j += duration_s * hardware.step_w(batch.work, clock_mhz)
        busy_s += duration_s
        now_s += duration_s
        for request in scheduler.complete():
            ttft_s.setdefault(request, now_s - arrival_s[request])
    idle_j = hardware.tp * hardware.idle_w(clock_mhz) * (now_s - busy_s)
    return Outcome(
        float(np.percentile(list(ttft_s.values()), 99)),
        (energy_j + idle_j) / now_s,
        energy_j / busy_s / hardware.tp,
    )


def _arrivals_s(rate_rps: float, seed: int) -> list[float]:
    """Poisson arrivals from 0 to `ARRIVALS_S`; runs of one seed share their random numbers."""
    gaps = np.random.default_rng(seed).exponential(size=int(2 * rate_rps * ARRIVALS_S) + 50)
    times_s = (np.cumsum(gaps) - gaps[0]) / rate_rps
    return [float(time_s) for time_s in times_s[times_s < ARRIVALS_S]]


def simulate_frame(profile: Profile, published: pl.DataFrame) -> pl.DataFrame:
    """`published` with what the simulation says of each point: `sim_ttft_s`, `sim_power_w`, `sim_busy_w`."""
    found = []
    for tp, rate_rps, mhz, bucket in published.select("tp", "load_rps", "sm_clock_mhz", "bucket").iter_rows():
        prompt = INPUT_TOKENS[bucket[0]]
        output = min(OUTPUT_TOKENS[bucket[1]], PUBLISHED_MAX_MODEL_LEN - prompt)
        runs = [simulate(Hardware(profile, tp), rate_rps, mhz, prompt, output, seed=seed) for seed in SEEDS]
        found.append(
            {
                "sim_ttft_s": float(np.median([run.ttft_p99_s for run in runs])),
                "sim_power_w": float(np.mean([run.power_w for run in runs])),
                "sim_busy_w": float(np.mean([run.busy_w for run in runs])),
            }
        )
    return published.hstack(pl.DataFrame(found))


def add_ratios(points: pl.DataFrame) -> pl.DataFrame:
    """Points that are not saturated as measured, with published and simulated ratios to the reference clock.

    Saturated is a TTFT above `SATURATED` times that of the lowest rate of the same TP, bucket and clock, or, at the
    reference clock, of the same TP, bucket and rate.
    """
    lowest = pl.col("ttft_s").sort_by("load_rps").first().over("tp", "bucket", "sm_clock_mhz")
    steady = points.filter(pl.col("ttft_s") <= SATURATED * lowest)
    values = ("ttft_s", "power_like", "sim_ttft_s", "sim_power_w")
    key = ("tp", "bucket", "load_rps")
    reference = steady.filter(pl.col("sm_clock_mhz") == REFERENCE_MHZ).select(
        *key, *(pl.col(v).alias(f"ref_{v}") for v in values)
    )
    joined = steady.filter(pl.col("sm_clock_mhz") != REFERENCE_MHZ).join(reference, on=key)
    return joined.with_columns(*((pl.col(v) / pl.col(f"ref_{v}")).alias(f"ratio_{v}") for v in values))


def print_ratios(ratios: pl.DataFrame, published: str, simulated: str, title: str) -> None:
    """Print the ratios by TP and clock, then the relative errors over all points."""
    error = pl.col(f"ratio_{simulated}") / pl.col(f"ratio_{published}") - 1
    ratios = ratios.with_columns(error=error)
    rows = [
        [f"TP{tp}", str(mhz), str(n), f"{pub:.3f}", f"{sim:.3f}", f"{median:.1%}", f"{p95:.1%}"]
        for tp, mhz, n, pub, sim, median, p95 in ratios.group_by("tp", "sm_clock_mhz")
        .agg(
            pl.len(),
            pl.col(f"ratio_{published}").median(),
            pl.col(f"ratio_{simulated}").median().alias("sim"),
            pl.col("error").median().alias("median"),
            pl.col("error").abs().quantile(0.95).alias("p95"),
        )
        .sort("tp", "sm_clock_mhz")
        .iter_rows()
    ]
    columns = ("TP", "MHz", "points", "published", "simulated", "median error", "p95 |error|")
    say(f"{title}, ratio to {REFERENCE_MHZ} MHz (medians)")
    print_table(columns, rows)
    median, p95 = np.quantile(ratios["error"].abs().to_numpy(), (0.5, 0.95))
    say(f"all {ratios.height} points: median |error| {median:.1%}, p95 {p95:.1%}\n")


def print_absolute(points: pl.DataFrame) -> None:
    """Print simulated over published TTFT at the reference clock, points that are not saturated as measured."""
    steady = (
        add_ratios(points)
        .unique(["tp", "bucket", "load_rps"])
        .with_columns(prompt=pl.col("bucket").str.head(1), over=pl.col("ref_sim_ttft_s") / pl.col("ref_ttft_s"))
    )
    rows = [
        [f"TP{tp}", str(INPUT_TOKENS[prompt]), str(n), f"{1e3 * pub:.0f}", f"{1e3 * sim:.0f}", f"{over:.2f}"]
        for tp, prompt, n, pub, sim, over in steady.group_by("tp", "prompt")
        .agg(pl.len(), pl.median("ref_ttft_s"), pl.median("ref_sim_ttft_s"), pl.median("over"))
        .sort("tp", "prompt", descending=[False, True])
        .iter_rows()
    ]
    columns = ("TP", "prompt", "points", "published ms", "simulated ms", "simulated / published")
    say(f"P99 TTFT at {REFERENCE_MHZ} MHz (medians over rates)")
    print_table(columns, rows)
    say()


def print_knees(points: pl.DataFrame) -> None:
    """Print the highest rate not saturated, by the same rule in both; `>` where the sweep ended before the knee."""
    cells = points.filter(pl.col("sm_clock_mhz") == REFERENCE_MHZ).sort("load_rps")
    rows, errors_rps = [], []
    for cell in cells.partition_by("bucket", "tp"):
        published, simulated = (
            cell.filter(pl.col(column) <= SATURATED * pl.col(column).first())["load_rps"].to_numpy().max()
            for column in ("ttft_s", "sim_ttft_s")
        )
        last = cell["load_rps"].to_numpy().max()
        if published < last:
            errors_rps.append(abs(simulated - published))
        texts = (f"{'> ' if knee == last else ''}{knee:g}" for knee in (published, simulated))
        rows.append([f"TP{cell['tp'][0]} {cell['bucket'][0]}", *texts])
    say(f"Highest rate sustained at {REFERENCE_MHZ} MHz, requests/s")
    print_table(("cell", "published", "simulated"), sorted(rows))
    close = sum(error <= 0.5 for error in errors_rps)
    say(f"{close} of {len(errors_rps)} cells that saturate as published agree within 0.5 requests/s\n")


def print_steps(profile: Profile) -> None:
    """Print step times against the published TBT and prefill times."""
    rows = []
    for tp, reference_ms in TBT_MS.items():
        for mhz, ratio in zip((REFERENCE_MHZ, *TBT_CLOCKS_MHZ), (1.0, *TBT_RATIOS[tp]), strict=True):
            batch = 0.5 * OUTPUT_TOKENS["L"] * reference_ms * ratio / 1e3  # Little's law
            context = INPUT_TOKENS["M"] + OUTPUT_TOKENS["L"] / 2
            ms = 1e3 * Hardware(profile, tp).step_s(Work(0.0, batch, batch * context, 0.0), mhz)
            rows.append(_step_row(f"TBT TP{tp} {mhz} MHz, batch {batch:.0f}", reference_ms * ratio, ms))
    pair = Hardware(profile, 2)
    for tokens, published_ms in SPLITWISE_PREFILL_MS.items():
        ms = 1e3 * pair.step_s(Work(float(tokens), 0.0, 0.0, tokens**2 / 2), REFERENCE_MHZ)
        rows.append(_step_row(f"Splitwise prefill TP2, {tokens} tokens", published_ms, ms))
    for batch, published_ms in SPLITWISE_TBT_MS.items():
        work = Work(0.0, float(batch), float(batch * SPLITWISE_CONTEXT_TOKENS), 0.0)
        rows.append(
            _step_row(f"Splitwise TBT TP2, batch {batch}", published_ms, 1e3 * pair.step_s(work, REFERENCE_MHZ))
        )
    say("Step times")
    print_table(("step", "published ms", "simulated ms", "error"), rows)
    say()


def _step_row(name: str, published_ms: float, ms: float) -> list[str]:
    return [name, f"{published_ms:.1f}", f"{ms:.1f}", f"{ms / published_ms - 1:+.1%}"]


def print_watts(points: pl.DataFrame) -> None:
    """Print the mean power of busy TP2 GPUs with short prompts beside the raw logs' range."""
    small = points.filter((pl.col("tp") == 2) & pl.col("bucket").is_in(["SS", "SM"]) & (pl.col("load_rps") <= 2))
    by_clock = small.group_by("sm_clock_mhz").agg(pl.mean("sim_busy_w")).sort("sm_clock_mhz")
    mhz, watts = by_clock["sm_clock_mhz"].to_numpy(), by_clock["sim_busy_w"].to_numpy()
    rows = [[str(at), f"{low}-{high}", f"{np.interp(at, mhz, watts):.0f}"] for at, (low, high) in BUSY_W.items()]
    say("Busy power of a GPU, TP2, short prompts")
    print_table(("MHz", "published W", "simulated W"), rows)
    scale = points.filter(pl.col("ttft_s") < 1).select(pl.col("sim_power_w") / pl.col("power_like")).to_series()
    low, middle, high = (scale.quantile(q) for q in (0.05, 0.5, 0.95))
    say(f"simulated W per unit of power_like, all points below 1 s: {middle:.2f} (p5 {low:.2f}, p95 {high:.2f})")


def main() -> None:
    """Read the points, simulate them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, metavar="POINTS.csv")
    path = parser.parse_args().points
    if not path.is_file():
        parser.error(f"{path}: no such file")
    profile = load_profile()
    points = simulate_frame(profile, pl.read_csv(path))
    ratios = add_ratios(points)
    print_steps(profile)
    print_ratios(ratios, "power_like", "sim_power_w", "Mean power")
    print_ratios(ratios, "ttft_s", "sim_ttft_s", "P99 TTFT")
    print_absolute(points)
    print_knees(points)
    print_watts(points)


if __name__ == "__main__":
    main()
