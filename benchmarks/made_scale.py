"""A run directory of any size, made up: for measuring how long attribution takes and how much memory, not how right.

    python benchmarks/made_scale.py FOLDER STEPS [INSTANCES]

Every tenth step a request comes that is prefilled in one step and then decodes for about 200, so that some 20 requests
are in each step; steps take 25 to 60 ms and two GPUs an instance are read at 10 Hz, instant power and counter. A tile
of steps is worked out a few times and laid end to end: the tables have the size, the order and the spread of a real
run's, but whole stretches of them recur.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from replay.rundir import write_manifest
from replay.tables import POWER, REQUESTS, SEGMENTS, STEPS
from tracegen.schema import TRACE

TILE_STEPS, TILES = 500_000, 3  # different ones
GPUS, IDLE_W, READ_S = 2, 100.0, 0.1
T0_NS = 10**12


def tile(seed: int) -> dict[str, Any]:
    """Steps from 0 on, the requests in them, and watts of one GPU, all from 0 s."""
    rng = np.random.default_rng(seed)
    n, count = TILE_STEPS, TILE_STEPS // 10
    first = np.sort(rng.integers(0, n - 700, count))
    life = np.minimum(rng.geometric(1 / 199, count), 600)
    inputs = np.clip(np.exp(rng.normal(6.0, 1.0, count)), 8, 4000).astype(np.int64)

    def running(at: Any, values: Any, until: Any) -> Any:
        delta = np.bincount(at, weights=values, minlength=n + 1) - np.bincount(until, weights=values, minlength=n + 1)
        return np.rint(np.cumsum(delta)[:n])

    one = np.ones(count)
    prefill = np.bincount(first, weights=inputs, minlength=n)
    attention = np.floor(np.bincount(first, weights=inputs**2 / 2, minlength=n))
    decode = running(first + 1, one, first + 1 + life)
    # Context at step k is inputs + k - first - 1 for those who decode.
    base, step = running(first + 1, inputs - first - 1.0, first + 1 + life), np.arange(n)
    context = base + decode * step
    requests = decode + np.bincount(first, minlength=n)
    compute = 0.004 + 0.00011 * (prefill + decode) + 1.1e-8 * attention
    memory = 0.024 + 2.4e-7 * context
    span = 0.002 + (compute**3 + memory**3) ** (1 / 3)
    watts = np.where(requests > 0, IDLE_W + 150 * memory / span + 350 * (compute / span) ** 0.8, IDLE_W)
    end = np.cumsum(span)
    return {
        "first": first, "life": life, "inputs": inputs, "start": end - span + 1e-4, "end": end, "watts": watts,
        "joules": np.concatenate([[0.0], np.cumsum(watts * span)]),
        "steps": {
            "prefill_tokens": prefill, "decode_tokens": decode, "context_tokens": context,
            "prefill_attention": attention, "requests": np.maximum(requests, 1),
        },
    }  # fmt: skip


def main() -> None:
    """Write the run."""
    folder, steps = Path(sys.argv[1]), int(float(sys.argv[2]))
    instances = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    folder.mkdir(parents=True)
    tiles = [tile(seed) for seed in range(TILES)]
    rounds = max(1, steps // instances // TILE_STEPS)
    writers: dict[str, pq.ParquetWriter] = {}

    def write(name: str, schema: pl.Schema, columns: dict[str, Any]) -> None:
        frame = pl.DataFrame(columns).select(
            (pl.col(c) if c in columns else pl.lit(None)).cast(d).alias(c) for c, d in schema.items()
        )
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        if name not in writers:
            writers[name] = pq.ParquetWriter(
                folder / f"{name}.parquet", table.schema, compression="zstd", write_page_checksum=True
            )
        writers[name].write_table(table)

    start_s, ends_s, request = 0.0, [0.0] * instances, 0
    counters = np.zeros((instances, GPUS))
    rng = np.random.default_rng(99)
    for i in range(rounds):
        for instance in range(instances):
            made = tiles[(i + instance) % TILES]
            at_ns = T0_NS + round(ends_s[instance] * 1e9)
            request = _round(write, made, instance, i, at_ns, request)
            length = float(made["end"][-1])
            _power(write, made, instance, at_ns, length, counters[instance], rng)
            ends_s[instance] += length
    for writer in writers.values():
        writer.close()
    del start_s
    gpus = [
        {"host": "node", "gpu": g, "idle_power_w": {"instant": IDLE_W, "counter": IDLE_W},
         "sensors": {"instant": {"period_ns": 10**8, "window_ns": 25 * 10**6, "lag_ns": 0}}}
        for g in range(instances * GPUS)
    ]  # fmt: skip
    described = [
        {"instance": i, "host": "node", "gpus": [i * GPUS, i * GPUS + 1], "tp": GPUS, "freq_mhz": 1980, "model": "made"}
        for i in range(instances)
    ]
    write_manifest(
        folder,
        {"state": "complete", "engine": "simulated", "run_id": folder.name, "measure_start_ns": T0_NS,
         "measure_end_ns": T0_NS + round(min(ends_s) * 1e9), "instances": described, "gpus": gpus, "hosts": []},
    )  # fmt: skip


def _round(write: Any, made: dict[str, Any], instance: int, i: int, at_ns: int, request: int) -> int:
    """One tile of an instance's steps, segments, requests and trace; the next request's id."""
    n, count = TILE_STEPS, made["first"].size
    ns = {edge: at_ns + np.rint(made[edge] * 1e9).astype(np.int64) for edge in ("start", "end")}
    number = i * n + np.arange(n)
    zeros = np.zeros(n, np.int64)
    write("steps", STEPS, {"instance": zeros + instance, "step": number, "start_ns": ns["start"], "end_ns": ns["end"],
          "waiting": zeros, "kv_usage": zeros, **made["steps"]})  # fmt: skip
    ids, first = request + np.arange(count), made["first"]
    twice = np.argsort(np.concatenate([first, first + 1]), kind="stable")
    pair = {
        "request_id": np.tile(ids, 2),
        "first_step": np.concatenate([first, first + 1]) + i * n,
        "last_step": np.concatenate([first, first + made["life"]]) + i * n,
        "kind": np.repeat(["prefill", "decode"], count),
        "tokens_per_step": np.concatenate([made["inputs"], np.ones(count, np.int64)]),
        "context_start": np.concatenate([np.zeros(count, np.int64), made["inputs"]]),
    }
    write("segments", SEGMENTS, {"instance": np.full(2 * count, instance), **{k: v[twice] for k, v in pair.items()}})
    sent, got, done = (ns[e][at] for e, at in (("start", first), ("end", first), ("end", first + made["life"])))
    served = {"input_tokens": made["inputs"], "output_tokens": made["life"] + 1}
    write("requests", REQUESTS, {"request_id": ids, "instance": np.full(count, instance), "scheduled_ns": sent,
          "sent_ns": sent, "headers_ns": got, "first_token_ns": got, "last_token_ns": done, "done_ns": done, **served,
          "output_tokens_wanted": served["output_tokens"], "cached_tokens": np.zeros(count, np.int64),
          "status": np.full(count, "ok"), "http_status": np.full(count, 200),
          "worker": np.zeros(count, np.int64)})  # fmt: skip
    write("trace", TRACE, {"request_id": ids, "arrival_ns": sent - T0_NS, **served})
    return request + count


def _power(
    write: Any, made: dict[str, Any], instance: int, at_ns: int, length_s: float, counters: Any, rng: Any
) -> None:
    """The readings of an instance's GPUs over a tile; the counters go on."""
    t_s = np.arange(0.0, length_s, READ_S)
    edges = np.concatenate([[0.0], made["end"]])
    joules = np.interp(t_s, edges, made["joules"])
    shown = (joules - np.interp(t_s - 0.025, edges, made["joules"])) / 0.025
    shown[0] = IDLE_W
    columns: dict[str, list[Any]] = {name: [] for name in ("t_ns", "gpu", "power_instant_mw", "energy_mj")}
    for gpu in range(GPUS):
        columns["t_ns"].append(at_ns + np.rint(t_s * 1e9).astype(np.int64))
        columns["gpu"].append(np.full(t_s.size, instance * GPUS + gpu))
        columns["power_instant_mw"].append(np.rint(1e3 * shown * (1 + 0.02 * rng.standard_normal(t_s.size))))
        columns["energy_mj"].append(np.rint(1e3 * (counters[gpu] + joules)))
        counters[gpu] += made["joules"][-1]
    whole = {name: np.stack(parts, axis=1).ravel() for name, parts in columns.items()}
    rows = whole["t_ns"].size
    clocks = {"sm_clock_mhz": np.full(rows, 1980), "mem_clock_mhz": np.full(rows, 2619)}
    rest = {"temperature_c": np.full(rows, 60), "utilization": np.full(rows, 99), "throttle_reasons": np.zeros(rows)}
    write("power", POWER, {**whole, "sensor_ns": whole["t_ns"], "host": np.full(rows, "node"), **clocks, **rest})


if __name__ == "__main__":
    main()
