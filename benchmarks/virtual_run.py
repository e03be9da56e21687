"""Runs of the simulated engine in virtual time: run directories in seconds instead of minutes, with known power.

Scheduler and hardware model are those of `replay run --engine sim`; HTTP, sockets and sleeping are left out. SIMULATED:
what is checked on such a run is the checks, not a machine.
"""

from collections import deque
from pathlib import Path

import numpy as np
import polars as pl

from replay.rundir import POWER, REQUESTS, Run, compact, write_manifest
from replay.sim.hardware import Hardware, load_profile
from replay.sim.scheduler import Request, Scheduler
from replay.steps import SIM_CLOCK, StepWriter
from tracegen.schema import write_trace

T0_NS = 5_000_000_000_000
BEFORE_S, AFTER_S = 2.0, 2.0  # power is sampled that long beyond the window
POLL_S, COUNTER_S = 0.02, 0.1
PROFILE = "dgx-h100-llama-2-70b"


def virtual_run(path: Path, trace: pl.DataFrame, *, tp: int = 2, clock_mhz: int = 1980, seed: int = 0) -> Run:
    """Serve `trace` in virtual time and write a complete run directory at `path`."""
    hardware = Hardware(load_profile(PROFILE), tp)
    path.mkdir(parents=True)
    edges_s, watts, first_s, last_s = _serve(path, trace, hardware, clock_mhz)
    end_s = float(edges_s[-1]) + 0.2
    idle_w = hardware.idle_w(clock_mhz)
    write_trace(trace, path / "trace.parquet", {"generator": "virtual", "seed": seed, "parameters": {}})
    _requests(trace, first_s, last_s).write_parquet(path / "requests.parquet")
    _power(hardware, edges_s, watts, idle_w, end_s, seed).write_parquet(path / "power.parquet")
    known = {"counter": idle_w, "instant": idle_w}
    sensor = hardware.profile.sensor
    sensors = {"instant": {"period_ns": sensor.period_ns, "window_ns": sensor.window_ns, "lag_ns": sensor.lag_ns}}
    gpus = [
        {"host": "node", "gpu": g, "name": hardware.profile.gpu_name, "sensors": sensors}
        | {"idle_power_w": known, "idle_power_after_w": known}
        for g in range(tp)
    ]
    instance = {"instance": 0, "host": "node", "gpus": list(range(tp)), "tp": tp, "freq_mhz": clock_mhz}
    write_manifest(
        path,
        {
            "state": "complete",
            "engine": "simulated",
            "run_id": path.name,
            "measure_start_ns": T0_NS,
            "measure_end_ns": T0_NS + round(end_s * 1e9),
            "instances": [instance | {"model": hardware.profile.name, "max_model_len": hardware.profile.max_model_len}],
            "gpus": gpus,
            "hosts": [{"host": "node", "offset_ns": 0, "offset_error_ns": 0}],
            "workers": [{"worker": 0, "host": "node"}],
            "verdicts": [],
        },
    )
    return Run.open(path)


def _serve(
    path: Path, trace: pl.DataFrame, hardware: Hardware, clock_mhz: int
) -> tuple[np.ndarray, np.ndarray, dict[int, float], dict[int, float]]:
    """Write steps and segments; the n steps' edges in s (2n), the group's power in them (n), first and last tokens."""
    profile = hardware.profile
    scheduler = Scheduler(
        kv_tokens=hardware.kv_tokens,
        block_tokens=profile.block_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
    )
    columns = trace.select("arrival_ns", "request_id", "input_tokens", "output_tokens")
    coming = deque((t / 1e9, Request(i, n, m)) for t, i, n, m in columns.iter_rows())
    writer = StepWriter(path, 0, extra=SIM_CLOCK)
    now_s, edges, watts = 0.0, [], []
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running and not scheduler.waiting:
            now_s = max(now_s, coming[0][0])
        while coming and coming[0][0] <= now_s:
            scheduler.add(coming.popleft()[1])
        batch = scheduler.schedule()
        end_s = now_s + float(hardware.step_s(batch.work, clock_mhz))
        watts.append(float(hardware.step_w(batch.work, clock_mhz)))
        edges += [now_s, end_s]
        start_ns, end_ns = (T0_NS + round(t * 1e9) for t in (now_s, end_s))
        writer.add(start_ns, end_ns, batch.work, batch.parts, batch.waiting, batch.kv_usage, clock_mhz)
        now_s = end_s
        for request in scheduler.complete(batch):
            assert request.request_id is not None
            first_s.setdefault(request.request_id, now_s)
            last_s[request.request_id] = now_s
    writer.write(writer.take())
    for table in ("steps", "segments"):
        compact(path, table)
    return np.array(edges), np.array(watts), first_s, last_s


