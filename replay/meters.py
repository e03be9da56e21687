"""What the GPUs' readings add up to for a run's verdicts, batch by batch: what is held does not grow with the run."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from replay import verdicts
from replay.counters import Window
from replay.verdicts import CLOCK_TOLERANCE_MHZ, SENSOR_BOUND, SENSOR_GAP_NS, IntArray, Verdict


class Coverage:
    """How much of a window one GPU was read in; readings come in order of time."""

    def __init__(self, start_ns: int) -> None:
        """`start_ns`: when the window begins."""
        self._start_ns, self._last_ns, self._unread_ns = start_ns, start_ns, 0
        self._longest = start_ns, start_ns

    def add(self, t_ns: IntArray) -> None:
        """Readings in the window."""
        spans_ns = np.diff(t_ns, prepend=self._last_ns)
        if not spans_ns.size:
            return
        self._unread_ns += int(spans_ns[spans_ns > SENSOR_GAP_NS].sum())
        greatest = int(np.argmax(spans_ns))
        if spans_ns[greatest] > self._longest[1] - self._longest[0]:
            self._longest = int(t_ns[greatest] - spans_ns[greatest]), int(t_ns[greatest])
        self._last_ns = int(t_ns[-1])

    def end(self, end_ns: int) -> tuple[float, Window]:
        """The window ends: the share of it not more than 0.5 s from a reading, and the longest time without one.

        That counts from the window's start.
        """
        self.add(np.array([end_ns]))
        share = 1 - self._unread_ns / max(1, end_ns - self._start_ns)
        return share, (self._longest[0] - self._start_ns, self._longest[1] - self._start_ns)


class Energy:
    """What one GPU's energy counter and its samples of power tell of a window; readings come in order of time."""

    def __init__(self) -> None:
        self.fell_back = False
        self.sampled_j = 0.0  # from the counter's first update to its last: between two it stands still
        self._first_mj: int | None = None  # what the counter stood at with its first update, and its last
        self._updated_mj = 0
        self._since_j = 0.0  # by samples, since the last update
        self._last: tuple[int, int] | None = None  # of the readings so far: time and counter

    @property
    def counter_j(self) -> float:
        """By the counter, likewise."""
        return 0.0 if self._first_mj is None else (self._updated_mj - self._first_mj) / 1e3

    def add(self, t_ns: IntArray, power_mw: IntArray, energy_mj: IntArray) -> None:
        """Readings in the window."""
        if not t_ns.size:
            return
        last_ns, last_mj = (int(t_ns[0]), int(energy_mj[0])) if self._last is None else self._last
        gained_mj = np.diff(energy_mj, prepend=last_mj)
        self.fell_back |= bool((gained_mj < 0).any())
        # A reading stands for the time since the one before it.
        upto_j = np.cumsum(power_mw / 1e3 * (np.diff(t_ns, prepend=last_ns) / 1e9))
        updates = np.flatnonzero(gained_mj)
        if updates.size:
            first, last = updates[0], updates[-1]
            if self._first_mj is None:
                self._first_mj = int(energy_mj[first])
                self.sampled_j = float(upto_j[last] - upto_j[first])
            else:
                self.sampled_j += self._since_j + float(upto_j[last])
            self._updated_mj, self._since_j = int(energy_mj[last]), float(upto_j[-1] - upto_j[last])
        else:
            self._since_j += float(upto_j[-1])
        self._last = int(t_ns[-1]), int(energy_mj[-1])


class Clocks:
    """How often the SM clocks were off their lock, and NVML's reasons in any reading."""

    def __init__(self, locked_mhz: int | None, held_mhz: float | None) -> None:
        """`locked_mhz`: None where they were not locked; `held_mhz`: the highest held under load, where known."""
        self._locked_mhz, self._held_mhz = locked_mhz, held_mhz
        self._off = self._readings = self._reasons = 0

    def add(self, sm_clock_mhz: IntArray, reasons: npt.NDArray[np.uint64]) -> None:
        """Readings, in any order; `reasons` are those that were told with them."""
        if self._locked_mhz is None:
            return
        self._off += int((np.abs(sm_clock_mhz - self._locked_mhz) > CLOCK_TOLERANCE_MHZ).sum())
        self._readings += sm_clock_mhz.size
        self._reasons |= int(np.bitwise_or.reduce(reasons, initial=0))

    def verdict(self) -> Verdict:
        """`clocks_held`."""
        return verdicts.clocks(self._locked_mhz, self._off, self._readings, self._reasons, self._held_mhz)


