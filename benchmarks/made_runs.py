"""Made-up runs with ground truth, whose laws attribution does not know; for tests and `benchmarks/accuracy.py`.

A continuous-batching loop with chunked prefill makes steps and segments. A `Law` says how long a step of given work
takes and what power its group draws: waves, partial overlap, hard and soft limits, caps that lengthen steps, warming.
Sensors show it as an H100's do: every 100 ms the mean of the last 25 ms, polled at 25 ms, and a counter; or as an
A100's does, by the mean of the last second. Truth is each step's Shapley value of energy = power x time over its
requests, by sampled orders, with the energy at zero work shared equally and exactly.

The magnitudes are those of a 70B model on H100s (docs/calibration.md): steps of 20-60 ms, 100 W idle, up to 650 W.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from replay.rundir import Run, write_manifest
from replay.tables import POWER, REQUESTS, SEGMENTS, STEPS, TRUTH
from tracegen.schema import TRACE

Floats = NDArray[np.float64]

T0_NS = 7_000_000_000_000
IDLE_W = 100.0
GPUS = 2
BUDGET_TOKENS = 512
PAUSE_S = 0.0004  # between steps, in which the engine schedules
ROTATIONS = 8  # of each sampled order


@dataclass(frozen=True)
class Law:
    """How long a step of `work` (..., 4) takes and what power the group draws in it, at first; and how that drifts."""

    step_s: Callable[[Floats], Floats]
    power_w: Callable[[Floats], Floats]
    warming_rel: float = 0.0  # power above idle rises by this share, with a time constant of 120 s

    def energy_j(self, work: Floats, t_s: float = 0.0) -> Floats:
        """Energy of steps of `work` that start at `t_s`."""
        return self.watts(work, t_s) * self.step_s(work)

    def watts(self, work: Floats, t_s: Floats | float) -> Floats:
        """Power of the group in steps of `work` that start at `t_s`."""
        warm = 1 + self.warming_rel * (1 - np.exp(-np.asarray(t_s) / 120.0))
        return np.asarray(GPUS * IDLE_W + (self.power_w(work) - GPUS * IDLE_W) * warm)


def _waves(work: Floats, wave: int) -> Floats:
    return np.asarray(wave * np.ceil((work[..., 0] + work[..., 1]) / wave))


def _compute_s(work: Floats, wave: int = 1) -> Floats:
    return 0.004 + 0.00011 * _waves(work, wave) + 1.1e-8 * work[..., 3]


def _memory_s(work: Floats) -> Floats:
    return 0.016 + 2.4e-7 * work[..., 2] + 2e-6 * (work[..., 0] + work[..., 1])


def _kink_s(work: Floats) -> Floats:
    """Compute in waves of 64 tokens overlaps memory to 70 %."""
    compute, memory = _compute_s(work, 64), _memory_s(work)
    return 0.003 + np.maximum(compute, memory) + 0.3 * np.minimum(compute, memory)


def _kink_w(work: Floats) -> Floats:
    """Power saturates in compute activity."""
    busy, memory = _compute_s(work) / _kink_s(work), _memory_s(work) / _kink_s(work)
    return GPUS * (IDLE_W + 130 * memory + 420 * busy**0.7 / (1 + 0.25 * busy))


def _soft_s(work: Floats) -> Floats:
    """A soft maximum of compute and memory time."""
    return 0.003 + (_compute_s(work) ** 3.5 + _memory_s(work) ** 3.5) ** (1 / 3.5)


def _soft_w(work: Floats) -> Floats:
    """Power rises with both activities, up to a soft cap."""
    busy, memory = _compute_s(work) / _soft_s(work), _memory_s(work) / _soft_s(work)
    dynamic = 160 * memory**0.8 + 430 * busy**1.3
    return GPUS * (IDLE_W + (dynamic**-6 + 520.0**-6) ** (-1 / 6))


def _fast_compute_s(work: Floats, wave: int = 1) -> Floats:
    """About 14,000 prefill tokens/s, as of eight GPUs."""
    return 0.003 + 0.00005 * _waves(work, wave) + 4e-9 * work[..., 3]


def _fast_memory_s(work: Floats) -> Floats:
    return 0.014 + 1.2e-7 * work[..., 2] + 2e-6 * (work[..., 0] + work[..., 1])


def _fast_kink_s(work: Floats) -> Floats:
    compute, memory = _fast_compute_s(work, 64), _fast_memory_s(work)
    return 0.003 + np.maximum(compute, memory) + 0.3 * np.minimum(compute, memory)


def _fast_kink_w(work: Floats) -> Floats:
    busy, memory = _fast_compute_s(work) / _fast_kink_s(work), _fast_memory_s(work) / _fast_kink_s(work)
    return GPUS * (IDLE_W + 130 * memory + 420 * busy**0.7 / (1 + 0.25 * busy))


def _fast_soft_s(work: Floats) -> Floats:
    return 0.003 + (_fast_compute_s(work) ** 3.5 + _fast_memory_s(work) ** 3.5) ** (1 / 3.5)


def _fast_soft_w(work: Floats) -> Floats:
    busy, memory = _fast_compute_s(work) / _fast_soft_s(work), _fast_memory_s(work) / _fast_soft_s(work)
    dynamic = 160 * memory**0.8 + 430 * busy**1.3
    return GPUS * (IDLE_W + (dynamic**-6 + 520.0**-6) ** (-1 / 6))


def _tile_s(work: Floats) -> Floats:
    """Compute in tiles of 128 tokens under a hard maximum with memory."""
    return 0.004 + np.maximum(_fast_compute_s(work, 128), _fast_memory_s(work))


def _tile_w(work: Floats) -> Floats:
    busy, memory = _fast_compute_s(work, 128) / _tile_s(work), _fast_memory_s(work) / _tile_s(work)
    return GPUS * (IDLE_W + 40 + 150 * memory + 330 * np.minimum(busy, 1.0) ** 1.5)


def _uncapped(work: Floats) -> tuple[Floats, Floats]:
    compute, memory = _fast_compute_s(work), _fast_memory_s(work)
    step_s = 0.003 + (compute**6 + memory**6) ** (1 / 6)
    return step_s, 180 * memory / step_s + 520 * compute / step_s


def _cap_s(work: Floats) -> Floats:
    """A hard power cap of 560 W lowers the clock, which lengthens the step."""
    step_s, dynamic_w = _uncapped(work)
    return step_s * (1 + 0.6 * np.maximum(dynamic_w / 460.0 - 1, 0.0))


def _cap_w(work: Floats) -> Floats:
    return GPUS * (IDLE_W + np.minimum(_uncapped(work)[1], 460.0))


def _read_s(work: Floats) -> Floats:
    """Reading context gets slower the more there is of it, attention costs more than in proportion."""
    compute = 0.003 + 0.00005 * (work[..., 0] + work[..., 1]) + 6e-10 * work[..., 3] ** 1.15
    memory = 0.014 + 1.0e-7 * work[..., 2] * (1 + work[..., 2] / 4e5) + 2e-6 * work[..., 0]
    return 0.002 + 0.8 * np.maximum(compute, memory) + 0.5 * np.minimum(compute, memory)


def _read_w(work: Floats) -> Floats:
    step_s = _read_s(work)
    busy, memory = _fast_compute_s(work) / step_s, (_fast_memory_s(work)) / step_s
    return GPUS * (IDLE_W + 120 * memory + 300 * busy + 120 * busy * memory)


LAWS = {
    "kink": Law(_kink_s, _kink_w),
    "soft": Law(_soft_s, _soft_w),
    "fast-kink": Law(_fast_kink_s, _fast_kink_w),
    "fast-soft": Law(_fast_soft_s, _fast_soft_w, warming_rel=0.04),
    "tile": Law(_tile_s, _tile_w),
    "cap": Law(_cap_s, _cap_w),
    "read": Law(_read_s, _read_w),
}


@dataclass
class Load:
    """What the made-up engine is asked, and how its sensors see it."""

    rate: float = 3.0
    duration_s: float = 60.0
    seed: int = 1
    law: str = "kink"
    noise_rel: float = 0.0
    counter: bool = True
    instant: bool = True
    window_s: float = 0.025  # of the mean that a sample shows; 1.0 as an A100's averaging sensor
    silent_s: tuple[float, float] | None = None  # no arrivals in between
    orders: int = 64  # of the truth
    arguments: dict[str, Any] = field(default_factory=dict)


def shapley(energy_j: Callable[[Floats], Floats], work: Floats, rng: np.random.Generator, orders: int = 64) -> Floats:
    """Shapley values (n,) of the step whose requests do `work` (n, 4).

    Each sampled order is rotated and turned round, so that everybody stands everywhere about equally often.
    """
    n = work.shape[0]
    zero_j = float(energy_j(np.zeros(4)))
    if n == 1:
        return energy_j(work)
    turned = (np.arange(n) + (np.arange(ROTATIONS)[:, None] * n) // ROTATIONS) % n
    base = np.concatenate([rng.permutation(n)[turned] for _ in range(max(1, orders // (2 * ROTATIONS)))])
    perms = np.concatenate([base, base[:, ::-1]])
    energy = energy_j(np.cumsum(work[perms], axis=1))
    gains = np.diff(energy, axis=1, prepend=zero_j)
    paid = np.bincount(perms.ravel(), weights=gains.ravel(), minlength=n)
    return np.asarray(paid / perms.shape[0] + zero_j / n)


def _schedule(alive: list[int], inputs: list[int], done: list[int], made: list[int]) -> list[tuple[int, str, int, int]]:
    """One step's (request, kind, tokens, context): decodes first, then prefill chunks in order of arrival."""
    batch = [(r, "decode", 1, inputs[r] + made[r] - 1) for r in alive if done[r] >= inputs[r]]
    budget = BUDGET_TOKENS - len(batch)
    for r in [a for a in alive if done[a] < inputs[a]]:
        chunk = min(budget, inputs[r] - done[r])
        if chunk > 0:
            batch.append((r, "prefill", chunk, done[r]))
            budget -= chunk
    return batch


