"""A run in slabs: stretches of time of so many steps and readings as fit into memory, one after the other.

A slab ends where a block ends, and where blocks end does not depend on slabs: what is attributed is the same however
a run is cut. While one slab is worked on the rows of the next are read.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from analysis.blocks import Blocks, blocks_between, cut_times
from analysis.checks import BACKWARDS_NS, LONGEST_NS, MOST_IN_STEP, MOST_STEP, OVERLAP_NS, check_steps
from analysis.kernels import Whole, in_order
from analysis.load import NS_PER_S, Floats, GpuData, InstanceData, RunData
from analysis.members import Members
from analysis.membership import from_client
from analysis.polled import UNREAD, VALUES
from analysis.steps import (
    Before,
    Ints,
    Segments,
    Steps,
    from_records,
    no_steps,
    segments_between,
    steps_at,
    times_of,
)
from analysis.streams import OrderedRows, Part, Reader, Rows, parted, rows_between
from replay.rundir import read_group, row_groups
from replay.tables import POWER
from tracegen.errors import RunError

STEPS_AT_ONCE = 250_000  # of an instance; more would be slower, for nothing would be found in a cache
READINGS_AT_ONCE = 4_000_000
MARGIN_S = 3.0  # of readings on either side of a slab: what is made of them reaches no further
CLOCK_STEP_MHZ = 30  # within which a clock is the same: two steps of its grid
SAMPLES = 6  # stretches that a long run's model is fitted on,
SAMPLED_STEPS = 120_000  # with so many steps in all
SHORTEST_SAMPLE_S = 200.0  # several blocks
STEP_COLUMNS = (
    "instance", "step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention",
    "requests", "waiting",
)  # fmt: skip
OF_ENGINE, OF_GPU = ("instance",), ("host", "gpu")
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

    def requests(self) -> Whole:
        """The row of each segment's request, -1 for one that is not ours."""
        return self._members.request

    def advance(self, rows: pl.DataFrame | None, until_s: float, *, final: bool) -> tuple[Steps, Segments, Blocks]:
        """The blocks that are whole once `rows`, the steps that ended before `until_s`, are there."""
        parts = [] if self._rest is None else [self._rest]
        if rows is not None:
            parts.append(self._checked(rows))
        rows = pl.concat(parts) if parts else None
        if rows is None or rows.is_empty():
            return self._no_steps(until_s, final=final)
        times = start_s, end_s, _ = times_of(rows, self._members, self._before, self._zero_ns)
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
        here_times = times[0][:here], times[1][:here], times[2][:here]
        return *from_records(rows[:here], here_times, self._members), blocks

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
        number = rows["step"]
        edges_ns = rows["start_ns"].to_numpy(), rows["end_ns"].to_numpy()
        bounds = MOST_STEP, BACKWARDS_NS, LONGEST_NS, OVERLAP_NS
        much = any((rows[name].max() or 0) > most for name, most in MOST_IN_STEP.items())  # type: ignore[operator]
        if much or not in_order(number.to_numpy(), *edges_ns, self._last_step, *bounds):
            check_steps(self._run, rows)
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

    def requests(self) -> Whole:
        """As `_Recorded` does."""
        return self._segments.request

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
    """The power readings of a run's GPUs in order of time, kept for as long as a slab may need them."""

    def __init__(self, data: RunData) -> None:
        self._data = data
        self._gpus = _gpus_by_part(data)
        self._kept: dict[tuple[str, int], pl.DataFrame] = {}

    def shifts(self) -> dict[Part, int]:
        """Whose rows are wanted, and their clocks minus the replayer's, ns."""
        return {part: self._data.offsets_ns.get(gpu[0], 0) for part, gpu in self._gpus.items()}

    def add(self, rows: Rows) -> None:
        """Put `rows` to what is kept."""
        for part, mine in rows.items():
            gpu = self._gpus[part]
            kept = self._kept.get(gpu)
            self._kept[gpu] = mine if kept is None else pl.concat([kept, mine], how="diagonal_relaxed")

    def of(self, gpu: GpuData, begin_s: float, until_s: float) -> GpuData:
        """`gpu` with its readings from `begin_s` to `until_s` and a margin; those before are forgotten."""
        offset_ns = self._data.offsets_ns.get(gpu.host, 0)
        low, high = (_time_ns(self._data, t, offset_ns) for t in (begin_s - MARGIN_S, until_s + MARGIN_S))
        rows = self._kept.get((gpu.host, gpu.gpu), POWER.to_frame())
        if not rows["t_ns"].is_sorted():  # some of its rows name the host and some do not
            rows = rows.sort("t_ns", maintain_order=True)
        here = int(rows["t_ns"].search_sorted(low, side="left"))
        self._kept[gpu.host, gpu.gpu] = rows[here:]
        until = int(rows["t_ns"].search_sorted(high, side="right"))
        return readings_of(gpu, rows[here:until], _time_ns(self._data, 0.0, offset_ns))


def _gpus_by_part(data: RunData) -> dict[Part, tuple[str, int]]:
    """Whose the rows of power.parquet are, by their host and gpu; rows without a host are the one host's."""
    gpus = {(gpu.host, gpu.gpu) for instance in data.instances for gpu in instance.gpus}
    unnamed = {(None, gpu): (host, gpu) for host, gpu in gpus if host == (data.named_host or "")}
    return {**{gpu: gpu for gpu in gpus}, **unnamed}


