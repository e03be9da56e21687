"""Which GPUs were polled and when: what has to be known of power.parquet before its readings are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from replay.rundir import RowGroup, Run, read_group, row_groups
from tracegen.errors import AnalysisError, RunError

VALUES = ("power_instant_mw", "power_average_mw", "energy_mj")
UNREAD = pl.all_horizontal(pl.col(VALUES).is_null())  # a poll that failed, as of a GPU that fell off the bus

LONGEST_NAME = 32


@dataclass
class _Inner:
    """A row group in which no poll failed: its first and last time, and the (host, gpu) pairs in it."""

    group: RowGroup
    low: int
    high: int
    gpus: set[tuple[str, int]]
    told: bool = False


def read_polled(run: Run, named_host: str | None, offsets: Mapping[str, int]) -> pl.DataFrame:
    """One row a GPU that was polled, in order: host, gpu, `first_ns` and `last_ns` of its readings, polls that failed.

    These are `unread`, from `unread_ns` on. `named_host` is whose the rows without a host are, `offsets` each host's
    clock minus the replayer's.

    Raises `RunError` where a row has no time or GPU, `AnalysisError` where there are no rows.
    """
    path = run.path / "power.parquet"
    frames = []
    for group in _telling(run):
        # Where one of the values is in all rows, all were read.
        values = VALUES if not group.full & set(VALUES) else ()
        rows = read_group(group, "power", ("t_ns", "host", "gpu", *values))
        for name in ("t_ns", "gpu"):
            if rows[name].null_count():
                raise RunError(f"{path}: column '{name}' has a null in row {rows[name].is_null().arg_max()}")
        failed = UNREAD if values else pl.lit(value=False)
        times = {"first_ns": pl.col("t_ns").filter(~failed).min(), "last_ns": pl.col("t_ns").filter(~failed).max()}
        lost = {"unread": failed.sum(), "unread_ns": pl.col("t_ns").filter(failed).min()}
        reach = {"polled_first_ns": pl.col("t_ns").min(), "polled_last_ns": pl.col("t_ns").max()}
        frames.append(rows.group_by("host", "gpu").agg(**times, **lost, **reach))
    if not frames or not any(frame.height for frame in frames):
        raise AnalysisError(f"{path}: has no rows, so there is no energy to attribute")
    gpus = pl.concat(frames).with_columns(pl.col("host").fill_null(named_host or ""))
    offset = pl.col("host").replace_strict(dict(offsets), default=0, return_dtype=pl.Int64)
    least, most = pl.col("first_ns", "polled_first_ns", "unread_ns").min(), pl.col("last_ns", "polled_last_ns").max()
    gpus = gpus.group_by("host", "gpu").agg(least, most, pl.col("unread").sum()).sort("host", "gpu")
    return gpus.with_columns(pl.col("^.*_ns$") - offset).with_columns(
        pl.coalesce("first_ns", "polled_first_ns").alias("first_ns"),
        pl.coalesce("last_ns", "polled_last_ns").alias("last_ns"),
    )


def _telling(run: Run) -> Iterator[RowGroup]:
    """The row groups that must be read to know each GPU's first and last reading, and every poll that failed.

    A group in the middle of a long run, in which no poll failed, has nothing to tell but which GPUs are in it.
    """
    inner: list[_Inner] = []
    known = (row_groups(run.path, "power", column) for column in ("t_ns", "host", "gpu"))
    for group, host, gpu in zip(*known, strict=True):
        sound = bool(group.full & set(VALUES)) and {"t_ns", "gpu"} <= group.full
        name = str(host.low)
        # Statistics of long texts may be cut.
        one_host = "host" in host.full and host.low == host.high and len(name) <= LONGEST_NAME
        if not (sound and one_host) or group.low is None or group.high is None:
            yield group
            continue
        numbers = {gpu.low, gpu.high}
        if gpu.low is None or gpu.high is None or gpu.high - gpu.low > 1:  # there may be some in between
            numbers = set(np.flatnonzero(np.bincount(read_group(group, "power", ("gpu",))["gpu"].to_numpy())))
        inner.append(_Inner(group, group.low, group.high, {(name, int(number)) for number in numbers}))
    for seen in sorted(set().union(*(piece.gpus for piece in inner))):
        mine = [piece for piece in inner if seen in piece.gpus]
        # Its first reading is no later than the end of the group that begins first; its last likewise.
        until, since = min(mine, key=lambda p: p.low).high, max(mine, key=lambda p: p.high).low
        for piece in mine:
            if not piece.told and (piece.low <= until or piece.high >= since):
                piece.told = True
                yield piece.group
