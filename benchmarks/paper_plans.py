"""The sweeps behind docs/paper.md: simulated, in virtual time, Llama-2-70B on the simulated DGX-H100.

Sizes and clocks are those of the authors' measurements (`cluster_experiments/characterization_*.csv` in the repository
jovans2/jovan-vllm); so are the highest rates that each size and TP sustained there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from replay.plan import RunOptions
from replay.sweep.plan import Grid, SweepPlan
from tracegen.durations import NS_PER_S
from tracegen.schema import write_trace

PROMPT_TOKENS, OUTPUT_TOKENS = {"S": 467, "M": 1010, "L": 4085}, {"S": 96, "M": 256, "L": 600}
SIZES = tuple(prompt + output for prompt in "SML" for output in "SML")
CLOCKS_MHZ = (795, 990, 1200, 1395, 1605, 1800, 1980)
LOWEST_MHZ, ECONOMY_MHZ, TOP_MHZ = CLOCKS_MHZ[0], 1605, CLOCKS_MHZ[-1]
NODE_GPUS = 8
# Highest rates that were sustained, requests/s, same repository; 0: hardly any.
SUSTAINED_RPS = {
    2: dict(zip(SIZES, (5, 2.5, 1, 2.5, 1, 0.5, 0, 0, 0), strict=True)),
    4: dict(zip(SIZES, (7, 5.5, 4, 3, 2.6, 1.6, 2, 1.5, 0.5), strict=True)),
    8: dict(zip(SIZES, (9.5, 7, 5, 3.5, 3.5, 3, 2.5, 2, 1.9), strict=True)),
}
LOW_SHARE = 0.5  # of what TP2 sustained: a load that every TP can serve
LOWEST_RPS = 0.1  # where TP2 sustained hardly any: a long prompt with 600 tokens takes it about 25 s alone
MOST_S = 300  # of arrivals
# Measured by the same author (raw logs of the repository): run time, s, and energy of two GPUs, kJ, at TP2 by the batch
# cap, for "large inputs". How many requests of which lengths is not known, so only ratios can be set beside others.
MEASURED_CAPS = {
    4: (975, 789),
    8: (730, 569),
    12: (668, 512),
    16: (640, 488),
    20: (637, 476),
    24: (627, 467),
    256: (627, 469),
}


@dataclass(frozen=True)
class Extent:
    """How much of it to run."""

    sizes: tuple[str, ...] = SIZES
    tps: tuple[int, ...] = (2, 4, 8)
    clocks_mhz: tuple[int, ...] = CLOCKS_MHZ
    knees: bool = True  # also the highest rates that were sustained
    repeated: tuple[str, ...] = ("SS", "MM")  # sizes that are repeated, for intervals
    repeats: int = 3
    least_s: int = 60  # of arrivals
    least_requests: int = 40  # expected at the low load, as far as `MOST_S` lets
    batches: tuple[int, ...] = (1, 4, 16, 64)
    batch_clocks_mhz: tuple[int, ...] = CLOCKS_MHZ
    alone: tuple[str, ...] = ("SM", "MM", "LM")  # sizes of which one request is served alone
    caps: tuple[int, ...] = tuple(MEASURED_CAPS)
    backlog: int = 64  # requests that wait at once for the batch caps
    node_rates_rps: tuple[tuple[str, tuple[float, ...]], ...] = (("SS", (1, 4, 8)), ("MM", (0.5, 1, 3)))

    def low_rps(self, size: str) -> float:
        """The load of `size` that every TP is measured at."""
        return max(LOW_SHARE * SUSTAINED_RPS[2][size], LOWEST_RPS)


# Everything that the page says with the fewest cells: the tests', and a look before the long run.
TINY = Extent(
    sizes=("SS", "MM", "LL"),
    tps=(2, 8),
    clocks_mhz=(LOWEST_MHZ, TOP_MHZ),
    knees=False,
    repeated=("SS",),
    repeats=2,
    least_s=6,
    least_requests=8,
    batches=(1, 16),
    batch_clocks_mhz=(ECONOMY_MHZ, TOP_MHZ),
    alone=("LM",),
    caps=(4, 256),
    backlog=12,
    node_rates_rps=(("MM", (1,)),),
)


def sweeps(extent: Extent, folder: Path) -> Iterator[tuple[str, SweepPlan]]:
    """The name and plan of each sweep of `extent`; traces that are no mix are written into `folder`."""
    for batch in extent.batches:
        grid = Grid(extent.tps, extent.batch_clocks_mhz)
        yield f"batch-{batch}", SweepPlan((grid,), trace=_at_once(folder, "MM", batch), repeats=1, run=_run())
    for size in extent.alone:
        grid = Grid(extent.tps, (extent.clocks_mhz[0], TOP_MHZ))
        yield f"alone-{size}", SweepPlan((grid,), trace=_at_once(folder, size, 1), repeats=1, run=_run())
    caps = Grid(extent.tps[:1], (TOP_MHZ,), batch_cap=extent.caps)
    yield "caps", SweepPlan((caps,), trace=_at_once(folder, "MM", extent.backlog), repeats=1, run=_run())
    for size, rates in extent.node_rates_rps:
        for tp in extent.tps:
            yield f"node-{size}-tp{tp}", _plan(extent, size, (Grid((tp,), (TOP_MHZ,), rates),), NODE_GPUS // tp)
    for size in sorted(extent.sizes, key=lambda size: size not in extent.repeated):
        yield f"size-{size}", _plan(extent, size, tuple(_grids(extent, size)))


def _grids(extent: Extent, size: str) -> Iterator[Grid]:
    """Every TP at one low load, and each at the rate that it sustained."""
    low = extent.low_rps(size)
    yield Grid(extent.tps, extent.clocks_mhz, (low,))
    for tp in extent.tps if extent.knees else ():
        if (knee := SUSTAINED_RPS[tp][size]) > low:
            yield Grid((tp,), extent.clocks_mhz, (float(knee),))


def _plan(extent: Extent, size: str, grids: tuple[Grid, ...], replicas: int = 1) -> SweepPlan:
    seconds = min(max(extent.least_requests / extent.low_rps(size), extent.least_s), MOST_S)
    repeats = extent.repeats if size in extent.repeated else 1
    return SweepPlan(grids, mix=size, duration_ns=int(seconds) * NS_PER_S, repeats=repeats, run=_run(replicas))


def _run(replicas: int = 1) -> RunOptions:
    return RunOptions(
        Path(),
        hardware="dgx-h100",
        model="llama-2-70b",
        virtual=True,
        replicas=replicas,
        router="round-robin",
        save_chunks=False,  # a third of the time; TBT is a request's mean, as the authors' was
        truth=False,
    )


def _at_once(folder: Path, size: str, count: int) -> Path:
    """A trace of `count` requests of `size` that come at once."""
    path = folder / f"{size}-{count}-at-once.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = {"input_tokens": PROMPT_TOKENS[size[0]], "output_tokens": OUTPUT_TOKENS[size[1]]}
        frame = pl.DataFrame({"request_id": range(count)}).with_columns(
            pl.lit(0).alias("arrival_ns"), *(pl.lit(n).alias(name) for name, n in tokens.items()), label=pl.lit(size)
        )
        write_trace(frame, path, {"generator": "benchmarks/paper_plans.py", "parameters": {"size": size, "n": count}})
    return path
