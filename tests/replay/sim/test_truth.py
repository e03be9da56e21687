"""The true energy of requests: what a Shapley value must satisfy, on tables as the simulator writes them."""

from itertools import permutations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.sim import truth
from replay.sim.hardware import Hardware, Work, load_profile
from replay.sim.truth import shapley_truth
from replay.tables import SEGMENTS, TRUTH
from tracegen.errors import RunError

HARDWARE = Hardware(load_profile(), 2)
MHZ = 1395.0

# One request as the tables tell it: (first step, prefill chunks, decode steps, context before).
scripts = st.lists(
    st.tuples(
        st.integers(0, 6), st.lists(st.integers(1, 4000), max_size=2), st.integers(0, 6), st.integers(0, 3000)
    ).filter(lambda script: script[1] or script[2]),
    min_size=1,
    max_size=12,
)


def tables(requests, *, ids=None, mhz=MHZ):
    """Segments and steps of `requests`, given as in `scripts`; the ids count from 0 unless given."""
    segments = []
    for request, (step, chunks, decodes, context) in zip(ids or range(len(requests)), requests, strict=True):
        at, had = step, context
        for chunk in chunks:
            segments.append((0, request, at, at, "prefill", chunk, had))
            at, had = at + 1, had + chunk
        if decodes:
            segments.append((0, request, at, at + decodes - 1, "decode", 1, had))
    frame = pl.DataFrame(segments, schema=SEGMENTS, orient="row")
    present = [n for _, _, first, last, *_ in segments for n in range(first, last + 1)]
    number, count = np.unique(present, return_counts=True)
    clock = mhz if callable(mhz) else lambda _: mhz
    steps = pl.DataFrame(
        {
            "instance": pl.Series(np.zeros(number.size), dtype=pl.UInt16),
            "step": pl.Series(number, dtype=pl.UInt64),
            "requests": pl.Series(count, dtype=pl.UInt32),
            "clock_mhz": pl.Series([clock(n) for n in number], dtype=pl.Float64),
            "heat": pl.Series(np.ones(number.size), dtype=pl.Float64),
        }
    )
    return steps, frame


def step_works(requests):
    """The `Work` of each request in each step, by plain Python: {step: {request: Work}}."""
    works = {}
    for request, (step, chunks, decodes, context) in enumerate(requests):
        at, had = step, context
        for chunk in chunks:
            works.setdefault(at, {})[request] = Work(float(chunk), 0.0, 0.0, chunk * (had + chunk / 2))
            at, had = at + 1, had + chunk
        for _ in range(decodes):
            works.setdefault(at, {})[request] = Work(0.0, 1.0, float(had), 0.0)
            at, had = at + 1, had + 1
    return works


def total(works):
    return Work(*np.sum([*works, (0.0, 0.0, 0.0, 0.0)], axis=0))


def step_energy_j(works, mhz=MHZ):
    return float(HARDWARE.step_j(total(works), mhz))


def by_definition(works):
    """Each request's mean marginal energy over all orders, zero work shared equally."""
    zero_j = step_energy_j([])
    shares = dict.fromkeys(works, zero_j / len(works))
    orders = list(permutations(works))
    for order in orders:
        before = []
        for request in order:
            marginal = step_energy_j([*before, works[request]]) - (step_energy_j(before) if before else zero_j)
            shares[request] += marginal / len(orders)
            before.append(works[request])
    return shares


@given(scripts)
@settings(max_examples=50)
def test_shares_add_up_to_the_energy_of_the_steps(requests):
    found = shapley_truth(*tables(requests), HARDWARE)
    spent = sum(step_energy_j(list(works.values())) for works in step_works(requests).values())
    assert found["energy_j"].sum() == pytest.approx(spent, rel=1e-9)
    assert (found["energy_j"] > 0).all()
    assert found.schema == TRUTH


@given(scripts.map(lambda requests: requests[:4]))
@settings(max_examples=20)
def test_small_steps_are_the_mean_over_all_orders(requests):
    found = shapley_truth(*tables(requests), HARDWARE)
    wanted = np.zeros(len(requests))
    for works in step_works(requests).values():
        for request, share in by_definition(works).items():
            wanted[request] += share
    np.testing.assert_allclose(found["energy_j"], wanted, rtol=1e-9)


@pytest.mark.parametrize("others", [3, 12])
def test_equal_requests_pay_equally(others):
    twins = [(0, [700], 5, 0)] * 2
    crowd = [(0, [100 * n + 50], 9, 0) for n in range(others)]
    found = shapley_truth(*tables(twins + crowd), HARDWARE, orders=4096)
    one, other = found["energy_j"][:2]
    assert one == pytest.approx(other, rel=1e-9 if others + 2 <= truth.EXACT_REQUESTS else 2e-3)


@pytest.mark.parametrize(("batch", "tolerance"), [(truth.EXACT_REQUESTS, 1e-9), (truth.EXACT_REQUESTS + 4, 2e-3)])
def test_identical_requests_split_a_step_evenly(batch, tolerance):
    steps, segments = tables([(0, [], 1, 500)] * batch)
    found = shapley_truth(steps, segments, HARDWARE)
    energy_j = step_energy_j([Work(0.0, 1.0, 500.0, 0.0)] * batch)
    np.testing.assert_allclose(found["energy_j"], energy_j / batch, rtol=tolerance)


def test_one_more_token_of_context_costs_little_and_more_context_costs_more():
    contexts = [0, 1, 1000, 4000, 16000]
    found = shapley_truth(*tables([(0, [], 1, context) for context in contexts]), HARDWARE)["energy_j"]
    assert found.is_sorted()
    assert found[1] - found[0] == pytest.approx((found[2] - found[0]) / 1000, rel=0.2)
    assert found[4] > found[0] * 1.1


