"""A run in slabs: stretches of time of so many steps and readings as fit into memory, one after the other.

A slab ends where a block ends, and where blocks end does not depend on slabs: what is attributed is the same however
a run is cut. While one slab is worked on the rows of the next are read.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from analysis.blocks import Blocks, blocks_between, cut_times
from analysis.checks import check_steps
from analysis.load import NS_PER_S, UNREAD, VALUES, Floats, GpuData, InstanceData, RunData
from analysis.members import Members
from analysis.membership import from_client
from analysis.steps import (
    Before,
    Segments,
    Steps,
    from_records,
    no_steps,
    segments_between,
    steps_at,
    times_of,
)
from analysis.streams import OrderedRows, rows_between
from replay.rundir import POWER, read_group, row_groups
from tracegen.errors import RunError

STEPS_AT_ONCE = 1_000_000
READINGS_AT_ONCE = 4_000_000
MARGIN_S = 3.0  # of readings on either side of a slab: what is made of them reaches no further
CLOCK_STEP_MHZ = 30  # within which a clock is the same: two steps of its grid
SAMPLES = 6  # stretches that a long run's model is fitted on,
SAMPLED_STEPS = 240_000  # with so many steps in all
SHORTEST_SAMPLE_S = 200.0  # several blocks
STEP_COLUMNS = (
    "instance", "step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention",
    "requests", "waiting",
)  # fmt: skip
POWER_COLUMNS = ("t_ns", "sensor_ns", "host", "gpu", *VALUES, "sm_clock_mhz", "throttle_reasons")


@dataclass(frozen=True)
class Slab:
    """One instance in one stretch of time: its steps and who was in them, its blocks, and its GPUs' readings."""

    instance: InstanceData
    steps: Steps
    segments: Segments
    blocks: Blocks
    gpus: tuple[GpuData, ...]

    @property
    def begin_s(self) -> float:
        """Where it begins."""
        return float(self.blocks.cuts_s[0])

    @property
    def until_s(self) -> float:
        """Where it ends."""
        return float(self.blocks.cuts_s[-1])


class _Recorded:
    """The steps of an instance that recorded them, slab by slab."""

    def __init__(self, data: RunData, instance: InstanceData, members: Members, begin_s: float) -> None:
        self._instance, self._members = instance, members
        self._zero_ns = data.window_ns[0] + instance.offset_ns
        self._duration_s = data.duration_s
        self._run, self._source = data.run, data.run.path / "steps.parquet"
        self._rest: pl.DataFrame | None = None
        self._before: Before | None = None
        self._last_step = -1
        self._begin_s = begin_s

    def advance(self, rows: pl.DataFrame | None, until_s: float, *, final: bool) -> tuple[Steps, Segments, Blocks]:
        """The blocks that are whole once `rows`, the steps that ended before `until_s`, are there."""
        parts = [] if self._rest is None else [self._rest]
        if rows is not None:
            parts.append(self._checked(rows.filter(pl.col("instance") == self._instance.instance)))
        rows = pl.concat(parts) if parts else None
        if rows is None or rows.is_empty():
            return self._no_steps(until_s, final=final)
        start_s, end_s = times_of(rows, self._members, self._before, self._zero_ns)
        inside = [np.clip(t, 0.0, self._duration_s) for t in (start_s, end_s)]
        cuts = cut_times(inside[0], inside[1], self._begin_s, until_s, final=final)
        middle_s = (inside[0] + inside[1]) / 2
        here = rows.height if final else int(np.searchsorted(middle_s, cuts[-1])) if len(cuts) > 1 else 0
        if here:
            last = rows.row(here - 1, named=True)
            self._before = Before(float(end_s[here - 1]), bool(last["waiting"] or 0))
        self._rest, self._begin_s = rows[here:], cuts[-1]
        blocks = blocks_between(inside[0][:here], inside[1][:here], cuts)
        if not here:
            return *no_steps(), blocks
        return *from_records(rows[:here], start_s[:here], end_s[:here], self._members), blocks

    def _no_steps(self, until_s: float, *, final: bool) -> tuple[Steps, Segments, Blocks]:
        """What comes next may begin before `until_s`, so that a stretch without steps is kept open."""
        none = np.zeros(0)
        cuts = cut_times(none, none, self._begin_s, until_s if final else self._begin_s, final=final)
        self._begin_s = cuts[-1]
        return *no_steps(), blocks_between(none, none, cuts)

    def _checked(self, rows: pl.DataFrame) -> pl.DataFrame:
        """`rows` in order of their steps. Raises `RunError` where they cannot be."""
        if rows.is_empty():
            return rows
        for name in STEP_COLUMNS[:8]:
            if rows[name].null_count():
                raise RunError(f"{self._source}: column '{name}' has a null in row {rows[name].is_null().arg_max()}")
        if not rows["step"].is_sorted():
            rows = rows.sort("step", maintain_order=True)
        check_steps(self._run, rows)
        number = rows["step"]
        if number[0] <= self._last_step:
            what = f"{self._source}: instance {self._instance.instance}, step {number[0]}"
            raise RunError(f"{what} ends later than step {self._last_step}; an engine's steps follow each other")
        self._last_step = int(number[-1])
        return rows


