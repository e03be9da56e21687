"""Idle power, from readings taken while the model is loaded, the clock locked and no request in the engine."""

import numpy as np
import polars as pl

POWER_READ = ("t_ns", "sensor_ns", "gpu", "power_instant_mw", "power_average_mw", "energy_mj")  # by `idle_power_w`
_MIN_UPDATES = 5  # fewer tell nothing


def idle_power_w(power: pl.DataFrame, gpu: int, start_ns: int, end_ns: int) -> dict[str, float]:
    """Mean power of `gpu` in W over `[start_ns, end_ns]` by each source: `instant` samples and energy `counter`.

    A source without enough updates is left out, so is a counter that falls back; an update dated before `start_ns`
    does not count. The counter's slope is fitted over the polls that first saw each new value, so the chance delay of
    one poll at either edge does not count either. A GPU with neither source has `average`, of the interval's second
    half: what it shows before may still be averaged over work.
    """
    inside = power.filter((pl.col("gpu") == gpu) & pl.col("t_ns").is_between(start_ns, end_ns)).sort("t_ns")
    result: dict[str, float] = {}
    instant = inside.filter(pl.col("power_instant_mw").is_not_null(), pl.col("sensor_ns").fill_null(end_ns) >= start_ns)
    # One reading an update; a sensor whose updates could not be dated counts by poll, which weighs all alike.
    updates = instant.unique("sensor_ns", keep="first") if instant["sensor_ns"].null_count() == 0 else instant
    if updates.height >= _MIN_UPDATES:
        result["instant"] = float(updates["power_instant_mw"].cast(pl.Float64).to_numpy().mean()) / 1e3
    if (watts := _counter_w(inside)) is not None:
        result["counter"] = watts
    if not result:
        late = inside.filter(pl.col("t_ns") >= (start_ns + end_ns) // 2)["power_average_mw"].drop_nulls()
        if len(late) >= _MIN_UPDATES:
            result["average"] = float(late.cast(pl.Float64).to_numpy().mean()) / 1e3
    return result


def fell_back(counter_mj: pl.Series) -> bool:
    """Whether an energy counter wrapped around, or its driver was loaded anew, between its readings in time's order."""
    return bool((counter_mj.cast(pl.Int64).diff() < 0).any())  # unsigned, each difference would be positive


def _counter_w(readings: pl.DataFrame) -> float | None:
    """The slope of the energy counter in W; None where it tells nothing."""
    counted = readings.filter(pl.col("energy_mj").is_not_null())
    if fell_back(counted["energy_mj"]):
        return None
    # The first row's shift is null: it is dropped as it must be.
    steps = counted.filter(pl.col("energy_mj") != pl.col("energy_mj").shift(1))
    if steps.height < _MIN_UPDATES:
        return None
    t_s = (steps["t_ns"] - steps["t_ns"].min()).cast(pl.Float64).to_numpy() / 1e9
    energy_j = (steps["energy_mj"] - steps["energy_mj"].min()).cast(pl.Float64).to_numpy() / 1e3
    return float(np.polyfit(t_s, energy_j, 1)[0])