def serve(load: Load) -> dict[str, pl.DataFrame]:
    """Run the loop: trace, requests, steps, segments and truth as tables of a run directory."""
    rng = np.random.default_rng(load.seed)
    law = LAWS[load.law]
    arrivals = np.cumsum(rng.exponential(1 / load.rate, int(3 * load.rate * load.duration_s) + 10))
    if load.silent_s:
        arrivals = arrivals[(arrivals < load.silent_s[0]) | (arrivals > load.silent_s[1])]
    arrivals = arrivals[arrivals < load.duration_s]
    n = arrivals.size
    inputs = np.clip(np.exp(rng.normal(6.3, 1.2, n)), 8, 9000).astype(int).tolist()
    outputs = np.clip(np.exp(rng.normal(4.6, 0.8, n)), 2, 700).astype(int).tolist()
    done, made = [0] * n, [0] * n
    first_s, last_s = np.full(n, np.nan), np.full(n, np.nan)
    energy = np.zeros((n, 2))
    steps: list[tuple[float, ...]] = []
    rows: list[tuple[int, int, str, int, int]] = []
    t, alive, next_arrival = 0.0, [], 0
    while alive or next_arrival < n:
        if not alive:
            t = max(t, arrivals[next_arrival])
        while next_arrival < n and arrivals[next_arrival] <= t:
            alive.append(next_arrival)
            next_arrival += 1
        batch = _schedule(alive, inputs, done, made)
        work = np.array(
            [[c, 0, 0, c * (k + c / 2)] if kind == "prefill" else [0, c, k, 0] for _, kind, c, k in batch], float
        )
        total = work.sum(axis=0)
        start, t = t + PAUSE_S, t + PAUSE_S + float(law.step_s(total))
        steps.append((start, t, *total, len(batch), len(alive) - len(batch)))
        paid = shapley(lambda x, at=start: law.energy_j(x, at), work, rng, load.orders)
        for (r, kind, chunk, context), share in zip(batch, paid, strict=True):
            rows.append((r, len(steps) - 1, kind, chunk, context))
            energy[r, int(kind == "decode")] += share
            if kind == "prefill":
                done[r] += chunk
            if done[r] >= inputs[r]:
                made[r] += 1
                first_s[r] = t if made[r] == 1 else first_s[r]
                last_s[r] = t
        alive = [a for a in alive if made[a] < outputs[a]]
    return _frames(arrivals, inputs, outputs, first_s, last_s, energy, steps, rows)


