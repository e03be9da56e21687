"""The load client against a server whose timing is known, beside a C client and `vllm bench serve`.

    python benchmarks/load_client.py --lab PATH [--runs 3] [--peers c_ref,vllm] [TRACE ...]

PATH is a copy of the replay-accuracy lab: it has the ground-truth server (`gtserver`), the C reference client
(`baseline/gtclient`), `run.py`, which starts one tool against the server, and `analyse.py`, which compares what the
tool says with what the server did. Each trace is sent by all in turns, so that a busy machine slows all; of several
runs the best counts, for whatever else runs on the machine can only make a client worse. Needs root, Linux and two
cores: the server has one, the client the other. Writes into PATH.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COLUMNS = {
    "dispatch_p50": "dispatch p50, ms", "dispatch_p99": "p99, ms", "ttft_err_p50": "TTFT error p50, ms",
    "ttft_err_p99": "p99, ms", "cpu_per_1k_req": "CPU s / 1,000 requests", "cpu_per_1k_tok": "/ 1,000 tokens",
    "load_mib": "MiB while sending", "rss_mib": "MiB at most", "lost": "lost", "client_bad": "not ok",
}  # fmt: skip
SERVER_ARGUMENTS = {"long": "--tbt 100"}  # the others have the server's own: 20 ms a token
# What the lab runs: the replayer in place of the process that wrote its trace, so that memory is the replayer's alone.
OURS = """#!/bin/sh
set -e
"$OURS_PYTHON" -c "
import sys, polars as pl
columns = {'tag': pl.UInt64, 'sched_s': pl.Float64, 'isl': pl.UInt32, 'osl': pl.UInt32}
table = pl.read_csv(sys.argv[1], schema_overrides=columns)
times = (pl.col('sched_s') * 1e9).round().cast(pl.Int64)
table = table.select(request_id='tag', arrival_ns=times, input_tokens='isl', output_tokens='osl')
table.write_parquet(sys.argv[2], metadata={'schema_version': '1'})" "$1.sched.csv" "$2/trace.parquet"
exec "$OURS_PYTHON" -m replay.cli run "$2/trace.parquet" --engine "http://127.0.0.1:$3" --model gt -o "$2/run"
"""


def run(lab: Path, tool: str, trace: str, number: int) -> dict[str, float | str]:
    """One run of `tool`; what the lab says of it."""
    arguments = f"--server-args={SERVER_ARGUMENTS.get(trace, '')}"
    command = [sys.executable, "run.py", tool, trace, "--suffix", f"bench{number}", "--timeout", "300", arguments]
    subprocess.run(command, cwd=lab, check=True, env={**os.environ, "OURS_PYTHON": sys.executable})
    folder = lab / "out" / f"{tool}-{trace}-bench{number}"
    if tool == "wattrace":
        write_client_csv(folder)
    found = folder / "analysis.json"
    analyse = [sys.executable, "analyse.py", str(folder), "--json", str(found)]
    subprocess.run(analyse, cwd=lab, check=True, stdout=subprocess.DEVNULL)
    return {**json.loads(found.read_text())[0], "load_mib": load_mib(folder)}


def write_client_csv(folder: Path) -> None:
    """Our records in the form in which the lab takes a client's."""
    import polars as pl

    pl.read_parquet(folder / "run" / "requests.parquet").select(
        tag="request_id",
        sched_s=pl.lit(0.0),
        due_ns="scheduled_ns",
        send_ns="sent_ns",
        first_ns=pl.col("first_token_ns").fill_null(0),
        last_ns=pl.col("last_token_ns").fill_null(0),
        ntok=pl.col("output_tokens").fill_null(0),
        status="status",
    ).write_csv(folder / "client.csv")


def load_mib(folder: Path) -> int:
    """The most memory of all the client's processes together while the most of them ran, which is while they sent."""
    rows = [line.split(",") for line in (folder / "samples.csv").read_text().splitlines()[1:]]
    most = max(int(row[5]) for row in rows)
    return max(int(row[4]) for row in rows if int(row[5]) == most) >> 20


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", default=["q1000", "q2000", "long"])
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", default="c_ref")
    asked = parser.parse_args()
    script = asked.lab / "peers" / "wattrace.sh"
    script.write_text(OURS)
    script.chmod(0o755)
    tools = ["wattrace", *filter(None, asked.peers.split(","))]
    print("| trace | client | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for trace in asked.traces:
        runs = {tool: [] for tool in tools}
        for number in range(asked.runs):
            for tool in tools:
                runs[tool].append(run(asked.lab, tool, trace, number))
        for tool, found in runs.items():
            said = {name: [r[name] for r in found if r.get(name) is not None] for name in COLUMNS}
            worst = {"lost", "client_bad"}
            best = {name: (max if name in worst else min)(of, default="-") for name, of in said.items()}
            print(f"| {trace} | {tool} | " + " | ".join(str(value) for value in best.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
