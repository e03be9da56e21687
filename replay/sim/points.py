"""Measured operating points, and what the simulated engine says of them: the data that a profile is calibrated on.

A point is one setting under one load: Poisson arrivals of equal requests at a rate, on a TP size at a locked clock,
with the mean power of the group and the P99 TTFT that came of it. The form and the defaults are those of the
characterization in the repository jovans2/jovan-vllm (`cluster_experiments/characterization*.csv`) by the first author
of Stojkovic et al., "Towards Greener LLMs".
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.sim.hardware import Hardware, Work
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
IntArray = npt.NDArray[np.int64]
CELL = ("tp", "bucket", "sm_clock_mhz")
_OUTCOMES = ("sim_ttft_s", "sim_power_w", "sim_busy_w", "sim_tbt_s")
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

    def arrivals_ns(self, rate_rps: float) -> IntArray:
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


class Played(NamedTuple):
    """Points of one TP size and clock, served: who was in which step, and how long steps and pauses were."""

    tp: int
    clock_mhz: float
    rows: IntArray  # of the points, in the table that they came from
    work: Work[FloatArray]  # of each step
    point: IntArray  # of each step: its place in `rows`
    last_run: npt.NDArray[np.bool_]  # the steps after which the engine does not idle before its point's end
    played_s: FloatArray  # how long each step lasted
    idle_s: FloatArray  # of each point, until its last token
    owner: IntArray  # of each request: its point's place in `rows`
    joined_step: IntArray  # of each request: the step under way when it arrived, else the one that it began with
    missed: FloatArray  # and which part of that step it had missed
    first_step: IntArray  # the step that gave it its first token

    def outcomes(self, profile: Profile) -> FloatArray:
        """The columns of `simulate_points` [n, 4] with these batches, by the step times and powers of `profile`.

        With the profile that they were played with, this is what happened. With one close to it, it is what happens as
        long as the batches stay as they are, which changes smoothly with the constants: a request arrives in the same
        part of the same step, and what steps take longer the pauses behind them are shorter.
        """
        hardware, n = Hardware(profile, self.tp), self.rows.size
        step_s = hardware.step_s(self.work, self.clock_mhz)
        gpu_w = hardware.step_w(self.work, self.clock_mhz) / self.tp
        end_s = np.cumsum(step_s)
        ttft_s = end_s[self.first_step] - (end_s - step_s)[self.joined_step] - self.missed * step_s[self.joined_step]
        busy_s = np.bincount(self.point, step_s, n)
        busy_j = np.bincount(self.point, step_s * gpu_w, n)
        longer_s = np.bincount(self.point, np.where(self.last_run, 0.0, step_s - self.played_s), n)
        idle_s = np.maximum(self.idle_s - longer_s, 0.0)
        decode = self.work.decode_tokens
        return np.column_stack(
            [
                _percentiles(ttft_s, self.owner, n, 0.99),
                self.tp * (busy_j + hardware.idle_w(self.clock_mhz) * idle_s) / (busy_s + idle_s),
                busy_j / busy_s,
                np.bincount(self.point, step_s * decode, n) / np.maximum(np.bincount(self.point, decode, n), 1),
            ]
        )


def simulate_points(profile: Profile, points: pl.DataFrame, load: Load) -> pl.DataFrame:
    """`points` with what the simulated engine makes of each, in virtual time.

    `sim_ttft_s` (P99), `sim_power_w` (mean of the whole group from the run's start to its last token), `sim_busy_w`
    (mean of one GPU while steps run), `sim_tbt_s` (mean duration of a decode step, weighted by its tokens).
    """
    return with_outcomes(profile, points, play(profile, points, load))


def with_outcomes(profile: Profile, points: pl.DataFrame, played: Iterable[Played]) -> pl.DataFrame:
    """`points` with the columns of `simulate_points`, from what `play` found."""
    found = np.full((points.height, len(_OUTCOMES)), np.nan)
    for cell in played:
        found[cell.rows] = cell.outcomes(profile)
    return points.with_columns(pl.Series(name, found[:, i]) for i, name in enumerate(_OUTCOMES))


def play(profile: Profile, points: pl.DataFrame, load: Load) -> list[Played]:
    """Serve every point in virtual time; one entry for each TP size and clock."""
    return [
        _play_cell(profile, int(tp), float(mhz), cell, load)
        for (tp, mhz), cell in points.with_row_index("row").group_by("tp", "sm_clock_mhz", maintain_order=True)
    ]


def _play_cell(profile: Profile, tp: int, clock_mhz: float, cell: pl.DataFrame, load: Load) -> Played:
    """Serve points that share hardware and clock one after the other."""
    times, prompts, outputs, owners = [], [], [], []
    for i, (rate_rps, bucket) in enumerate(cell.select("load_rps", "bucket").iter_rows()):
        arrivals_ns = load.arrivals_ns(rate_rps) + i * _APART_NS
        prompt, output = load.tokens(bucket)
        times.append(arrivals_ns)
        prompts.append(np.full(arrivals_ns.size, prompt))
        outputs.append(np.full(arrivals_ns.size, output))
        owners.append(np.full(arrivals_ns.size, i))
    arrival_ns, owner = np.concatenate(times), np.concatenate(owners)
    engines = VirtualEngines(Hardware(profile, tp), clock_mhz, buffer_steps=_ENGINE_STEPS)
    served = serve(engines, arrivals_of(arrival_ns, np.concatenate(prompts), np.concatenate(outputs)))
    steps = served.steps
    point = steps["start_ns"] // _APART_NS
    columns = (steps["prefill_tokens"], steps["decode_tokens"], steps["context_tokens"], steps["attention_twice"] / 2)
    last = np.append(np.flatnonzero(np.diff(point)), point.size - 1)
    end_s = (steps["end_ns"] - point * _APART_NS) / _NS
    played_s = (steps["end_ns"] - steps["start_ns"]) / _NS
    run = np.cumsum(np.append(True, steps["start_ns"][1:] > steps["end_ns"][:-1]))
    # The first step that ends after the arrival: under way then, or begun by it.
    joined = np.searchsorted(steps["end_ns"], arrival_ns, side="right")
    return Played(
        tp,
        clock_mhz,
        cell["row"].to_numpy().astype(np.int64),
        Work(*(column.astype(float) for column in columns)),
        point,
        run == run[last][point],
        played_s,
        end_s[last] - np.bincount(point, played_s, cell.height),
        owner,
        joined,
        (arrival_ns - steps["start_ns"][joined]) / _NS / played_s[joined],
        np.searchsorted(steps["end_ns"], served.done["first_token_ns"]),
    )


def _percentiles(values: FloatArray, owner: IntArray, n: int, share: float) -> FloatArray:
    """The quantile `share` of the values of each of `n` owners, between neighbours as numpy does; owners ascend."""
    ordered = values[np.lexsort((values, owner))]
    counts = np.bincount(owner, minlength=n)
    place = np.cumsum(counts) - counts + share * (counts - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, ordered.size - 1)
    found: FloatArray = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found
