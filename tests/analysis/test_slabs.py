"""A run gives the same blocks, steps and joules however it is cut into slabs, and in whatever order its rows stand."""

import numpy as np
import polars as pl
import pytest

from analysis import slabs
from analysis.accounts import EVERYTHING, slabs_of
from analysis.energy import attribute, attribute_methods
from analysis.load import load_run
from analysis.streams import OrderedRows, Reader
from replay.rundir import row_groups

SMALL = 300  # steps in a slab


@pytest.fixture
def long_run(run_of):
    return run_of("long", rate=1.0, duration_s=150.0, silent_s=(60.0, 75.0))


def whole_and_pieces(run):
    data = load_run(run)
    (whole,) = slabs_of(data, at_once=EVERYTHING)[0]
    pieces = list(slabs_of(data, at_once=SMALL)[0])
    assert len(pieces) > 3
    return whole[0], [piece for (piece,) in pieces]


def test_blocks_and_steps_do_not_depend_on_slabs(long_run):
    whole, pieces = whole_and_pieces(long_run)
    cuts_s = [pieces[0].begin_s] + [cut for piece in pieces for cut in piece.blocks.cuts_s[1:]]
    np.testing.assert_array_equal(cuts_s, whole.blocks.cuts_s)
    for name in ("start_s", "end_s", "measured_s", "requests", "work", "unlisted", "q"):
        joined = np.concatenate([getattr(piece.steps, name) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole.steps, name), err_msg=name)


def test_a_run_in_slabs_is_accounted_for_to_the_last_joule(long_run):
    whole = attribute(long_run)
    pieces = attribute_methods(long_run, ["shapley", "equal-time"], at_once=SMALL)
    for energy in pieces.values():
        summary = energy.summary
        total_j = energy.requests["energy_j"].sum() + summary["idle_j"] + summary["other_j"]
        assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
        assert summary["measured_j"] == pytest.approx(whole.summary["measured_j"], rel=1e-9)
    # The model is fitted on stretches of it.
    mine, all_at_once = (e.requests["energy_j"].to_numpy() for e in (pieces["shapley"], whole))
    np.testing.assert_allclose(mine, all_at_once, rtol=0.05)
    assert np.median(np.abs(mine / all_at_once - 1)) < 0.01


def test_a_model_fitted_on_a_sample_of_a_run_serves_the_whole_of_it(long_run, monkeypatch):
    whole = attribute(long_run)
    for name, value in (("SAMPLED_STEPS", 1500), ("SAMPLES", 2), ("SHORTEST_SAMPLE_S", 70.0)):
        monkeypatch.setattr(slabs, name, value)
    sampled = attribute_methods(long_run, ["shapley"], at_once=SMALL)["shapley"]
    assert sampled.summary["fit"][0]["steps"] < 0.9 * whole.summary["fit"][0]["steps"]
    assert abs(sampled.summary["residual_j"]) < 1e-9 * sampled.summary["measured_j"]
    off = sampled.requests["energy_j"].to_numpy() / whole.requests["energy_j"].to_numpy() - 1
    assert np.median(np.abs(off)) < 0.02


def test_rows_of_a_table_come_once_each_in_order_however_they_are_written(long_run, rewrite):
    steps = long_run.scan("steps").collect()
    shuffled = rewrite(long_run, steps=steps.sample(fraction=1, shuffle=True, seed=1))
    read = Reader("steps", ["instance", "step", "end_ns"]).last
    rows = OrderedRows(row_groups(shuffled.path, "steps", "end_ns"), read, "end_ns", ["instance"], {(0,): 7})
    ends = steps["end_ns"].to_list()
    parts = [rows.until(value)[(0,)] for value in (ends[10] - 7, ends[10] - 7, ends[500] - 7, None)]
    assert [part.height for part in parts] == [10, 0, 490, steps.height - 500]
    assert pl.concat(parts)["step"].to_list() == steps["step"].to_list()