def _frames(
    arrivals: Floats,
    inputs: list[int],
    outputs: list[int],
    first_s: Floats,
    last_s: Floats,
    energy: Floats,
    steps: list[tuple[float, ...]],
    rows: list[tuple[int, int, str, int, int]],
) -> dict[str, pl.DataFrame]:
    """The loop's outcome as tables of a run directory."""
    n = arrivals.size
    ids = pl.Series("request_id", np.arange(n) + 100, dtype=pl.UInt64)

    def ns(values: Floats) -> pl.Series:
        return pl.Series(np.round(np.asarray(values) * 1e9).astype(np.int64))

    trace = pl.DataFrame(
        {"request_id": ids, "arrival_ns": ns(arrivals), "input_tokens": inputs, "output_tokens": outputs}
    )
    requests = pl.DataFrame(
        {
            "request_id": ids,
            "instance": pl.Series(np.zeros(n, int)),
            "scheduled_ns": ns(arrivals) + T0_NS,
            "sent_ns": ns(arrivals) + T0_NS + 80_000,
            "headers_ns": ns(first_s) + T0_NS,
            "first_token_ns": ns(first_s) + T0_NS,
            "last_token_ns": ns(last_s) + T0_NS,
            "done_ns": ns(last_s) + T0_NS + 50_000,
            "input_tokens": inputs,
            "output_tokens": outputs,
            "output_tokens_wanted": outputs,
            "cached_tokens": np.zeros(n, int),
            "status": ["ok"] * n,
            "http_status": [200] * n,
            "error": [None] * n,
            "worker": np.zeros(n, int),
        }
    )
    columns = ["start_ns", "end_ns", "prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention"]
    table = pl.DataFrame(steps, schema=[*columns, "requests", "waiting"], orient="row").with_columns(
        (pl.col("start_ns", "end_ns") * 1e9).round().cast(pl.Int64) + T0_NS,
        pl.lit(0).alias("instance"),
        pl.int_range(pl.len()).alias("step"),
        pl.lit(0.1).alias("kv_usage"),
        pl.col("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention").floor().cast(pl.UInt64),
    )
    segments = pl.DataFrame(rows, schema=["r", "step", "kind", "tokens_per_step", "context_start"], orient="row")
    segments = _run_lengths(segments).with_columns(pl.lit(0).alias("instance"), (pl.col("r") + 100).alias("request_id"))
    truth = pl.DataFrame(
        {"request_id": ids, "energy_j": energy.sum(axis=1), "prefill_j": energy[:, 0], "decode_j": energy[:, 1]}
    )
    frames = {"trace": (trace, TRACE), "requests": (requests, REQUESTS), "steps": (table, STEPS)}
    frames |= {"segments": (segments, SEGMENTS), "truth": (truth, TRUTH)}
    return {
        name: frame.select(pl.col(c).cast(d) for c, d in schema.items()) for name, (frame, schema) in frames.items()
    }


