"""Service level objectives: bounds on a request's latencies, by the names that benchmarks use, and published sets.

Goodput is the requests per second that met every objective named. As in vLLM's benchmark an answer of one token meets
any bound on what lies between tokens, for it has nothing there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl

from analysis.latency import answered
from tracegen.buckets import BUCKETS
from tracegen.errors import AnalysisError

Bounds = tuple[float, float, float]  # ms for short, medium and long inputs

METRICS = ("ttft", "tpot", "itl", "e2el", "ttft_from_schedule", "e2el_from_schedule")
BETWEEN_TOKENS = ("tpot", "itl")
USAGE = "give NAME:MS, for example ttft:200 tpot:50 e2el:5000, or by size of input ttft:250,400,2000"


@dataclass(frozen=True)
class Slo:
    """Bounds in ms by metric (one of `METRICS`), for short, medium and long inputs; X and unknown count as long.

    `itl` bounds a request's longest gap between tokens, `tpot` their mean.
    """

    bounds_ms: Mapping[str, Bounds]
    source: str | None = None  # where a published set comes from

    def met(self) -> pl.Expr:
        """Whether a request of `request_table` met all of them; one that failed did not.

        A latency that is not known is not met, but a one-token answer meets what lies between tokens. A bound on
        `itl` needs the column `itl_ms`, the longest gap.
        """
        met = answered()
        for one in self.met_each().values():
            met &= one
        return met

    def met_each(self) -> dict[str, pl.Expr]:
        """Whether a request of `request_table` met each of them, by metric, as `met` has it."""
        small, middling = (pl.col("bucket").is_in([b for b in BUCKETS if b[0] == size]) for size in "SM")
        met = {}
        for metric, (short, medium, long) in self.bounds_ms.items():
            bound_ms = (
                pl.lit(short)
                if short == medium == long
                else pl.when(small).then(short).when(middling).then(medium).otherwise(long)
            )
            in_time = (pl.col(f"{metric}_ms") <= bound_ms).fill_null(value=False)
            if metric in BETWEEN_TOKENS:
                in_time |= (pl.col("output_tokens") == 1).fill_null(value=False)
            met[metric] = answered() & in_time
        return met

    def __str__(self) -> str:
        return ", ".join(
            f"{metric} {bounds[0]:g} ms"
            if len(set(bounds)) == 1
            else f"{metric} {'/'.join(f'{b:g}' for b in bounds)} ms"
            for metric, bounds in self.bounds_ms.items()
        )


def _same(ttft_ms: float, tpot_ms: float) -> dict[str, Bounds]:
    return {"ttft": (ttft_ms,) * 3, "tpot": (tpot_ms,) * 3}


_MLPERF = (
    "MLPerf Inference, loadgen/mlperf.conf of github.com/mlcommons/inference: Server, ttft_latency and tpot_latency"
)
PROFILES: Mapping[str, Slo] = {
    "dynamollm": Slo(
        {"ttft": (250.0, 400.0, 2000.0), "tpot": (100.0,) * 3},
        "DynamoLLM (Stojkovic et al., HPCA 2025, arXiv:2408.00741): TTFT by size of input, mean TBT",
    ),
    # MLPerf asks for these at the 99th percentile: a run passes where attainment is at least 99 %.
    "mlperf-llama2-70b": Slo(_same(2000.0, 200.0), _MLPERF),
    "mlperf-llama2-70b-interactive": Slo(_same(450.0, 40.0), _MLPERF),
    "mlperf-mixtral-8x7b": Slo(_same(2000.0, 200.0), _MLPERF),
    "mlperf-llama3.1-405b": Slo(_same(6000.0, 175.0), _MLPERF),
    "mlperf-llama3.1-405b-interactive": Slo(_same(4500.0, 80.0), _MLPERF),
    "mlperf-llama3.1-8b": Slo(_same(2000.0, 100.0), _MLPERF),
    "mlperf-llama3.1-8b-interactive": Slo(_same(500.0, 30.0), _MLPERF),
    "mlperf-deepseek-r1": Slo(_same(2000.0, 80.0), _MLPERF),
}
DEFAULT_PROFILE = "dynamollm"
DEFAULT_SLO = PROFILES[DEFAULT_PROFILE]


def parse_goodput(words: Iterable[str]) -> Slo:
    """`Slo` from `NAME:MS` words and at most one profile's name, whose bounds the words replace or add to.

    A word may hold several, with blanks between. Without a word: `DEFAULT_SLO`. Raises `AnalysisError`.
    """
    parts = [part for word in words for part in word.split()]
    if not parts:
        return DEFAULT_SLO
    profiles = [part for part in parts if ":" not in part]
    unknown = [name for name in profiles if name not in PROFILES]
    if unknown or len(profiles) > 1:
        wrong = f"'{unknown[0]}' is no objective" if unknown else f"{len(profiles)} profiles are one too many"
        raise AnalysisError(f"--goodput: {wrong}; {USAGE}, or one of {', '.join(PROFILES)}")
    bounds: dict[str, Bounds] = {}
    for part in parts:
        name, _, values = part.partition(":")
        if name in PROFILES:
            continue
        if name not in METRICS:
            raise AnalysisError(f"--goodput '{part}': '{name}' is not one of {', '.join(METRICS)}")
        bounds[name] = _bounds(values, f"--goodput '{part}'", USAGE)
    if not profiles:
        return Slo(bounds)
    base = PROFILES[profiles[0]]
    return base if not bounds else Slo({**base.bounds_ms, **bounds})


def split_goodput(words: Iterable[str], goodput: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Run directories and objectives, where `--goodput ttft:200 tpot:50` left all but its first word among `words`."""
    runs: list[str] = []
    objectives = list(goodput or [])
    for word in words:
        (objectives if word.partition(":")[0] in METRICS and ":" in word else runs).append(word)
    if not runs:
        raise AnalysisError("give at least one run directory")
    if objectives and goodput is None:
        raise AnalysisError(f"'{objectives[0]}' stands without --goodput")
    return runs, objectives


def parse_slo(ttft: str, tbt_ms: float) -> Slo:
    """`Slo` from `250,400,2000` (or one number for all inputs) and a bound on mean TBT. Raises `AnalysisError`."""
    usage = "give three positive numbers of ms, for example 250,400,2000"
    if tbt_ms <= 0:
        raise AnalysisError(f"--slo-tbt {tbt_ms:g}: give a positive number of ms")
    return Slo({"ttft": _bounds(ttft, f"--slo-ttft '{ttft}'", usage), "tpot": (tbt_ms,) * 3})


def _bounds(text: str, where: str, usage: str) -> Bounds:
    """One bound for all inputs, or three. Raises `AnalysisError`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(0 < value < float("inf") for value in values):
        raise AnalysisError(f"{where}: {usage}")
    return values[0], values[1], values[2]