class _Client:
    """Pseudo-steps of an instance that has no step records."""

    def __init__(self, steps: Steps, segments: Segments, begin_s: float) -> None:
        self._steps, self._segments, self._begin_s = steps, segments, begin_s
        self._done = int(np.searchsorted(steps.start_s, begin_s)) if begin_s > 0 else 0

    def advance(self, rows: pl.DataFrame | None, until_s: float, *, final: bool) -> tuple[Steps, Segments, Blocks]:
        """As `_Recorded` does."""
        del rows  # there are none
        done = self._done
        until = len(self._steps) if final else int(np.searchsorted(self._steps.end_s, until_s))
        start_s, end_s = (np.clip(t[done:until], 0.0, None) for t in (self._steps.start_s, self._steps.end_s))
        if final:
            start_s, end_s = np.minimum(start_s, until_s), np.minimum(end_s, until_s)
        cuts = cut_times(start_s, end_s, self._begin_s, until_s, final=final)
        middle_s = (start_s + end_s) / 2
        here = until - done if final else int(np.searchsorted(middle_s, cuts[-1])) if len(cuts) > 1 else 0
        self._done, self._begin_s = done + here, cuts[-1]
        blocks = blocks_between(start_s[:here], end_s[:here], cuts)
        steps = steps_at(self._steps, slice(done, done + here))
        return steps, segments_between(self._segments, done, done + here), blocks


_Source = _Recorded | _Client


class Readings:
    """The power readings of a run as rows in order of time, kept for as long as a slab may need them."""

    def __init__(self, data: RunData) -> None:
        self._data = data
        self._streams = {
            offset: OrderedRows(data.run, "power", "t_ns", POWER_COLUMNS)
            for offset in sorted(set(data.offsets_ns.values()) | {0})
        }
        self._kept: dict[tuple[str, int], pl.DataFrame] = {}
        self._wanted = {(gpu.host, gpu.gpu) for instance in data.instances for gpu in instance.gpus}

    def read(self, until_s: float | None) -> list[pl.DataFrame]:
        """The next rows, up to `until_s` (None: all); to be given to `add`. May run beside everything else."""
        frames = []
        for offset, stream in self._streams.items():
            rows = stream.until(None if until_s is None else _time_ns(self._data, until_s, offset))
            if rows is not None:
                frames.append(_on_one_clock(self._data, rows, offset))
        return frames

    def add(self, frames: Sequence[pl.DataFrame]) -> None:
        """Put `frames` to what is kept."""
        for frame in frames:
            for key in self._wanted:
                mine = frame.filter((pl.col("host") == key[0]) & (pl.col("gpu") == key[1]))
                kept = self._kept.get(key)
                self._kept[key] = mine if kept is None else pl.concat([kept, mine])

    def of(self, gpu: GpuData, begin_s: float, until_s: float) -> GpuData:
        """`gpu` with its readings from `begin_s` to `until_s` and a margin; those before are forgotten."""
        key = (gpu.host, gpu.gpu)
        zero_ns = self._data.window_ns[0]
        low, high = (zero_ns + round(t * NS_PER_S) for t in (begin_s - MARGIN_S, until_s + MARGIN_S))
        rows = self._kept.get(key, POWER.to_frame())
        here = int(rows["t_ns"].search_sorted(low, side="left"))
        self._kept[key] = rows[here:]
        return readings_of(gpu, rows[here : int(rows["t_ns"].search_sorted(high, side="right"))], zero_ns)


