"""Idle power, from readings taken while the model is loaded, the clock locked and no request in the engine."""

import numpy as np
import polars as pl

_MIN_UPDATES = 5  # fewer tell nothing


def idle_power_w(power: pl.DataFrame, gpu: int, start_ns: int, end_ns: int) -> dict[str, float]:
    """Mean power of `gpu` in W over `[start_ns, end_ns]` by each source: `instant` samples and energy `counter`.

    A source without enough updates is left out; an update dated before `start_ns` does not count. The counter's slope
    is fitted over the polls that first saw each new value, so the chance delay of one poll at either edge does not
    count either.
    """
    inside = power.filter((pl.col("gpu") == gpu) & pl.col("t_ns").is_between(start_ns, end_ns)).sort("t_ns")
    result: dict[str, float] = {}
    instant = inside.filter(pl.col("power_instant_mw").is_not_null(), pl.col("sensor_ns").fill_null(end_ns) >= start_ns)
    # One reading an update; a sensor whose updates could not be dated counts by poll, which weighs all alike.
    updates = instant.unique("sensor_ns", keep="first") if instant["sensor_ns"].null_count() == 0 else instant
    if updates.height >= _MIN_UPDATES:
        result["instant"] = float(updates["power_instant_mw"].cast(pl.Float64).to_numpy().mean()) / 1e3
    steps = inside.filter(pl.col("energy_mj").is_not_null()).filter(
        pl.col("energy_mj")
        != pl.col("energy_mj").shift(1)  # the first row's shift is null: it is dropped as it must be
    )
    if steps.height >= _MIN_UPDATES:
        t_s = (steps["t_ns"] - start_ns).cast(pl.Float64).to_numpy() / 1e9
        energy_j = (steps["energy_mj"] - steps["energy_mj"].min()).cast(pl.Float64).to_numpy() / 1e3
        result["counter"] = float(np.polyfit(t_s, energy_j, 1)[0])
    return result
