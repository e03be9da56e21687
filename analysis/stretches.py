"""Seconds and joules of a run in the stretches for which something holds: a clock off, a throttle, a hole.

One pass over power.parquet, some rows at a time: 60 million readings need no more memory than a million. A reading
stands for the time since the one before it on the same GPU, as in `analysis.timeline`; there the total is accounted
for with care, here it is enough to know how much of it lies where.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.load import HOLE_S, NS_PER_S, Floats
from analysis.manifest import pauses_ns
from replay.rundir import Run

COLUMNS = (
    "t_ns", "host", "gpu", "power_instant_mw", "power_average_mw", "energy_mj", "sm_clock_mhz", "throttle_reasons",
)  # fmt: skip
_VALUES = pl.col("power_instant_mw", "power_average_mw", "energy_mj")
OFF_CLOCK_REL = 0.02  # of the clock locked: the grid of NVIDIA clocks is 15 MHz, 1 to 2 % of usual clocks
AT_CAP_REL = 0.98  # of the power cap: boards regulate to within a few per cent of it
_IDLE_BIT = 0x1  # nvmlClocksEventReasonGpuIdle: nothing runs, so no step has this clock
# NVML's reasons (nvml.h, nvmlClocksEventReason*) that are throttling; idle and application settings are none.
THROTTLES = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True)
class Meter:
    """A GPU to be looked at: where it is, and the clock and power that it was given; None: not given."""

    host: str
    gpu: int
    freq_mhz: float | None = None
    cap_w: float | None = None


@dataclass(frozen=True)
class Stretch:
    """How long something held, summed over GPUs, and the joules in that time; `count` of readings or holes."""

    seconds: float = 0.0
    joules: float = 0.0
    count: int = 0


@dataclass(frozen=True)
class Survey:
    """What the readings of some GPUs say within a window; seconds are GPU-seconds."""

    gpus: int
    whole: Stretch
    holes: Stretch  # more than `HOLE_S` without a reading; joules: at the GPU's own mean power
    paused_s: float  # not read, for the run lay between its stretches
    longest_hole_s: float
    failed: int  # polls without any value
    clocked: int  # readings with a clock, on GPUs whose clock was locked
    off_clock: Stretch
    throttled: dict[str, Stretch]  # by reason
    reasons: int  # readings that say whether they are throttled
    capped: Stretch


def meters(run: Run, scope: str = "gpu") -> list[Meter]:
    """The GPUs of the engine instances, and with scope `node` every other that was read. Raises `RunError`."""
    sampled = _sampled(run)
    hosts = {host for host, _ in sampled}
    found = []
    for entry in run.manifest.get("instances") or []:
        host = str(entry.get("host") or "")
        if host not in hosts and len(hosts) == 1:
            host = next(iter(hosts))  # one host only: whatever the writer called it
        freq, cap = entry.get("freq_mhz"), entry.get("power_cap_w")
        found += [Meter(host, int(gpu), freq, cap) for gpu in entry.get("gpus") or []]
    used = {(meter.host, meter.gpu) for meter in found}
    rest = sorted(sampled - used) if scope == "node" else []
    return found + [Meter(host, gpu) for host, gpu in rest]


def survey(run: Run, gpus: Sequence[Meter], window_ns: tuple[int, int]) -> Survey:
    """What power.parquet says of `gpus` within `window_ns` (on the replayer's clock). Raises `RunError`."""
    sums = [_sums(rows) for rows in _stretches(run, gpus, window_ns)]
    names = list(_sum_exprs())
    table = pl.concat(sums) if sums else pl.DataFrame(schema={"host": pl.String, "gpu": pl.UInt16})
    if not sums:
        return Survey(len(gpus), Stretch(), Stretch(), 0.0, 0.0, 0, 0, Stretch(), {}, 0, Stretch())
    kinds = [pl.col(n).max() if n == "longest_s" else pl.col(n).sum() for n in names]
    by_gpu = table.group_by("host", "gpu").agg(kinds)
    # What a hole cost is not known: the GPU's mean power outside its holes is the best guess.
    mean_w = pl.col("joules") / pl.when(pl.col("seconds") > 0).then(pl.col("seconds"))
    by_gpu = by_gpu.with_columns((pl.col("hole_s") * mean_w).fill_null(0.0).alias("hole_j"))
    total = by_gpu.select(pl.exclude("host", "gpu").sum()).row(0, named=True)

    def stretch(name: str) -> Stretch:
        return Stretch(float(total[f"{name}_s"]), float(total[f"{name}_j"]), int(total[f"{name}_n"]))

    throttled = {reason: stretch(f"bit{bit}") for bit, reason in THROTTLES.items()}
    return Survey(
        gpus=by_gpu.height,
        whole=Stretch(float(total["seconds"]), float(total["joules"]), int(total["readings"])),
        holes=stretch("hole"),
        paused_s=float(total["paused_s"]),
        longest_hole_s=float(by_gpu.select(pl.col("longest_s").max()).item() or 0.0),
        failed=int(total["failed"]),
        clocked=int(total["clocked"]),
        off_clock=stretch("off"),
        throttled={reason: held for reason, held in throttled.items() if held.count},
        reasons=int(total["reasons"]),
        capped=stretch("capped"),
    )


def joules_between(run: Run, gpus: Sequence[Meter], edges_ns: Sequence[int]) -> Floats:
    """Joules of `gpus` between neighbouring `edges_ns`, (len - 1,); a reading at an edge belongs to where it ends."""
    joules = np.zeros(len(edges_ns) - 1)
    for rows in _stretches(run, gpus, (edges_ns[0], edges_ns[-1])):
        place = np.searchsorted(np.asarray(edges_ns), rows["t_ns"].to_numpy(), side="left") - 1
        inside = rows["joules"].fill_null(0.0).to_numpy()
        joules += np.bincount(np.clip(place, 0, joules.size - 1), weights=inside, minlength=joules.size)
    return joules


def _sampled(run: Run) -> set[tuple[str, int]]:
    """(host, gpu) of every GPU with a row; a null host is ''."""
    found: set[tuple[str, int]] = set()
    for rows in run.batches("power", ["host", "gpu"]):
        found |= set(rows.drop_nulls("gpu").select(pl.col("host").fill_null(""), "gpu").unique().iter_rows())
    return found


def _stretches(run: Run, gpus: Sequence[Meter], window_ns: tuple[int, int]) -> Iterator[pl.DataFrame]:
    """Rows of `gpus` in `window_ns` with the time since the row before: one a reading that has a value, or failed.

    Columns: host, gpu, t_ns, failed, seconds and paused_s (in the window, the latter of a run that lay between its
    stretches), gap_s and unpaused_s (whole, and without that), joules, off, capped, throttle_reasons.
    """
    schema = {"host": pl.String, "gpu": pl.UInt16, "freq_mhz": pl.Float64, "cap_w": pl.Float64}
    wanted = pl.DataFrame([(m.host, m.gpu, m.freq_mhz, m.cap_w) for m in gpus], schema=schema, orient="row")
    wanted = wanted.unique(["host", "gpu"], keep="first")
    offsets = {str(h.get("host")): int(h.get("offset_ns") or 0) for h in run.manifest.get("hosts") or []}
    offset = pl.col("host").replace_strict(offsets, default=0, return_dtype=pl.Int64) if offsets else pl.lit(0)
    last: pl.DataFrame | None = None
    pauses = pauses_ns(run)
    for batch in _in_order(run):
        rows = batch.with_columns(pl.col("host").fill_null("")).join(wanted, on=["host", "gpu"], how="inner")
        rows = rows.with_columns(pl.col("t_ns") - offset, pl.all_horizontal(_VALUES.is_null()).alias("failed"))
        yield _timed(rows.filter("failed"), window_ns, pauses)
        read = rows.filter(~pl.col("failed")).sort("t_ns", maintain_order=True)
        both = read.with_columns(new=True)
        if last is not None:
            both = pl.concat([last.with_columns(new=False), both])
        last = both.group_by("host", "gpu", maintain_order=True).last().select(read.columns)
        yield _timed(both, window_ns, pauses).filter("new")


def _timed(rows: pl.DataFrame, window_ns: tuple[int, int], pauses: Sequence[tuple[int, int]]) -> pl.DataFrame:
    """`rows` in the window with what they stand for: seconds and joules since the row before on the same GPU."""
    gpu = ["host", "gpu"]
    start, end = window_ns
    before = pl.col("t_ns").shift().over(gpu)
    until, since = pl.min_horizontal("t_ns", pl.lit(end)), pl.max_horizontal(before, pl.lit(start))
    clipped = until - since
    counted_j = pl.col("energy_mj").cast(pl.Float64).diff().over(gpu) / 1e3
    rows = rows.with_columns(
        ((pl.col("t_ns") - before) / NS_PER_S).alias("gap_s"),
        (pl.when(before.is_not_null()).then(clipped).clip(0) / NS_PER_S).alias("seconds"),
        counted_j.clip(0.0).alias("counted_j"),
        ((pl.col("t_ns") - before - _paused_ns(before, pl.col("t_ns"), pauses)) / NS_PER_S).alias("unpaused_s"),
        (pl.when(before.is_not_null()).then(_paused_ns(since, until, pauses)) / NS_PER_S).alias("paused_s"),
    )
    gap_s = pl.when(pl.col("gap_s") > 0).then(pl.col("gap_s"))
    watts = pl.coalesce(pl.col("power_instant_mw", "power_average_mw") / 1e3, pl.col("counted_j") / gap_s)
    clock = pl.col("sm_clock_mhz").cast(pl.Float64)
    asleep = (pl.col("throttle_reasons").fill_null(0) & pl.lit(_IDLE_BIT, pl.UInt64)) > 0
    off = (clock / pl.col("freq_mhz") - 1).abs() > OFF_CLOCK_REL
    rows = rows.with_columns(
        (watts * pl.col("seconds")).alias("joules"),
        (off & ~asleep).fill_null(value=False).alias("off"),
        (watts >= AT_CAP_REL * pl.col("cap_w")).fill_null(value=False).alias("capped"),
        (clock.is_not_null() & pl.col("freq_mhz").is_not_null()).alias("clocked"),
    )
    # A row's time is the one since the row before, so a row just behind the window still bears on it.
    inside = pl.col("t_ns").is_between(start, end) | (pl.col("seconds") > 0)
    return rows.filter(inside)


def _paused_ns(since: pl.Expr, until: pl.Expr, pauses: Sequence[tuple[int, int]]) -> pl.Expr:
    """How much of `[since, until]` lies in `pauses`."""
    parts = [pl.min_horizontal(until, pl.lit(b)) - pl.max_horizontal(since, pl.lit(a)) for a, b in pauses]
    return pl.sum_horizontal(pl.lit(0, pl.Int64), *(part.clip(0) for part in parts))


def _in_order(run: Run) -> Iterator[pl.DataFrame]:
    """power.parquet some rows at a time, in order of time on each GPU; where the file is not, all rows at once."""
    if _sorted(run):
        yield from run.batches("power", COLUMNS)
    else:
        yield run.scan("power", COLUMNS).sort("t_ns", maintain_order=True).collect()


def _sorted(run: Run) -> bool:
    """Whether no batch of a GPU's readings begins before the one before it ends."""
    reached: dict[Any, int] = {}
    for rows in run.batches("power", ["t_ns", "host", "gpu"]):
        ends = rows.group_by("host", "gpu").agg(pl.col("t_ns").min().alias("a"), pl.col("t_ns").max().alias("b"))
        for host, gpu, first, last in ends.iter_rows():
            if first is not None and first < reached.get((host, gpu), first):
                return False
            reached[host, gpu] = last
    return True


def _sum_exprs() -> dict[str, pl.Expr]:
    """What is summed per GPU and batch; `longest_s` is a maximum."""
    hole, gap = pl.col("unpaused_s") > HOLE_S, pl.col("gap_s") > HOLE_S
    hole_s = (pl.col("seconds") - pl.col("paused_s")).filter(hole & ~pl.col("failed"))
    read = ~pl.col("failed") & ~gap.fill_null(value=False)
    bits = pl.col("throttle_reasons")

    def held(name: str, where: pl.Expr) -> dict[str, pl.Expr]:
        rows = (where & read).fill_null(value=False)
        return {
            f"{name}_s": pl.col("seconds").filter(rows).sum(),
            f"{name}_j": pl.col("joules").filter(rows).sum(),
            f"{name}_n": rows.sum(),
        }

    exprs: dict[str, pl.Expr] = {
        "seconds": pl.col("seconds").filter(read).sum(),
        "joules": pl.col("joules").filter(read).sum(),
        "readings": (~pl.col("failed")).sum(),
        "failed": pl.col("failed").sum(),
        "clocked": (pl.col("clocked") & ~pl.col("failed")).sum(),
        "reasons": bits.is_not_null().sum(),
        "hole_s": hole_s.sum(),
        "hole_n": (hole & ~pl.col("failed")).sum(),
        "longest_s": hole_s.max(),
        "paused_s": pl.col("paused_s").filter(gap & ~pl.col("failed")).sum(),
        **held("off", pl.col("off")),
        **held("capped", pl.col("capped")),
    }
    for bit in THROTTLES:
        exprs |= held(f"bit{bit}", (bits & pl.lit(bit, pl.UInt64)) > 0)
    return exprs


def _sums(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a GPU."""
    return rows.group_by("host", "gpu").agg(expr.alias(name) for name, expr in _sum_exprs().items())
