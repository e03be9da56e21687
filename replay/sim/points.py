"""Measured operating points, and what the simulated engine says of them: the data that a profile is calibrated on.

A point is one setting under one load: Poisson arrivals of equal requests at a rate, on a TP size at a locked clock,
with the mean power of the group and the P99 TTFT that came of it. The form and the defaults are those of the
characterization in the repository jovans2/jovan-vllm (`cluster_experiments/characterization*.csv`) by the first author
of Stojkovic et al., "Towards Greener LLMs".
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from replay.sim.hardware import Hardware
from replay.sim.physics import FloatArray
from replay.sim.profile import Profile
from replay.sim.virtual import VirtualEngines, arrivals_of, serve
from tracegen.errors import ReplayError

SCHEMA = {
    "load_rps": pl.Float64,
    "tp": pl.Int64,
    "sm_clock_mhz": pl.Int64,
    "bucket": pl.String,
    "power_like": pl.Float64,  # mean power of the group, in any unit
    "ttft_s": pl.Float64,  # P99
}
CELL = ("tp", "bucket", "sm_clock_mhz")
_NS = 1_000_000_000
# Points of one setting are served one after the other by one engine, far enough apart to be idle in between.
_APART_NS = 3600 * _NS
_ENGINE_STEPS = 1 << 14  # in the engine's buffers


class Load(NamedTuple):
    """How the points were loaded. The defaults are the source's, from its `benchmark_power.py`."""

    # Prompts and outputs of its Short, Medium and Long.
    input_tokens: tuple[int, int, int] = (467, 1010, 4085)
    output_tokens: tuple[int, int, int] = (96, 256, 600)
    # Llama-2's context: long prompts end 11 tokens after the prompt, whatever the bucket; LS, LM and LL show it.
    max_model_len: int = 4096
    # Requests arrive for 20 s, at times drawn with numpy's RandomState(100): the very arrivals are known.
    arrivals_s: float = 20.0
    seed: int = 100

    def tokens(self, bucket: str) -> tuple[int, int]:
        """Prompt and output tokens of the requests of `bucket`, such as SM."""
        prompt = self.input_tokens["SML".index(bucket[0])]
        return prompt, min(self.output_tokens["SML".index(bucket[1])], self.max_model_len - prompt)

    def arrivals_ns(self, rate_rps: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """When requests arrive at `rate_rps`, from the run's start."""
        # The source's generator, and with it its very arrivals, are numpy's legacy ones.
        gaps = np.random.RandomState(self.seed).exponential(1.0 / rate_rps, int(2 * self.arrivals_s * rate_rps))
        times_s = np.cumsum(gaps)
        return np.asarray(times_s[times_s < self.arrivals_s] * _NS, dtype=np.int64)


def read_points(path: Path, load: Load) -> pl.DataFrame:
    """The points of the CSV file `path`: the columns of `SCHEMA`, others dropped.

    Raises `ReplayError`, with the row, for a file that is none or holds what cannot be.
    """
    try:
        table = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ReplayError(f"--points {path}: cannot be read ({str(error).splitlines()[0]})") from None
    missing = [name for name in SCHEMA if name not in table.columns]
    if missing:
        raise ReplayError(f"--points {path}: lacks the columns {', '.join(missing)}; it needs {', '.join(SCHEMA)}")
    points = table.select(pl.col(name).str.strip_chars().cast(kind, strict=False) for name, kind in SCHEMA.items())
    number = [name for name, kind in SCHEMA.items() if kind != pl.String]
    wrong = {
        **{f"{name} must be a number above 0": ~(pl.col(name).is_finite() & (pl.col(name) > 0)) for name in number},
        "bucket must be two of S, M, L": ~pl.col("bucket").str.contains("^[SML][SML]$"),
        "no request arrives at this rate": pl.col("load_rps") * load.arrivals_s < 1,
    }
    for why, mask in wrong.items():
        rows = points.select(mask.fill_null(value=True).arg_true()).to_series()
        if rows.len():
            raise ReplayError(f"--points {path}: row {rows[0] + 2}: {why}")
    if points.is_empty():
        raise ReplayError(f"--points {path}: holds no points")
    twice = points.select(pl.struct(*CELL, "load_rps").is_first_distinct().not_().arg_true()).to_series()
    if twice.len():
        raise ReplayError(f"--points {path}: row {twice[0] + 2}: a point that was there before")
    return points


def simulate_points(profile: Profile, points: pl.DataFrame, load: Load) -> pl.DataFrame:
    """`points` with what the simulated engine makes of each, in virtual time.

    `sim_ttft_s` (P99), `sim_power_w` (mean of the whole group from the run's start to its last token), `sim_busy_w`
    (mean of one GPU while steps run), `sim_tbt_s` (mean duration of a decode step, weighted by its tokens).
    """
    found = np.full((points.height, 4), np.nan)
    rows = points.with_row_index("row")
    for (tp, mhz), cell in rows.group_by("tp", "sm_clock_mhz", maintain_order=True):
        hardware = Hardware(profile, int(tp))
        found[cell["row"].to_numpy()] = _simulate_cell(hardware, float(mhz), cell, load)
    names = ("sim_ttft_s", "sim_power_w", "sim_busy_w", "sim_tbt_s")
    return points.with_columns(pl.Series(name, found[:, i]) for i, name in enumerate(names))


def _simulate_cell(hardware: Hardware, clock_mhz: float, cell: pl.DataFrame, load: Load) -> FloatArray:
    """The four simulated columns [n, 4] of points that share hardware and clock."""
    times, prompts, outputs, owners = [], [], [], []
    for i, (rate_rps, bucket) in enumerate(cell.select("load_rps", "bucket").iter_rows()):
        arrivals_ns = load.arrivals_ns(rate_rps) + i * _APART_NS
        prompt, output = load.tokens(bucket)
        times.append(arrivals_ns)
        prompts.append(np.full(arrivals_ns.size, prompt))
        outputs.append(np.full(arrivals_ns.size, output))
        owners.append(np.full(arrivals_ns.size, i))
    arrival_ns, owner = np.concatenate(times), np.concatenate(owners)
    engines = VirtualEngines(hardware, clock_mhz, buffer_steps=_ENGINE_STEPS)
    served = serve(engines, arrivals_of(arrival_ns, np.concatenate(prompts), np.concatenate(outputs)))
    ttft_s = (served.done["first_token_ns"] - arrival_ns) / _NS
    n, steps = cell.height, served.steps
    place = steps["start_ns"] // _APART_NS
    step_s = (steps["end_ns"] - steps["start_ns"]) / _NS
    total = {
        name: np.bincount(place, weights=step_s * weight, minlength=n)
        for name, weight in {"busy_s": 1.0, "gpu_j": steps["gpu_w"], "decode_s": steps["decode_tokens"]}.items()
    }
    end_s = np.zeros(n)
    np.maximum.at(end_s, place, steps["end_ns"] / _NS - place * (_APART_NS / _NS))
    decoded = np.bincount(place, weights=steps["decode_tokens"], minlength=n)
    idle_j = hardware.idle_w(clock_mhz) * (end_s - total["busy_s"])
    return np.column_stack(
        [
            [np.percentile(ttft_s[owner == i], 99) for i in range(n)],
            hardware.tp * (total["gpu_j"] + idle_j) / end_s,
            total["gpu_j"] / total["busy_s"],
            total["decode_s"] / np.maximum(decoded, 1),
        ]
    )