class Gauge:
    """What the readings of the GPUs that serve tell of the stretches of a run."""

    columns = ("t_ns", "gpu", "power_instant_mw", "power_average_mw", "energy_mj", "sm_clock_mhz", "throttle_reasons")

    def __init__(
        self, gpus: Sequence[int], windows: Sequence[Window], locked_mhz: int | None, held_mhz: float | None = None
    ) -> None:
        """`gpus` serve in the `windows`, none where no power was read; clocks are as `Clocks` takes them."""
        self._gpus, self._windows = gpus, windows
        self._clocks = Clocks(locked_mhz, held_mhz)
        self._covered = {(gpu, window): Coverage(window[0]) for gpu in gpus for window in windows}
        self._energy = {(gpu, window): Energy() for gpu in gpus for window in windows}

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of power.parquet, batch after batch in order of time."""
        for of in rows.filter(pl.col("gpu").is_in(self._gpus)).sort("t_ns").partition_by("gpu"):
            within = pl.any_horizontal(pl.col("t_ns").is_between(*window) for window in self._windows)
            clocked = of.filter(pl.col("sm_clock_mhz").is_not_null() & within)
            self._clocks.add(_ints(clocked["sm_clock_mhz"]), clocked["throttle_reasons"].drop_nulls().to_numpy())
            for window in self._windows:
                inside = of.filter(pl.col("t_ns").is_between(*window))
                place = of["gpu"][0], window
                # A GPU that was polled but told no power, for it was lost, was not read.
                told = ~pl.all_horizontal(pl.col("power_instant_mw", "power_average_mw", "energy_mj").is_null())
                self._covered[place].add(inside.filter(told)["t_ns"].to_numpy())
                both = inside.drop_nulls(["energy_mj", "power_instant_mw"])
                self._energy[place].add(*(_ints(both[name]) for name in ("t_ns", "power_instant_mw", "energy_mj")))

    def again(self) -> bool:
        """One pass tells."""
        return False

    def clocks(self) -> Verdict:
        """`clocks_held`."""
        return self._clocks.verdict()

    def coverage(self) -> Verdict:
        """`sensor_alive`, of the worst window."""
        if not self._gpus:
            return verdicts.unread()
        return verdicts.worst([self._coverage(window) for window in self._windows])

    def _coverage(self, window: Window) -> Verdict:
        worst, silent = 1.0, ""
        for gpu in self._gpus:
            share, (since_ns, until_ns) = self._covered[gpu, window].end(window[1])
            if share < SENSOR_BOUND:
                silent += f"; GPU {gpu} was not read from {since_ns / 1e9:.1f} s to {until_ns / 1e9:.1f} s of the run"
            worst = min(worst, share)
        return verdicts.coverage(worst, silent)

    def counter(self) -> Verdict:
        """`counter_agrees`, of the worst window."""
        if not self._gpus:
            return verdicts.uncounted()
        return verdicts.worst([self._counter(window) for window in self._windows])

    def _counter(self, window: Window) -> Verdict:
        meters = {gpu: self._energy[gpu, window] for gpu in self._gpus}
        fell = [gpu for gpu, meter in meters.items() if meter.fell_back]
        if fell:
            return verdicts.counter_fell(fell[0])
        return verdicts.counter(sum(m.counter_j for m in meters.values()), sum(m.sampled_j for m in meters.values()))


def _ints(column: pl.Series) -> IntArray:
    """Numbers that may be subtracted: unsigned, each difference would be positive."""
    return column.cast(pl.Int64).to_numpy()
