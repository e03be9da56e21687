"""Synthesis: how fast, how much memory, and how bursty its production arrivals are.

`python benchmarks/synth.py [MILLIONS]` writes so many requests (default 10; 100 is what was promised for) with
`tracegen.synthesize.synthesize_file` and, beside it, the least that any program must do for as many rows: draw uniform
times, sort them, draw two lognormal lengths with bare NumPy, write with pyarrow and zstd 3. Both in one process on one
core, in turn; the ratio is what counts. `--dispersion` holds the index of dispersion of 20 seeds of `--arrivals
production` against the bands within which simulations of the same models fell when they were fitted.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracegen.durations import NS_PER_S
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize, synthesize_file
from tracegen.workload import Workload

RATE_RPS = 1000.0
PART = 2**20
SEEDS = 20
SESSIONS = Structure(turns=4, system_prompts=10, system_tokens=500)
# 5 % and 95 % of simulated hours, and what the published hours have (Azure 2023 conversation and code).
BANDS = {
    "chat": (3501.7, {1: (1.20, 1.47, 1.39), 10: (2.93, 5.62, 3.87), 60: (10.54, 26.62, 16.41)}),
    "code": (3435.9, {1: (11.86, 17.09, 13.19), 10: (58.66, 87.85, 71.85), 60: (127.02, 226.77, 166.89)}),
}


def ours(
    path: Path, rows: int, arrivals: str = "poisson", structure: Structure | None = None, rate_rps: float = RATE_RPS
) -> int:
    """A trace of about `rows` requests; how many."""
    workload = Workload("chat", rate_rps, int(rows / rate_rps * NS_PER_S), 1, arrivals, structure=structure)
    return int(synthesize_file(path, workload)["requests"])


def bare(path: Path, rows: int) -> int:
    """As many rows by NumPy and pyarrow alone."""
    stream = np.random.default_rng(1)
    span_ns = int(PART / RATE_RPS * NS_PER_S)
    names = ("request_id", "arrival_ns", "input_tokens", "output_tokens")
    kinds = (pa.uint64(), pa.int64(), pa.uint32(), pa.uint32())
    with pq.ParquetWriter(
        path, pa.schema(zip(names, kinds, strict=True)), compression="zstd", compression_level=3
    ) as f:
        for first in range(0, rows, PART):
            count = min(PART, rows - first)
            arrival_ns = np.sort(stream.integers(0, span_ns, count)) + first // PART * span_ns
            ids = np.arange(first, first + count, dtype=np.uint64)
            lengths = [
                np.clip(np.rint(np.exp(mean + stream.standard_normal(count))), 1, 16_000).astype(np.uint32)
                for mean in (6.9, 4.9)
            ]
            f.write_table(pa.table([ids, arrival_ns, *lengths], schema=f.schema))
    return rows


def timed(make: Callable[[Path], int]) -> tuple[float, float, float]:
    """Millions of rows a second by wall clock and by CPU time, and bytes a row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        rows = make(path)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        return rows / wall_s / 1e6, rows / cpu_s / 1e6, path.stat().st_size / rows


def speed(millions: float) -> None:
    """Print the speeds, ours and bare in turn."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = int(millions * 1e6)
    timed(lambda path: ours(path, PART))  # what is loaded once
    jobs: dict[str, Callable[[Path], int]] = {
        "bare NumPy + pyarrow": lambda path: bare(path, rows),
        "Poisson": lambda path: ours(path, rows),
        "gamma": lambda path: ours(path, rows, "gamma"),
        "log-ou": lambda path: ours(path, rows, "log-ou"),
        "on-off": lambda path: ours(path, rows, "on-off"),
        "sessions, a tenth": lambda path: ours(path, rows // 10, "poisson", SESSIONS, RATE_RPS / 50),
    }
    base = 0.0
    print(f"{millions:g} million requests, one core\n{'':22}  M rows/s  by CPU time  ratio  bytes/row")
    for name, job in jobs.items():
        wall, cpu, size = max((timed(job) for _ in range(2)), key=lambda figures: figures[1])
        base = base or cpu
        print(f"{name:22}  {wall:8.2f}  {cpu:11.2f}  {cpu / base:5.2f}  {size:9.1f}")


def memory(millions: float) -> None:
    """Print the peak resident memory of a fresh process that makes as many requests."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        print(f"peak memory for {millions:g} million: {pool.apply(peak_mib, (millions,)):.0f} MiB")


def peak_mib(millions: float) -> float:
    """Make the requests here; the peak resident memory of this process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        ours(Path(folder) / "t.parquet", int(millions * 1e6))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dispersion() -> None:
    """Print the index of dispersion of production arrivals over the seeds against its bands."""
    print("mix   window  source  median of seeds  5 % to 95 %     band             seeds in the band")
    for mix, (length_s, bands) in BANDS.items():
        traces = [
            synthesize(mix, None, int(length_s * NS_PER_S), seed, arrivals="production")[0]["arrival_ns"].to_numpy()
            for seed in range(SEEDS)
        ]
        for window_s, (low, high, real) in bands.items():
            bins = int(length_s // window_s)
            counts = [np.bincount((t // (window_s * NS_PER_S)).astype(int), minlength=bins)[:bins] for t in traces]
            found = np.array([c.var(ddof=1) / c.mean() for c in counts])
            inside = int(((found >= low) & (found <= high)).sum())
            ends = "{:6.2f} to {:6.2f}".format(*np.quantile(found, [0.05, 0.95]))
            print(
                f"{mix}  {window_s:4} s  {real:6.2f}  {np.median(found):15.2f}  {ends}  "
                f"{low:6.2f} to {high:6.2f}  {inside} of {SEEDS}"
            )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", type=float, nargs="?", default=10.0)
    parser.add_argument("--dispersion", action="store_true", help="hold production arrivals against their bands")
    asked = parser.parse_args()
    if asked.dispersion:
        dispersion()
        return
    memory(asked.millions)
    speed(asked.millions)


if __name__ == "__main__":
    main()
