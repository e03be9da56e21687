"""Power and load of a run over time, as figures show them: from the meter and the step records, nothing modelled."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.accounts import slabs_of, timeline_of
from analysis.load import Floats, RunData
from analysis.slabs import RunSlabs, Slab
from analysis.steps import DECODE_TOKENS, PREFILL_TOKENS

OVERVIEW_BINS = 240
FINE_BINS = 1920  # as many as a wide screen has pixels
LEAST_BIN_S = 0.025  # a sensor's window on today's GPUs; finer bins would show its steps as steps of power
CLOSE_UP_S = 3.0
ZOOMED_STEPS = 8000  # that a page holds of each run: 0.3 MB


@dataclass(frozen=True)
class Bins:
    """Means over equal bins of time: power of all accounted GPUs, and requests in the engine."""

    start_s: float
    bin_s: float
    power_w: Floats
    requests: Floats

    def coarser(self, factor: int) -> "Bins":
        """`factor` bins as one; their number is a multiple of it."""
        power_w, requests = (part.reshape(-1, factor).mean(axis=1) for part in (self.power_w, self.requests))
        return Bins(self.start_s, self.bin_s * factor, power_w, requests)

    @property
    def frame(self) -> pl.DataFrame:
        """t_s (a bin's middle), power_w, requests."""
        middles_s = self.start_s + self.bin_s * (np.arange(self.power_w.size) + 0.5)
        return pl.DataFrame({"t_s": middles_s, "power_w": self.power_w, "requests": self.requests})


@dataclass(frozen=True)
class Series:
    """The whole window in `OVERVIEW_BINS` and finer, and its busiest moment step by step.

    `steps` and `readings` (the instant sensors' windows, one row a reading) are those in `close_up_s`; `zoomed_steps`
    are as many around it as a page can hold, `close` the bins of their time.
    """

    overview: Bins
    fine: Bins
    close: Bins | None
    steps: pl.DataFrame | None  # start_s, end_s, requests, kind
    zoomed_steps: pl.DataFrame | None  # the same
    readings: pl.DataFrame | None  # t_s, watts, gpu
    close_up_s: tuple[float, float]


def power_series(data: RunData) -> Series:
    """The power of all accounted GPUs over the window, and a close-up of its busiest moment."""
    slabs, _ = slabs_of(data)
    factor = int(np.clip(data.duration_s / OVERVIEW_BINS / LEAST_BIN_S, 1, FINE_BINS // OVERVIEW_BINS))
    fine, counts = _bins(data, slabs, (0.0, data.duration_s), OVERVIEW_BINS * factor)
    overview = fine.coarser(factor)
    busiest_s = overview.start_s + overview.bin_s * (int(np.argmax(overview.requests)) + 0.5)
    start_s = float(np.clip(busiest_s - CLOSE_UP_S / 2, 0.0, max(0.0, data.duration_s - CLOSE_UP_S)))
    window = (start_s, min(start_s + CLOSE_UP_S, data.duration_s))
    busiest = int(np.argmax(counts))
    readings, parts = [], []
    for part in slabs:
        parts.append(_steps_near(part[busiest], busiest_s))
        if _meets(part[busiest], window):
            readings.append(_readings(data, part[busiest], window))
    shown = pl.concat(readings) if any(map(len, readings)) else None
    if not data.instances[busiest].recorded:
        return Series(overview, fine, None, None, None, shown, window)
    near = pl.concat(parts)
    first = int(near["end_s"].search_sorted(busiest_s)) - ZOOMED_STEPS // 2
    near = near.slice(max(0, min(first, near.height - ZOOMED_STEPS)), ZOOMED_STEPS)
    inside = near.filter((pl.col("end_s") > window[0]) & (pl.col("start_s") < window[1]))
    return Series(overview, fine, _close(data, slabs, near, fine.bin_s), inside, near, shown, window)


def _close(data: RunData, slabs: RunSlabs, steps: pl.DataFrame, bin_s: float) -> Bins | None:
    """Bins of the time of `steps`; None where those of the whole window, `bin_s` long, are as fine."""
    if steps.is_empty():
        return None
    begin_s, end_s = max(0.0, float(steps["start_s"][0])), min(data.duration_s, float(steps["end_s"][-1]))
    count = int(np.clip((end_s - begin_s) / LEAST_BIN_S, 1, FINE_BINS))
    return _bins(data, slabs, (begin_s, end_s), count)[0] if (end_s - begin_s) / count < bin_s else None


def _bins(data: RunData, slabs: RunSlabs, window_s: tuple[float, float], count: int) -> tuple[Bins, list[int]]:
    """`count` bins of `window_s`, from the meters' curves of energy and from steps; and each instance's steps seen."""
    edges_s = np.linspace(*window_s, count + 1)
    energy_j, running, seen = np.zeros(edges_s.size), np.zeros(edges_s.size), [0] * len(data.instances)
    for part in slabs:
        for i, slab in enumerate(part):
            if not _meets(slab, window_s):
                continue
            inside_s = np.clip(edges_s, slab.begin_s, slab.until_s)
            for gpu in slab.gpus:
                used_j = timeline_of(data, gpu, slab).curve.at(inside_s)
                energy_j += used_j - used_j[0]
            running += _request_seconds(slab, inside_s)
            seen[i] += len(slab.steps)
    bin_s = (window_s[1] - window_s[0]) / count
    return Bins(window_s[0], bin_s, np.diff(energy_j) / bin_s, np.diff(running) / bin_s), seen


def _meets(slab: Slab, window_s: tuple[float, float]) -> bool:
    return slab.begin_s < window_s[1] and slab.until_s > window_s[0]


def _request_seconds(slab: Slab, edges_s: Floats) -> Floats:
    """Request-seconds in the engine from the slab's begin to each of `edges_s`, by its steps."""
    steps = slab.steps
    if not len(steps):
        return np.zeros(edges_s.size)
    times_s = np.stack([steps.start_s, steps.end_s], axis=1).ravel()
    spent = np.zeros(times_s.size)
    spent[1::2] = steps.requests * (steps.end_s - steps.start_s)
    area = np.interp(edges_s, times_s, np.cumsum(spent))
    return np.asarray(area - area[0])


def _readings(data: RunData, slab: Slab, window: tuple[float, float]) -> pl.DataFrame:
    """The sensors' windows inside `window`."""
    frames = []
    for gpu in slab.gpus:
        shown = timeline_of(data, gpu, slab).windows
        frames.append(pl.DataFrame({"t_s": shown.end_s, "watts": shown.watts}).with_columns(gpu=pl.lit(gpu.name)))
    low, high = max(window[0], slab.begin_s), min(window[1], slab.until_s)
    return pl.concat(frames).filter(pl.col("t_s").is_between(low, high))


def _steps_near(slab: Slab, at_s: float) -> pl.DataFrame:
    """A slab's steps that may be among the `ZOOMED_STEPS` around `at_s`, by what they did."""
    steps = slab.steps
    middle = int(np.searchsorted(steps.end_s, at_s))
    rows = slice(max(0, middle - ZOOMED_STEPS), middle + ZOOMED_STEPS)
    prefill, decode = steps.work[rows, PREFILL_TOKENS] > 0, steps.work[rows, DECODE_TOKENS] > 0
    return pl.DataFrame(
        {
            "start_s": steps.end_s[rows] - steps.measured_s[rows],
            "end_s": steps.end_s[rows],
            "requests": steps.requests[rows].astype(np.int64),
            "kind": np.where(prefill & decode, "both", np.where(prefill, "prefill", "decode")),
        }
    )