def _run_lengths(rows: pl.DataFrame) -> pl.DataFrame:
    """Runs of decode steps as one row, every prefill chunk as its own."""
    rows = rows.sort("r", "step").with_columns(
        new=(pl.col("kind") == "prefill")
        | (pl.col("kind") != pl.col("kind").shift()).fill_null(True)
        | (pl.col("step") != pl.col("step").shift() + 1).fill_null(True)
        | (pl.col("r") != pl.col("r").shift()).fill_null(True)
    )
    return rows.group_by(pl.col("new").cum_sum().alias("run"), maintain_order=True).agg(
        pl.col("r").first(),
        pl.col("step").first().alias("first_step"),
        pl.col("step").last().alias("last_step"),
        pl.col("kind", "tokens_per_step", "context_start").first(),
    )


def sense(steps: pl.DataFrame, end_s: float, load: Load) -> pl.DataFrame:
    """power.parquet of the group's GPUs from 2 s before the window to 1 s after it."""
    rng = np.random.default_rng(load.seed + 1)
    start, end = (steps["start_ns"].to_numpy() - T0_NS) / 1e9, (steps["end_ns"].to_numpy() - T0_NS) / 1e9
    work = (
        steps.select("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention").to_numpy().astype(float)
    )
    edges = np.concatenate([[-10.0], np.stack([start, end], axis=1).ravel(), [end_s + 10]])
    watts = np.zeros(edges.size - 1) + IDLE_W
    watts[1::2] = LAWS[load.law].watts(work, start) / GPUS
    joules = np.concatenate([[0.0], np.cumsum(watts * np.diff(edges))])
    frames = []
    for gpu in range(GPUS):
        phase = 0.031 * gpu
        polls = np.arange(-2.0, end_s + 1.0, 0.025)
        update = np.floor((polls - phase) / 0.1).astype(int)
        sensed = update * 0.1 + phase
        mean_w = (np.interp(sensed, edges, joules) - np.interp(sensed - load.window_s, edges, joules)) / load.window_s
        mean_w *= 1 + load.noise_rel * rng.standard_normal(update.max() - update.min() + 1)[update - update.min()]
        counter = np.interp(np.floor(polls / 0.1 - 0.37) * 0.1 + 0.037, edges, joules) * 1e3 + 5e6
        rows = pl.DataFrame({"t_ns": np.round(polls * 1e9).astype(np.int64) + T0_NS, "gpu": np.full(polls.size, gpu)})
        nothing = pl.lit(None)
        frames.append(
            rows.with_columns(
                pl.Series("sensor_ns", np.round(sensed * 1e9).astype(np.int64) + T0_NS),
                pl.lit("node").alias("host"),
                pl.Series("power_instant_mw", np.round(mean_w * 1e3))
                if load.instant
                else nothing.alias("power_instant_mw"),
                pl.Series("energy_mj", np.round(counter)) if load.counter else nothing.alias("energy_mj"),
                *(
                    nothing.alias(c)
                    for c in POWER
                    if c not in {"t_ns", "sensor_ns", "host", "gpu", "power_instant_mw", "energy_mj"}
                ),
            )
        )
    return pl.concat(frames).select(pl.col(c).cast(d) for c, d in POWER.items())