def readings_of(gpu: GpuData, rows: pl.DataFrame, zero_ns: int) -> GpuData:
    """`gpu` with the readings of `rows`; polls that failed are left out where others did not."""
    if all(rows[name].null_count() for name in VALUES) and rows.select(UNREAD.any() & ~UNREAD.all()).item():
        rows = rows.filter(~UNREAD)

    def column(name: str, less: int = 0, unit: float = 1.0) -> Floats:
        values = rows[name] - less if less else rows[name]
        return np.asarray(values.cast(pl.Float64).to_numpy() / unit)  # a null becomes NaN

    return replace(
        gpu,
        t_s=column("t_ns", zero_ns, NS_PER_S),
        sensor_s=column("sensor_ns", zero_ns, NS_PER_S),
        instant_w=column("power_instant_mw", unit=1e3),
        average_w=column("power_average_mw", unit=1e3),
        counter_j=column("energy_mj", unit=1e3),
        sm_clock_mhz=column("sm_clock_mhz"),
        throttle_reasons=column("throttle_reasons"),
    )


def read_clock(data: RunData, gpu: GpuData) -> GpuData:
    """`gpu` with a reading of its clock each second of the whole run; with none where the clock never changed."""
    groups = row_groups(data.run.path, "power", "sm_clock_mhz")
    ends = [end for group in groups for end in (group.low, group.high)]
    known = [end for end in ends if end is not None]
    if len(known) == len(ends) and max(known, default=0) - min(known, default=0) <= CLOCK_STEP_MHZ:
        return gpu
    parts = [part for part, name in _gpus_by_part(data).items() if name == (gpu.host, gpu.gpu)]
    second = pl.col("t_ns") // round(NS_PER_S)
    frames = [POWER.to_frame()]
    for group in groups:
        found = parted(read_group(group, "power", POWER_COLUMNS), OF_GPU)
        frames += [found[part].filter(second != second.shift().fill_null(-1)) for part in parts if part in found]
    rows = pl.concat(frames, how="diagonal_relaxed").sort("t_ns")
    return readings_of(gpu, rows, _time_ns(data, 0.0, data.offsets_ns.get(gpu.host, 0)))


class RunSlabs:
    """The slabs of a run in order of time, and a sample of them."""

    def __init__(self, data: RunData, members: dict[int, Members], *, at_once: int = STEPS_AT_ONCE) -> None:
        """`at_once`: steps of an instance in a slab."""
        self._data, self._members = data, members
        self._shifts: dict[Part, int] = {(i.instance,): i.offset_ns for i in data.instances if i.recorded}
        self._steps = row_groups(data.run.path, "steps", "end_ns") if self._shifts else []
        self._power = row_groups(data.run.path, "power", "t_ns")
        self._read_steps, self._read_power = Reader("steps", STEP_COLUMNS), Reader("power", POWER_COLUMNS)
        self._clients = {
            i.instance: from_client(data, i) for i in data.instances if i.instance is not None and not i.recorded
        }
        self.steps = sum(group.rows for group in self._steps)
        readings = sum(group.rows for group in self._power)
        at_once *= max(len(self._shifts), 1)
        self.count = max(1, -(-self.steps // at_once), -(-readings // READINGS_AT_ONCE))

    def rows_of(self, instance: InstanceData) -> Ints:
        """Rows of the requests that are in some of the instance's segments, ascending."""
        mine = self._source(instance, 0.0).requests()
        seen = np.zeros(len(self._data.ids), dtype=bool)
        seen[mine[mine >= 0]] = True
        return np.flatnonzero(seen)

    def __iter__(self) -> Iterator[list[Slab]]:
        """One slab of each instance at a time; together they cover the window."""
        data = self._data
        edges_s: list[float | None] = [*np.linspace(0.0, data.duration_s, self.count + 1)[1:-1].tolist(), None]
        sources = [self._source(instance, 0.0) for instance in data.instances]
        steps = OrderedRows(self._steps, self._read_steps.last, "end_ns", OF_ENGINE, self._shifts)
        readings = Readings(data)
        polls = OrderedRows(self._power, self._read_power.last, "t_ns", OF_GPU, readings.shifts())

        def read(until_s: float | None) -> tuple[Rows, Rows]:
            bound = None if until_s is None else _time_ns(data, until_s, 0)
            return steps.until(bound), polls.until(None if until_s is None else _time_ns(data, until_s + MARGIN_S, 0))

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
                    parts = source.advance(rows.get((instance.instance,)), end_s, final=until_s is None)
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
        readings = Readings(data)

        def between(low_s: float, high_s: float, shift_ns: int) -> tuple[int, int]:
            return _time_ns(data, low_s, shift_ns), _time_ns(data, high_s, shift_ns)

        bounds = {part: between(begin_s, until_s, shift) for part, shift in self._shifts.items()}
        steps = rows_between(self._steps, self._read_steps.first, "end_ns", OF_ENGINE, bounds)
        reach = begin_s - MARGIN_S, until_s + MARGIN_S
        bounds = {part: between(*reach, shift) for part, shift in readings.shifts().items()}
        readings.add(rows_between(self._power, self._read_power.first, "t_ns", OF_GPU, bounds))
        for instance in data.instances:
            rows = steps.get((instance.instance,))
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
