"""Power and load of a run over time, as figures show them: from the meter and the step records, nothing modelled."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.energy import measured_curves
from analysis.load import Floats, InstanceData, RunData

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
    lines = measured_curves(data)
    energy_j = np.sum([line.curve.at(edges_s) for _, line in lines], axis=0)
    bin_s = data.duration_s / OVERVIEW_BINS
    running = np.sum([_running(instance, edges_s) for instance in data.instances], axis=0) / bin_s
    overview = pl.DataFrame(
        {"t_s": (edges_s[1:] + edges_s[:-1]) / 2, "power_w": np.diff(energy_j) / bin_s, "requests": running}
    )
    busiest_s = float(overview["t_s"][int(np.argmax(running))])
    start_s = float(np.clip(busiest_s - CLOSE_UP_S / 2, 0.0, max(0.0, data.duration_s - CLOSE_UP_S)))
    window = (start_s, min(start_s + CLOSE_UP_S, data.duration_s))
    instance = max(data.instances, key=lambda i: 0 if i.steps is None else i.steps.height)
    readings = [
        pl.DataFrame({"t_s": line.windows.end_s, "watts": line.windows.watts}).with_columns(gpu=pl.lit(gpu.name))
        for gpu, line in lines
        if gpu in instance.gpus
    ]
    shown = pl.concat(readings).filter(pl.col("t_s").is_between(*window))
    return Series(bin_s, overview, _steps(instance, window), shown if shown.height else None, window)


def _running(instance: InstanceData, edges_s: Floats) -> Floats:
    """Request-seconds in the engine per bin: by its steps, else by the clients' times from send to last token."""
    if instance.steps is not None:
        begin_s, finish_s = (instance.steps[c].to_numpy() for c in ("start_s", "end_s"))
        weight = instance.steps["requests"].cast(pl.Float64).fill_null(0.0).to_numpy()
    else:
        seen = instance.requests.drop_nulls(["sent_s", "last_token_s"])
        begin_s, finish_s = (seen[c].to_numpy() for c in ("sent_s", "last_token_s"))
        weight = np.ones(begin_s.size)
    times = np.concatenate([begin_s, finish_s])
    order = np.argsort(times, kind="stable")
    level = np.cumsum(np.concatenate([weight, -weight])[order])
    if not times.size:
        return np.zeros(edges_s.size - 1)
    area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times[order]))])
    return np.diff(np.interp(edges_s, times[order], area))


def _steps(instance: InstanceData, window: tuple[float, float]) -> pl.DataFrame | None:
    """The steps inside `window`, by what they did."""
    if instance.steps is None:
        return None
    both = (pl.col("prefill_tokens") > 0) & (pl.col("decode_tokens") > 0)
    kind = (
        pl.when(both)
        .then(pl.lit("both"))
        .when(pl.col("prefill_tokens") > 0)
        .then(pl.lit("prefill"))
        .otherwise(pl.lit("decode"))
    )
    rows = instance.steps.filter(pl.col("end_s") > window[0], pl.col("start_s") < window[1])
    return rows.select("start_s", "end_s", pl.col("requests").cast(pl.Int64), kind.alias("kind"))
