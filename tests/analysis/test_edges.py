"""The sum that `replay` prints is told where it differs from what was attributed, and why."""

import polars as pl
import pytest

from analysis.edges import TOLD_REL, polled_j
from analysis.energy import attribute
from replay.counters import counted_j

S = 10**9


def told(run):
    return [note for note in attribute(run).summary["notes"] if note.startswith("replay's own sum is ")]


def test_it_is_replays_sum_to_the_last_digit(run_of, rewrite):
    run = run_of(duration_s=20.0)
    start, end = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    paused = [(start - 3 * S, start + 5 * S), (start + 9 * S, end)]
    stretches = [{"start_ns": a, "end_ns": b} for a, b in paused]
    assert polled_j(run, [0, 1]) == counted_j(run, [0, 1], [(start, end)])[0]
    measured = [(start, start + 5 * S), (start + 9 * S, end)]  # what was sent before the window is a warm-up
    assert polled_j(rewrite(run, {"stretches": stretches}), [0, 1]) == counted_j(run, [0, 1], measured)[0]


def test_a_sum_that_is_another_is_told_with_the_reason(run_of, rewrite):
    run = run_of(duration_s=20.0)
    measured_j = attribute(run).summary["measured_j"]
    assert abs(polled_j(run, [0, 1]) / measured_j - 1) < TOLD_REL
    assert told(run) == []
    start, end = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    stretches = [{"start_ns": start, "end_ns": start + 5 * S}, {"start_ns": start + 9 * S, "end_ns": end}]
    resumed = rewrite(run, {"stretches": stretches, "paused_s": 4.0})
    (text,) = told(resumed)
    assert f"{polled_j(resumed, [0, 1]) / 1e3:,.2f} kJ" in text
    assert text.endswith("without the 4.0 s between its stretches")


def test_without_a_counter_there_is_no_such_sum(run_of, rewrite):
    run = run_of(duration_s=20.0)
    power = run.scan("power").with_columns(pl.lit(None, pl.UInt64).alias("energy_mj")).collect()
    assert polled_j(rewrite(run, power=power), [0, 1]) is None
    assert polled_j(rewrite(run, {"measure_end_ns": None}), [0, 1]) is None


@pytest.mark.parametrize("edge", ["before", "after"])
def test_readings_that_do_not_reach_the_window_tell_no_sum(run_of, rewrite, edge):
    run = run_of(duration_s=20.0)
    start, end = run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]
    inside = pl.col("t_ns") > start + S if edge == "before" else pl.col("t_ns") < end - S
    assert polled_j(rewrite(run, power=run.scan("power").filter(inside).collect()), [0, 1]) is None
