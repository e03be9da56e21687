"""Idle power by each source, from the readings of the idle time alone."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.gpu.baseline import idle_power_w
from replay.tables import POWER

MS = 1_000_000
S = 1_000_000_000


def readings(watts_at, seconds=5, poll_ms=23, phase_ms=40, dated=True, gpu=0):
    """Polls of a sensor that updates every 100 ms; `watts_at(update time, s)` is what it then shows."""
    rows, energy_mj, at_update = [], 0.0, {}
    for k in range(-1, seconds * 10 + 1):
        energy_mj += watts_at(k / 10) * 100
        at_update[k] = (round(watts_at(k / 10) * 1e3), round(energy_mj))
    for t_ns in range(phase_ms * MS, seconds * S, poll_ms * MS):
        update = (t_ns - phase_ms * MS) // (100 * MS)
        mw, mj = at_update[update]
        sensor_ns = update * 100 * MS + phase_ms * MS if dated else None
        rows.append((t_ns, sensor_ns, "here", gpu, mw, None, mj, *[None] * 5))
    return pl.DataFrame(rows, schema=POWER, orient="row")


@settings(deadline=None)
@given(st.floats(30, 600), st.integers(5, 24), st.integers(0, 99), st.integers(0, 900))
def test_constant_power_is_found_by_both_sources_from_any_interval(watts, poll_ms, phase_ms, start_ms):
    power = readings(lambda s: watts, poll_ms=poll_ms, phase_ms=phase_ms)
    idle = idle_power_w(power, 0, start_ms * MS, 5 * S)
    assert idle["instant"] == pytest.approx(watts, rel=1e-4)
    assert idle["counter"] == pytest.approx(watts, rel=0.02)


def test_work_before_the_interval_does_not_count():
    """The sensor still shows the work's power when the interval begins; that update is older than it."""
    power = readings(lambda s: 700.0 if s < 2.0 else 90.0)
    idle = idle_power_w(power, 0, 2 * S + 100 * MS, 5 * S)
    assert idle["instant"] == pytest.approx(90.0)
    assert idle["counter"] == pytest.approx(90.0, rel=0.02)


def test_each_update_counts_once_however_often_it_was_polled():
    power = readings(lambda s: 100.0 if round(s * 10) % 2 else 200.0, poll_ms=5)
    often = power.filter((pl.col("power_instant_mw") == 200_000) | (pl.int_range(pl.len()) % 5 == 0))
    assert idle_power_w(often, 0, 0, 5 * S)["instant"] == pytest.approx(150.0, rel=0.02)


def test_undated_updates_count_by_poll():
    power = readings(lambda s: 120.0, dated=False)
    assert idle_power_w(power, 0, 0, 5 * S)["instant"] == pytest.approx(120.0)


@pytest.mark.parametrize(("column", "left"), [("power_instant_mw", {"counter"}), ("energy_mj", {"instant"})])
def test_a_source_that_is_missing_is_left_out(column, left):
    power = readings(lambda s: 120.0).with_columns(pl.lit(None, POWER[column]).alias(column))
    assert set(idle_power_w(power, 0, 0, 5 * S)) == left


def test_too_few_updates_and_other_gpus_tell_nothing():
    power = readings(lambda s: 120.0)
    assert idle_power_w(power, 0, 0, 300 * MS) == {}
    assert idle_power_w(power, 1, 0, 5 * S) == {}
    assert idle_power_w(power, 0, 2 * S, 2 * S) == {}


def test_noise_averages_out():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.02, 1000)
    power = readings(lambda s: 100.0 * (1 + noise[round(s * 10)]), seconds=50)
    assert idle_power_w(power, 0, 0, 50 * S)["instant"] == pytest.approx(100.0, rel=0.005)


def test_a_counter_that_falls_back_within_the_interval_is_none():
    power = readings(lambda s: 100.0)
    wrapped = pl.col("energy_mj").cast(pl.Int64) % 200_000
    idle = idle_power_w(power.with_columns(wrapped.cast(pl.UInt64)), 0, 0, 5 * S)
    assert set(idle) == {"instant"}


def test_an_average_is_idle_power_where_there_is_nothing_else_and_of_the_second_half():
    power = readings(lambda s: 700.0 if s < 2.0 else 90.0)
    shown = pl.col("power_instant_mw").alias("power_average_mw")
    only = power.with_columns(shown, pl.lit(None, pl.UInt64).alias("energy_mj")).with_columns(
        pl.lit(None, pl.UInt32).alias("power_instant_mw")
    )
    assert idle_power_w(only, 0, S, 5 * S) == {"average": pytest.approx(90.0)}
    assert set(idle_power_w(power.with_columns(shown), 0, S, 5 * S)) == {"instant", "counter"}
