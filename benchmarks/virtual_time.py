"""How fast is virtual time? `python benchmarks/virtual_time.py [--requests N] [--day]`.

Runs `replay run --virtual` on chat-like traffic of 5 requests/s, on one core, start and all tables included, and in
turns with it the same engine one step at a time (`replay.sim.scheduler`, as behind HTTP but without waiting and
without tables): what virtual time would be without compiled loops. `--day` adds a day of 46 requests/s on eight
replicas. Figures hold for the machine that it runs on.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import polars as pl

from replay.sim.hardware import Hardware
from replay.sim.profile import load_profile
from replay.sim.scheduler import Request, Scheduler

RATE_RPS = 5.0
DAY_RATE_RPS, DAY_S = 46.0, 86400.0  # four million requests
CLOCK_MHZ = 1980
STEPWISE_REQUESTS = 5000  # enough to tell
BIN = Path(sys.executable).parent


def cpu_s(who: int) -> float:
    """CPU time so far: a shared machine lends us its core only part of the time."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def run(*argv: object) -> tuple[float, float]:
    """Run a command on one core: CPU time, s, and the peak memory of any so far, GiB."""
    before_s = cpu_s(resource.RUSAGE_CHILDREN)
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *map(str, argv)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return cpu_s(resource.RUSAGE_CHILDREN) - before_s, peak_gib


def synth(path: Path, rate_rps: float, seconds: float) -> pl.DataFrame:
    """A chat trace."""
    subprocess.run(
        [BIN / "tracegen", "synth", "--mix", "chat", "--rate", str(rate_rps), "--duration", f"{seconds}s", "-o", path],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return pl.read_parquet(path)


def stepwise_s(trace: pl.DataFrame) -> float:
    """CPU time to serve `trace` one step at a time, s."""
    hardware = Hardware(load_profile(), 8)
    scheduler = Scheduler(hardware.limits)
    columns = trace.select("arrival_ns", "request_id", "input_tokens", "output_tokens").iter_rows()
    coming = deque((t, Request(i, n, m)) for t, i, n, m in columns)
    begun_s, now_ns = cpu_s(resource.RUSAGE_SELF), 0
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running + scheduler.waiting:
            now_ns = max(now_ns, coming[0][0])
        while coming and coming[0][0] <= now_ns:
            scheduler.add(coming.popleft()[1])
        now_ns += round(hardware.run_step(scheduler.schedule().work, CLOCK_MHZ).duration_s * 1e9)
        scheduler.complete()
    return cpu_s(resource.RUSAGE_SELF) - begun_s


def main() -> None:
    """Print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--day", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = synth(folder / "trace.parquet", RATE_RPS, asked.requests / RATE_RPS)
        some = trace.head(STEPWISE_REQUESTS)
        virtual = BIN / "replay", "run", folder / "trace.parquet", "--virtual", "--tp", 8, "--freq", CLOCK_MHZ
        run(*virtual, "--num-prompts", 10, "-o", folder / "compiled")  # the code is compiled now
        stepwise_s(some.head(10))
        took, plain = [], []
        for turn in range(3):
            start_s, _ = run(*virtual, "--num-prompts", 10, "-o", folder / f"start{turn}")
            whole_s, peak_gib = run(*virtual, "-o", folder / f"run{turn}")
            took.append((whole_s, start_s))
            plain.append(stepwise_s(some) / some.height)
        whole_s, start_s = np.median(took, axis=0)
        each_s = (whole_s - start_s) / trace.height
        steps = pl.scan_parquet(folder / "run0" / "steps.parquet").select(pl.len()).collect().item()
        seconds = trace["arrival_ns"][-1] / 1e9
        print(f"{trace.height:,} requests at {RATE_RPS:g}/s, {steps:,} steps, one core, all tables but truth written")
        print(f"whole command {whole_s:.1f} CPU s, of which {start_s:.1f} s start; peak memory {peak_gib:.2f} GiB")
        print(f"after the start {1 / each_s:,.0f} requests/CPU s, {seconds / (whole_s - start_s):,.0f} x real time")
        print(
            f"one step at a time, no tables: {1 / np.median(plain):,.0f} requests/s; {np.median(plain) / each_s:.0f} x"
        )
        if asked.day:
            day = synth(folder / "day.parquet", DAY_RATE_RPS, DAY_S)
            where = "--model", "llama-3-8b", "--tp", 1, "--replicas", 8, "--freq", 1395, "--overlong", "drop"
            whole_s, peak_gib = run(
                BIN / "replay", "run", folder / "day.parquet", "--virtual", *where, "-o", folder / "day"
            )
            print(f"a day, {day.height:,} requests, 8 replicas: {whole_s:.0f} CPU s, peak memory {peak_gib:.2f} GiB")


if __name__ == "__main__":
    main()