def _on_one_clock(data: RunData, rows: pl.DataFrame, offset_ns: int) -> pl.DataFrame:
    """The rows of those hosts whose clock is so far from the replayer's, on the replayer's."""
    rows = rows.with_columns(pl.col("host").fill_null(data.named_host or ""))
    others = [host for host, offset in data.offsets_ns.items() if offset != offset_ns]
    if offset_ns:
        rows = rows.filter(pl.col("host").is_in([host for host in data.offsets_ns if host not in others]))
    elif others:
        rows = rows.filter(~pl.col("host").is_in(others))
    return rows if offset_ns == 0 else rows.with_columns(pl.col("t_ns", "sensor_ns") - offset_ns)


def readings_of(gpu: GpuData, rows: pl.DataFrame, zero_ns: int) -> GpuData:
    """`gpu` with the readings of `rows`; polls that failed are left out where others did not."""
    if rows.select(UNREAD.any() & ~UNREAD.all()).item():
        rows = rows.filter(~UNREAD)

    def column(expr: pl.Expr) -> Floats:
        return rows.select(expr.cast(pl.Float64).fill_null(float("nan"))).to_series().to_numpy()

    return replace(
        gpu,
        t_s=column((pl.col("t_ns") - zero_ns) / NS_PER_S),
        sensor_s=column((pl.col("sensor_ns") - zero_ns) / NS_PER_S),
        instant_w=column(pl.col("power_instant_mw") / 1e3),
        average_w=column(pl.col("power_average_mw") / 1e3),
        counter_j=column(pl.col("energy_mj") / 1e3),
        sm_clock_mhz=column(pl.col("sm_clock_mhz")),
        throttle_reasons=column(pl.col("throttle_reasons")),
    )


def read_clock(data: RunData, gpu: GpuData) -> GpuData:
    """`gpu` with a reading of its clock each second of the whole run; with none where the clock never changed."""
    groups = row_groups(data.run.path, "power", "sm_clock_mhz")
    ends = [end for group in groups for end in (group.low, group.high)]
    known = [end for end in ends if end is not None]
    if len(known) == len(ends) and max(known, default=0) - min(known, default=0) <= CLOCK_STEP_MHZ:
        return gpu
    offset = data.offsets_ns.get(gpu.host, 0)
    second = pl.col("t_ns") // round(NS_PER_S)
    frames = []
    for group in groups:
        rows = _on_one_clock(data, read_group(group, "power", POWER_COLUMNS), offset)
        rows = rows.filter((pl.col("host") == gpu.host) & (pl.col("gpu") == gpu.gpu))
        frames.append(rows.filter(second != second.shift().fill_null(-1)))
    return readings_of(gpu, pl.concat(frames).sort("t_ns"), data.window_ns[0])


