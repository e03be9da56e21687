"""Which cell runs next: saturation, repeats until the interval is tight, and no dependence on who is quicker."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.sweep.course import Course
from replay.sweep.interval import half_width, tight
from replay.sweep.order import blocks_in_order
from replay.sweep.plan import Grid, SweepPlan
from replay.sweep.state import CellState, Outcome, SweepFile

RATES = (0.5, 1.0, 2.0, 4.0)


def start(plan, folder):
    cells = [cell for block in blocks_in_order(plan.cells(), plan.seed).values() for cell in block]
    return Course(plan, SweepFile(folder, {}, [CellState(cell, plan.seed + cell.repeat) for cell in cells]))


def go(course, outcome, pick=lambda running: 0, at_once=1):
    """Run the course to its end, `at_once` cells at a time, of which `pick` says which ends first; those run."""
    running, ran = [], []
    while True:
        while len(running) < at_once and (cell := course.take()) is not None:
            running.append(cell)
            ran.append(cell)
        if not running:
            return ran
        cell = running.pop(pick(running) % len(running))
        course.file.put(outcome(cell).on(course.file.cells[cell]))


def noisy(cell):
    """Saturated from 2 requests/s on at the low clock; else an energy that differs between repeats."""
    if cell.setting.freq_mhz == 800 and cell.rate_rps >= 2:
        return Outcome("saturated", "stopped early")
    spread = 0.2 if cell.rate_rps == 1 else 0.001
    return Outcome("complete", None, 1.0, 100 * (1 + spread * ((cell.repeat * 7919) % 13 / 13 - 0.5)))


plan_of = st.builds(
    lambda seed, until_ci, all_rates: SweepPlan(
        (Grid(tp=(2, 4), freq_mhz=(800,), rate_rps=RATES),),
        mix="chat", repeats=2, max_repeats=4, seed=seed, until_ci=until_ci, all_rates=all_rates,
    ),
    st.integers(0, 100), st.sampled_from([None, 0.05]), st.booleans(),
)  # fmt: skip


@settings(max_examples=10)
@given(plan_of, st.data())
def test_what_runs_does_not_depend_on_how_many_run_at_once(tmp_path_factory, plan, data):
    folder = tmp_path_factory.mktemp("sweep")
    one = start(plan, folder)
    ran = go(one, noisy)
    many = start(plan, folder)
    also_ran = go(many, noisy, lambda _: data.draw(st.integers(0, 7)), data.draw(st.integers(2, 5)))
    assert set(ran) == set(also_ran)
    assert many.file.document() == one.file.document()


def test_higher_rates_are_not_run_above_a_saturated_one(tmp_path):
    plan = SweepPlan((Grid(tp=(2,), freq_mhz=(800, 1980), rate_rps=RATES),), mix="chat", repeats=3, seed=1)
    course = start(plan, tmp_path)
    go(course, noisy)
    order = list(course.file.cells)
    skipped = [state for state in course.file.cells.values() if (state.why or "").endswith("already")]
    assert skipped
    for state in skipped:
        assert state.state == "saturated"
        lower = next(
            cell
            for cell in order[: order.index(state.cell)]
            if (cell.setting, cell.repeat) == (state.cell.setting, state.cell.repeat) and cell.rate_rps == 2
        )
        assert lower.setting.freq_mhz == 800
    assert all(state.cell.rate_rps == 4 for state in skipped)
    everything = start(SweepPlan(plan.grids, mix="chat", repeats=3, seed=1, all_rates=True), tmp_path)
    assert len(go(everything, noisy)) == len(everything.file.cells) == 24


def test_repeats_are_added_where_the_interval_is_wide_and_end_where_it_is_tight(tmp_path):
    plan = SweepPlan(
        (Grid(tp=(2, 4), freq_mhz=(1980,), rate_rps=(0.5, 1.0)),), mix="chat", repeats=2, max_repeats=20, until_ci=0.05
    )
    course = start(plan, tmp_path)
    go(course, noisy)
    assert not course.wide()
    joules = {}
    for state in course.file.cells.values():
        joules.setdefault((state.cell.setting, state.cell.rate_rps), []).append(state.energy_per_request_j)
    assert all(tight(found, 0.05) for found in joules.values())
    for (_, rate_rps), found in joules.items():
        assert len(found) == 2 if rate_rps == 0.5 else len(found) > 2
        assert not tight(found[:-1], 0.05)
    blocks = [cell.setting.block for cell in course.file.cells]
    assert sum(a != b for a, b in pairwise(blocks)) == 1, "a block's cells come together"


def test_repeats_end_at_the_most(tmp_path):
    plan = SweepPlan((Grid(tp=(2,)),), mix="chat", repeats=2, max_repeats=4, until_ci=0.001)
    course = start(plan, tmp_path)
    ran = go(course, lambda cell: Outcome("complete", None, 1.0, 100.0 + cell.repeat * 10))
    assert [cell.repeat for cell in ran[2:]] == [2, 3]
    assert course.wide() == 1


@pytest.mark.parametrize("outcome", [Outcome("failed", "no"), Outcome("complete", None, 1.0, None)])
def test_where_no_energy_is_known_nothing_is_repeated(tmp_path, outcome):
    plan = SweepPlan((Grid(tp=(2,)),), mix="chat", repeats=2, until_ci=0.05)
    course = start(plan, tmp_path)
    assert len(go(course, lambda _: outcome)) == 2
    assert course.unmeasured() is (outcome.state == "complete")


def test_a_sweep_file_comes_back(tmp_path):
    course = start(SweepPlan((Grid(tp=(2, 4), freq_mhz=(None, 800), rate_rps=RATES),), mix="chat"), tmp_path)
    course.file.head["schema_version"] = 1
    go(course, noisy)
    assert SweepFile.read(tmp_path).document() == course.file.document()


def test_half_width_is_students():
    assert half_width([5.0]) is None
    # Mean 2, deviation 1, three values: t(0.975, 2) = 4.302653 (tables), over the root of three.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