def _requests(trace: pl.DataFrame, first_s: dict[int, float], last_s: dict[int, float]) -> pl.DataFrame:
    """requests.parquet as a client without latency of its own would have seen it."""
    ids = trace["request_id"].to_list()

    def ns(times_s: dict[int, float]) -> pl.Series:
        return pl.Series([T0_NS + round(times_s[i] * 1e9) for i in ids], dtype=pl.Int64)

    frame = trace.select("request_id", "input_tokens", "output_tokens").with_columns(
        *((trace["arrival_ns"] + T0_NS).alias(c) for c in ("scheduled_ns", "sent_ns", "headers_ns")),
        ns(first_s).alias("first_token_ns"),
        *(ns(last_s).alias(c) for c in ("last_token_ns", "done_ns")),
        trace["output_tokens"].alias("output_tokens_wanted"),
        *(pl.lit(value).alias(c) for c, value in (("instance", 0), ("worker", 0), ("cached_tokens", 0))),
        status=pl.lit("ok"),
        http_status=pl.lit(200),
        error=pl.lit(None),
    )
    return frame.select(pl.col(c).cast(d) for c, d in REQUESTS.items())


def _power(
    hardware: Hardware, edges_s: np.ndarray, watts: np.ndarray, idle_w: float, end_s: float, seed: int
) -> pl.DataFrame:
    """power.parquet as the group's sensors show it: instant power with noise, and the counter."""
    sensor, rng = hardware.profile.sensor, np.random.default_rng(seed)
    times_s = np.concatenate([[-BEFORE_S - 5.0], edges_s, [end_s + AFTER_S + 5.0]])
    level_w = np.full(times_s.size - 1, idle_w)
    level_w[1::2] = watts / hardware.tp
    joules = np.concatenate([[0.0], np.cumsum(level_w * np.diff(times_s))])
    polls_s = np.arange(-BEFORE_S, end_s + AFTER_S, POLL_S)
    frames = []
    for gpu in range(hardware.tp):
        period_s, window_s, phase_s = (v / 1e9 for v in (sensor.period_ns, sensor.window_ns, sensor.phases_ns[gpu]))
        update = np.floor((polls_s - phase_s) / period_s).astype(int)
        sensed_s = update * period_s + phase_s
        mean_w = (np.interp(sensed_s, times_s, joules) - np.interp(sensed_s - window_s, times_s, joules)) / window_s
        noise = sensor.noise_rel * rng.standard_normal(int(np.ptp(update)) + 1)[update - update.min()]
        counted_s = np.floor((polls_s - phase_s) / COUNTER_S) * COUNTER_S + phase_s
        frame = pl.DataFrame(
            {
                "t_ns": T0_NS + np.round(polls_s * 1e9).astype(np.int64),
                "sensor_ns": T0_NS + np.round(sensed_s * 1e9).astype(np.int64),
                "gpu": np.full(polls_s.size, gpu),
                "power_instant_mw": np.round(mean_w * (1 + noise) * 1e3).astype(np.int64),
                "energy_mj": np.round(1e6 + np.interp(counted_s, times_s, joules) * 1e3).astype(np.int64),
            }
        )
        frames.append(frame.with_columns(host=pl.lit("node")))
    missing = [pl.lit(None).alias(c) for c in POWER if c not in frames[0].columns]
    return pl.concat(frames).with_columns(missing).select(pl.col(c).cast(d) for c, d in POWER.items())