class RunSlabs:
    """The slabs of a run in order of time, and a sample of them."""

    def __init__(self, data: RunData, members: dict[int, Members], *, at_once: int = STEPS_AT_ONCE) -> None:
        """`at_once`: steps in a slab."""
        self._data, self._members = data, members
        self._offsets = sorted({i.offset_ns for i in data.instances if i.recorded})
        self._steps = row_groups(data.run.path, "steps", "end_ns") if self._offsets else []
        self._power = row_groups(data.run.path, "power", "t_ns")
        self._clients = {
            i.instance: from_client(data, i) for i in data.instances if i.instance is not None and not i.recorded
        }
        self.steps = sum(group.rows for group in self._steps)
        readings = sum(group.rows for group in self._power)
        self.count = max(1, -(-self.steps // at_once), -(-readings // READINGS_AT_ONCE))

    def __iter__(self) -> Iterator[list[Slab]]:
        """One slab of each instance at a time; together they cover the window."""
        data = self._data
        edges_s: list[float | None] = [*np.linspace(0.0, data.duration_s, self.count + 1)[1:-1].tolist(), None]
        sources = [self._source(instance, 0.0) for instance in data.instances]
        steps = {offset: OrderedRows(data.run, "steps", "end_ns", STEP_COLUMNS) for offset in self._offsets}
        readings = Readings(data)

        def read(until_s: float | None) -> tuple[dict[int, pl.DataFrame | None], list[pl.DataFrame]]:
            rows = {
                offset: stream.until(None if until_s is None else _time_ns(data, until_s, offset))
                for offset, stream in steps.items()
            }
            return rows, readings.read(None if until_s is None else until_s + MARGIN_S)

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, edges_s[0])
            for until_s, after_s in zip(edges_s, [*edges_s[1:], None], strict=True):
                rows, polled = ahead.result()
                if until_s is not None:
                    ahead = reader.submit(read, after_s)
                readings.add(polled)
                end_s = data.duration_s if until_s is None else until_s
                slabs = []
                for source, instance in zip(sources, data.instances, strict=True):
                    new = rows.get(instance.offset_ns) if instance.recorded else None
                    parts = source.advance(new, end_s, final=until_s is None)
                    begin_s, cut_s = float(parts[2].cuts_s[0]), float(parts[2].cuts_s[-1])
                    gpus = tuple(readings.of(gpu, begin_s, cut_s) for gpu in instance.gpus)
                    slabs.append(Slab(instance, *parts, gpus))
                yield slabs

    def sample(self) -> list[list[Slab]]:
        """Slabs of some stretches, evenly spread over the window, with about SAMPLED_STEPS steps in all."""
        if self.steps <= SAMPLED_STEPS:
            return list(self)
        data = self._data
        length_s = data.duration_s / SAMPLES * (SAMPLED_STEPS / self.steps)
        length_s = min(max(length_s, SHORTEST_SAMPLE_S), data.duration_s / SAMPLES)
        begins_s = [(i + 0.5) * data.duration_s / SAMPLES - length_s / 2 for i in range(SAMPLES)]
        return [self._stretch(begin_s, begin_s + length_s) for begin_s in begins_s]

    def _stretch(self, begin_s: float, until_s: float) -> list[Slab]:
        """What is whole between two times."""
        data, slabs = self._data, []
        low_s, high_s = begin_s - MARGIN_S, until_s + MARGIN_S
        steps = {
            offset: rows_between(
                self._steps,
                "steps",
                "end_ns",
                STEP_COLUMNS,
                (_time_ns(data, begin_s, offset), _time_ns(data, until_s, offset)),
            )
            for offset in self._offsets
        }
        polled = []
        for offset in sorted(set(data.offsets_ns.values()) | {0}):
            bounds = (_time_ns(data, low_s, offset), _time_ns(data, high_s, offset))
            rows = rows_between(self._power, "power", "t_ns", POWER_COLUMNS, bounds)
            polled += [] if rows is None else [_on_one_clock(data, rows, offset)]
        readings = Readings(data)
        readings.add(polled)
        for instance in data.instances:
            rows = steps.get(instance.offset_ns) if instance.recorded else None
            parts = self._source(instance, begin_s).advance(rows, until_s, final=False)
            cuts_s = parts[2].cuts_s
            gpus = tuple(readings.of(gpu, float(cuts_s[0]), float(cuts_s[-1])) for gpu in instance.gpus)
            slabs.append(Slab(instance, *parts, gpus))
        return slabs

    def _source(self, instance: InstanceData, begin_s: float) -> "_Source":
        """Where the steps of `instance` come from."""
        if instance.recorded and instance.instance is not None:
            return _Recorded(self._data, instance, self._members[instance.instance], begin_s)
        rebuilt = None if instance.instance is None else self._clients.get(instance.instance)
        return _Client(*(rebuilt or no_steps()), begin_s)


def _time_ns(data: RunData, at_s: float, offset_ns: int) -> int:
    """A time of the run on the clock of a host."""
    return data.window_ns[0] + offset_ns + round(at_s * NS_PER_S)
