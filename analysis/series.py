"""Power and load of a run over time, as figures show them: from the meter and the step records, nothing modelled."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.accounts import slabs_of, timeline_of
from analysis.load import Floats, RunData
from analysis.slabs import Slab
from analysis.steps import DECODE_TOKENS, PREFILL_TOKENS

OVERVIEW_BINS = 240
CLOSE_UP_S = 3.0


@dataclass(frozen=True)
class Series:
    """`overview`: t_s, power_w, requests (mean in the engine) by bin; `steps`: those of a few seconds, from start_s.

    `readings` are the instant sensors' windows in the close-up, summed over no GPUs: one row a reading.
    """

    bin_s: float
    overview: pl.DataFrame
    steps: pl.DataFrame | None  # start_s, end_s, requests, kind
    readings: pl.DataFrame | None  # t_s, watts, gpu
    close_up_s: tuple[float, float]


def power_series(data: RunData) -> Series:
    """The power of all accounted GPUs over the window, and a close-up of its busiest moment."""
    edges_s = np.linspace(0.0, data.duration_s, OVERVIEW_BINS + 1)
    bin_s = data.duration_s / OVERVIEW_BINS
    slabs, _ = slabs_of(data)
    energy_j, running, steps = np.zeros(edges_s.size), np.zeros(edges_s.size), [0] * len(data.instances)
    for part in slabs:
        for i, slab in enumerate(part):
            inside_s = np.clip(edges_s, slab.begin_s, slab.until_s)
            for gpu in slab.gpus:
                used_j = timeline_of(data, gpu, slab).curve.at(inside_s)
                energy_j += used_j - used_j[0]
            running += _request_seconds(slab, inside_s)
            steps[i] += len(slab.steps)
    requests = np.diff(running) / bin_s
    overview = pl.DataFrame(
        {"t_s": (edges_s[1:] + edges_s[:-1]) / 2, "power_w": np.diff(energy_j) / bin_s, "requests": requests}
    )
    busiest_s = float(overview["t_s"][int(np.argmax(requests))])
    start_s = float(np.clip(busiest_s - CLOSE_UP_S / 2, 0.0, max(0.0, data.duration_s - CLOSE_UP_S)))
    window = (start_s, min(start_s + CLOSE_UP_S, data.duration_s))
    busiest = int(np.argmax(steps))
    shown = [part[busiest] for part in slabs if part[busiest].begin_s < window[1] and part[busiest].until_s > window[0]]
    readings = [_readings(data, slab, window) for slab in shown]
    drawn = pl.concat([_steps(slab, window) for slab in shown]) if data.instances[busiest].recorded else None
    return Series(bin_s, overview, drawn, pl.concat(readings) if any(map(len, readings)) else None, window)


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


def _steps(slab: Slab, window: tuple[float, float]) -> pl.DataFrame:
    """The steps inside `window`, by what they did."""
    steps = slab.steps
    rows = np.flatnonzero((steps.end_s > window[0]) & (steps.start_s < window[1]))
    prefill, decode = steps.work[rows, PREFILL_TOKENS] > 0, steps.work[rows, DECODE_TOKENS] > 0
    return pl.DataFrame(
        {
            "start_s": steps.end_s[rows] - steps.measured_s[rows],
            "end_s": steps.end_s[rows],
            "requests": steps.requests[rows].astype(np.int64),
            "kind": np.where(prefill & decode, "both", np.where(prefill, "prefill", "decode")),
        }
    )