def manifest(end_s: float, window_s: float = 0.025, **changes: Any) -> dict[str, Any]:
    """A complete manifest for the tables made here."""
    sensors = {"instant": {"period_ns": 100_000_000, "window_ns": round(window_s * 1e9), "lag_ns": 0}}
    idle = {"instant": IDLE_W, "counter": IDLE_W}
    return {
        "state": "complete",
        "engine": "simulated",
        "run_id": "synthetic",
        "measure_start_ns": T0_NS,
        "measure_end_ns": T0_NS + round(end_s * 1e9),
        "instances": [
            {"instance": 0, "host": "node", "gpus": list(range(GPUS)), "tp": GPUS, "freq_mhz": 1980, "model": "m"}
        ],
        "gpus": [
            {
                "host": "node",
                "gpu": g,
                "name": "Simulated",
                "idle_power_w": idle,
                "idle_power_after_w": idle,
                "sensors": sensors,
            }
            for g in range(GPUS)
        ],
        "hosts": [{"host": "node", "offset_ns": 0, "offset_error_ns": 0}],
        "workers": [{"worker": 0, "host": "node"}],
        "trace_sha256": "0" * 64,
        "verdicts": [{"name": "dispatch lag p99", "ok": True, "value": 0.4, "bound": 5.0, "why": ""}],
    } | changes


def write_run(path: Path, frames: dict[str, pl.DataFrame], document: dict[str, Any]) -> Run:
    """Write `frames` and the manifest as a run directory."""
    path.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.write_parquet(path / f"{name}.parquet")
    write_manifest(path, document)
    return Run.open(path)


def make_run(path: Path, load: Load | None = None, **changes: Any) -> Run:
    """A whole made-up run; `changes` go into the manifest."""
    load = load or Load()
    frames = serve(load)
    end_s = (frames["requests"]["done_ns"].max() - T0_NS) / 1e9 + 0.5
    frames["power"] = sense(frames["steps"], end_s, load)
    return write_run(path, frames, manifest(end_s, load.window_s, **changes))
