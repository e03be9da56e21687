"""How fast is a published file imported? `python benchmarks/imports.py [--rows N] [--repeat N] [--pack gz|xz|zst]`.

Writes a CSV of the form of Azure's trace of 2024 (27,303,999 rows in the conversation week; N here, by default 3
million, at that week's 45 requests/s), then imports it in a process of its own by `tracegen import azure`, and beside
it by pandas: `read_csv` with the dates parsed, arrivals in nanoseconds from the first, `to_parquet` with zstd 3. pandas
checks none of what the import checks, hashes nothing, and holds the whole table in memory. Both write the same rows,
which is checked. `--form mooncake`: JSON Lines with 24 hash ids a row, as Mooncake's conversation trace has on
average, by pandas with `read_json(lines=True)`. Figures hold for the machine that it runs on; the ratio is of medians
within this run.
"""

import argparse
import gzip
import json
import lzma
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

REQUESTS_PER_S = 27_303_999 / (7 * 86400)
PART_ROWS = 1_000_000
JSON_PART_ROWS = 20_000
BLOCKS, SHARED = 24, 0.1  # of a prompt in Mooncake's conversation trace; of them, known ones here


def write_csv(path: Path, rows: int, pack: str | None) -> None:
    """A CSV as Azure publishes it; lengths are of no importance here but for their digits."""
    random = np.random.default_rng(1)
    at_us = 1_715_472_000 * 10**6
    with _packed(path, pack) as file:
        file.write(b"TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for first in range(0, rows, PART_ROWS):
            n = min(PART_ROWS, rows - first)
            times = at_us + np.cumsum(random.exponential(1e6 / REQUESTS_PER_S, n)).astype(np.int64)
            at_us = int(times[-1])
            part = pl.DataFrame({"t": times, "in": random.integers(1, 8000, n), "out": random.integers(1, 1000, n)})
            stamp = pl.col("t").cast(pl.Datetime("us")).dt.strftime("%Y-%m-%d %H:%M:%S%.6f") + "+00:00"
            file.write(part.select(stamp, "in", "out").write_csv(include_header=False).encode())


def write_jsonl(path: Path, rows: int, pack: str | None) -> None:
    """JSON Lines as Mooncake publishes them: a tenth of the blocks are shared."""
    random = np.random.default_rng(1)
    at_ms = 0
    with _packed(path, pack) as file:
        for first in range(0, rows, JSON_PART_ROWS):
            n = min(JSON_PART_ROWS, rows - first)
            times = at_ms + np.cumsum(random.exponential(1e3 / REQUESTS_PER_S, n)).astype(np.int64)
            at_ms = int(times[-1])
            hashes = np.where(random.random((n, BLOCKS)) < SHARED, 0, random.integers(1, 10**6, (n, BLOCKS))).tolist()
            tokens = random.integers(BLOCKS * 512 - 511, BLOCKS * 512, n).tolist()
            outputs = random.integers(1, 1000, n).tolist()
            rows_of = zip(times.tolist(), tokens, outputs, hashes, strict=True)
            file.writelines(
                b'{"timestamp": %d, "input_length": %d, "output_length": %d, "hash_ids": %s}\n'
                % (at, tokens_in, tokens_out, str(ids).encode())
                for at, tokens_in, tokens_out, ids in rows_of
            )


def _packed(path: Path, pack: str | None):  # noqa: ANN202 - one of four kinds of file
    if pack == "gz":
        return gzip.open(path, "wb", compresslevel=6)
    if pack == "xz":
        return lzma.open(path, "wb", preset=1)
    if pack == "zst":
        return pa.CompressedOutputStream(str(path), "zstd")
    return path.open("wb")


def by_tracegen(source: str, output: str) -> None:
    """Import as the command does."""
    from tracegen.importers.run import import_trace

    import_trace(source, output, force=True)


def by_pandas(source: str, output: str) -> None:
    """The same table, as one would write it with pandas."""
    import pandas as pd

    if ".jsonl" in source:
        frame = pd.read_json(source, lines=True)
        frame["arrival_ns"] = (frame["timestamp"] - frame["timestamp"].iloc[0]) * 10**6
        names = {"input_length": "input_tokens", "output_length": "output_tokens", "hash_ids": "prefix_hashes"}
        frame = frame.drop(columns="timestamp").rename(columns=names)
        frame.to_parquet(output, compression="zstd", compression_level=3, index=False)
        return
    frame = pd.read_csv(source)
    at = pd.to_datetime(frame["TIMESTAMP"], format="ISO8601")
    frame["arrival_ns"] = (at - at.iloc[0]).astype("timedelta64[ns]").astype("int64")
    frame["request_id"] = np.arange(len(frame), dtype=np.uint64)
    frame["label"] = "trace"
    frame = frame.drop(columns="TIMESTAMP").astype({"ContextTokens": "uint32", "GeneratedTokens": "uint32"})
    frame = frame.rename(columns={"ContextTokens": "input_tokens", "GeneratedTokens": "output_tokens"})
    frame.to_parquet(output, compression="zstd", compression_level=3, index=False)


WAYS = {"tracegen": by_tracegen, "pandas": by_pandas}


def child(way: str, source: str, output: str) -> None:
    """Run one way and print what it took."""
    start_s = time.perf_counter()
    WAYS[way](source, output)
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = {
        "wall_s": time.perf_counter() - start_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }
    print(json.dumps(took))


def main() -> None:
    """Make the file, import it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--form", choices=["azure", "mooncake"], default="azure")
    parser.add_argument("--pack", choices=["gz", "xz", "zst"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    took: dict[str, list[dict[str, float]]] = {way: [] for way in asked.ways}
    with tempfile.TemporaryDirectory() as folder:
        suffix, write = ("csv", write_csv) if asked.form == "azure" else ("jsonl", write_jsonl)
        source = Path(folder) / f"trace.{suffix}{'.' + asked.pack if asked.pack else ''}"
        write(source, asked.rows, asked.pack)
        size_mib = source.stat().st_size / 2**20
        print(f"{asked.rows:,} rows, {size_mib:,.0f} MiB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for _ in range(asked.repeat):
            for way, found in took.items():
                command = [sys.executable, __file__, "--child", way, str(source), f"{folder}/{way}.parquet"]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        if len(took) > 1 and asked.rows <= PART_ROWS * 3:
            columns = ["arrival_ns", "input_tokens", "output_tokens"]  # with equal values, whatever their types
            frames = [pl.read_parquet(f"{folder}/{way}.parquet", columns=columns) for way in took]
            assert frames[0].equals(frames[1].cast(frames[0].schema))
    print(f"{'':10}{'rows/s':>12}{'rows/CPU s':>12}{'peak MiB':>10}")
    medians = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in took.items()}
    for way, run in medians.items():
        rates = (asked.rows / run["wall_s"], asked.rows / run["cpu_s"])
        print(f"{way:10}{rates[0]:12,.0f}{rates[1]:12,.0f}{run['peak_mib']:10,.0f}")
    if len(medians) > 1:
        ratio = medians["pandas"]["wall_s"] / medians["tracegen"]["wall_s"]
        cpu_ratio = medians["pandas"]["cpu_s"] / medians["tracegen"]["cpu_s"]
        print(f"tracegen is {ratio:.2f} times as fast as pandas ({cpu_ratio:.2f} by CPU time)")


if __name__ == "__main__":
    main()