def test_sampling_agrees_with_all_coalitions(monkeypatch):
    requests = [(0, [300 * n + 1] if n % 4 == 0 else [], 1, 400 * n) for n in range(truth.EXACT_REQUESTS)]
    exact = shapley_truth(*tables(requests), HARDWARE)["energy_j"].to_numpy()
    monkeypatch.setattr(truth, "EXACT_REQUESTS", 0)
    errors = {}
    for orders in (64, 4096):
        sampled = shapley_truth(*tables(requests), HARDWARE, orders=orders)["energy_j"].to_numpy()
        errors[orders] = np.abs(sampled / exact - 1).max()
    assert errors[64] < 0.05
    assert errors[4096] < 0.005


@given(scripts, scripts)
@settings(max_examples=20)
def test_steps_do_not_touch_each_other(early, late):
    late = [(step + 1000, *rest) for step, *rest in late]
    # Steps of up to eight requests are exact, so that no sampled order can differ.
    early, late = early[:8], late[:8]
    both = shapley_truth(*tables(early + late), HARDWARE)["energy_j"].to_list()
    apart = [shapley_truth(*tables(part), HARDWARE)["energy_j"].to_list() for part in (early, late)]
    np.testing.assert_allclose(both, apart[0] + apart[1], rtol=1e-9)


@given(scripts.map(lambda requests: requests[:8]), st.data())
@settings(max_examples=20)
def test_a_segment_cut_in_two_changes_nothing(requests, data):
    steps, segments = tables(requests)
    long = segments.with_row_index().filter(pl.col("last_step") > pl.col("first_step"))
    if long.is_empty():
        return
    row = long.row(data.draw(st.integers(0, long.height - 1)), named=True)
    index = row.pop("index")
    middle = data.draw(st.integers(row["first_step"], row["last_step"] - 1))
    begin = row | {"last_step": middle}
    grown = (middle + 1 - row["first_step"]) * row["tokens_per_step"]
    end = row | {"first_step": middle + 1, "context_start": row["context_start"] + grown}
    rest = segments.with_row_index().filter(pl.col("index") != index).drop("index")
    cut = pl.concat([rest, pl.DataFrame([begin, end], schema=SEGMENTS)])
    whole, parts = (shapley_truth(steps, frame, HARDWARE) for frame in (segments, cut))
    np.testing.assert_allclose(parts["energy_j"], whole["energy_j"], rtol=1e-9)
    np.testing.assert_allclose(parts["decode_j"], whole["decode_j"], rtol=1e-9)


def test_energy_is_told_apart_by_kind():
    found = shapley_truth(*tables([(0, [2000], 50, 0), (10, [], 20, 100)]), HARDWARE)
    np.testing.assert_allclose(found["prefill_j"] + found["decode_j"], found["energy_j"])
    assert found["prefill_j"][0] == pytest.approx(step_energy_j([Work(2000.0, 0.0, 0.0, 2e6)]))
    assert found["prefill_j"][1] == 0
    assert found["decode_j"][1] > 0


def test_requests_without_an_id_pay_their_part_and_are_left_out():
    requests = [(0, [500], 20, 0)] * 3
    all_three = shapley_truth(*tables(requests), HARDWARE)
    named = shapley_truth(*tables(requests, ids=[7, None, 9]), HARDWARE)
    assert named["request_id"].to_list() == [7, 9]
    np.testing.assert_allclose(named["energy_j"], all_three["energy_j"][[0, 2]])


def test_each_step_is_priced_at_its_own_clock():
    requests = [(0, [], 2, 100)]
    mixed = shapley_truth(*tables(requests, mhz=lambda step: 800.0 if step else 1980.0), HARDWARE)
    works = [Work(0.0, 1.0, 100.0, 0.0), Work(0.0, 1.0, 101.0, 0.0)]
    wanted = step_energy_j(works[:1], 1980.0) + step_energy_j(works[1:], 800.0)
    assert mixed["energy_j"][0] == pytest.approx(wanted, rel=1e-12)


def test_memory_limits_change_nothing(monkeypatch):
    requests = [(n % 5, [200 + n], 30, 0) for n in range(8)]
    whole = shapley_truth(*tables(requests), HARDWARE)
    monkeypatch.setattr(truth, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(truth, "_VALUES_AT_ONCE", 300)
    np.testing.assert_allclose(shapley_truth(*tables(requests), HARDWARE)["energy_j"], whole["energy_j"], rtol=1e-12)


def test_the_same_seed_gives_the_same_truth():
    requests = [(0, [90 * n + 10], 3, 0) for n in range(12)]
    first, again, other = (shapley_truth(*tables(requests), HARDWARE, seed=seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


def test_tables_that_disagree_are_refused():
    steps, segments = tables([(0, [100], 3, 0), (0, [200], 3, 0)])
    with pytest.raises(RunError, match="step 0 has 1 requests, the steps table says 2"):
        shapley_truth(steps, segments.head(2), HARDWARE)


def test_no_segments_no_rows():
    steps, segments = tables([(0, [100], 3, 0)])
    found = shapley_truth(steps.clear(), segments.clear(), HARDWARE)
    assert found.is_empty()
    assert found.schema == TRUTH


def test_leakage_is_paid_by_those_who_ran_in_the_heat():
    steps, segments = tables([(0, [500], 3, 0), (2, [1500], 3, 0)], mhz=800.0)  # far from the power cap
    cold = shapley_truth(steps, segments, HARDWARE)
    warm = shapley_truth(steps.with_columns(heat=pl.lit(1.05)), segments, HARDWARE)
    assert warm["energy_j"].to_list() == pytest.approx((cold["energy_j"] * 1.05).to_list())
