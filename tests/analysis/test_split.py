"""Conservation and fairness of sharing out, over random layouts of steps and segments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.blocks import balance, cut_blocks, expect
from analysis.pricing import Parts
from analysis.split import COLUMNS, METHODS, share
from analysis.steps import DECODE, PREFILL, Segments, Steps, sum_segments, take


@st.composite
def layouts(draw):
    """Steps of a random engine and the segments in them, prices at random; returns steps, segments, parts."""
    n = draw(st.integers(1, 40))
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(-1, 4),
                st.integers(0, n - 1),
                st.integers(0, n - 1),
                st.sampled_from([PREFILL, DECODE]),
                st.integers(1, 500),
                st.integers(0, 8000),
            ),
            max_size=12,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gaps = np.where(rng.random(n) < 0.2, rng.uniform(0.02, 30.0, n), 0.0)
    end_s = np.cumsum(gaps + rng.uniform(0.005, 2.0, n))
    start_s = np.concatenate([[gaps[0]], end_s[:-1] + gaps[1:]])
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    first, last = np.minimum(table[:, 1], table[:, 2]), np.maximum(table[:, 1], table[:, 2])
    q = np.cumsum(rng.integers(1, 3, n)).astype(float)
    tokens = np.where(table[:, 3] == DECODE, 1, table[:, 4]).astype(float)
    segments = Segments(
        request=table[:, 0],
        first=first,
        last=last,
        kind=table[:, 3],
        tokens=tokens,
        reads=np.where(table[:, 3] == DECODE, 1.0, tokens),
        context=table[:, 5] + np.where(table[:, 3] == DECODE, 0.0, tokens / 2),
        growth=tokens,
        q_start=q[first],
    )
    count, work = sum_segments(segments, np.ones(n), q)
    unlisted = rng.integers(0, 2, n) * (count == 0) + rng.integers(0, 3, n) * (rng.random(n) < 0.1)
    unlisted = np.maximum(unlisted, (count == 0).astype(float))
    extra = np.zeros((n, 4))
    extra[:, :2] = unlisted[:, None] * rng.integers(0, 50, (n, 2))
    steps = Steps(start_s, end_s, end_s - start_s, np.ones(n), q, count + unlisted, work + extra, unlisted, extra, True)
    shared, price = rng.uniform(0, 30, n), rng.uniform(0, 1e-2, (n, 4)) * (rng.random((n, 4)) < 0.8)
    return steps, segments, Parts(shared + (price * steps.work).sum(axis=1), shared, price)


def brute_force(parts: Parts, steps: Steps, segments: Segments) -> np.ndarray:
    """What each segment pays, step by step."""
    paid = np.zeros(len(segments))
    for i in range(len(segments)):
        token_column, read_column = COLUMNS[int(segments.kind[i])]
        for k in range(segments.first[i], segments.last[i] + 1):
            context = segments.context[i] + segments.growth[i] * (steps.q[k] - segments.q_start[i])
            paid[i] += parts.shared[k] / steps.requests[k] + parts.price[k, token_column] * segments.tokens[i]
            paid[i] += parts.price[k, read_column] * segments.reads[i] * context
    return paid


@given(layouts(), st.sampled_from(sorted(METHODS)))
@settings(deadline=None)
def test_running_sums_equal_going_through_every_step(layout, method):
    steps, segments, parts = layout
    blocks = cut_blocks(steps, float(steps.end_s[-1]) + 1)
    priced = METHODS[method](parts, steps)
    np.testing.assert_allclose(
        share(priced, steps, segments, blocks).energy_j, brute_force(priced, steps, segments), rtol=1e-9, atol=1e-9
    )


@given(layouts(), st.sampled_from(sorted(METHODS)), st.floats(0.2, 5.0))
@settings(deadline=None)
def test_requests_and_idle_and_others_add_up_to_what_was_measured(layout, method, gain):
    steps, segments, parts = layout
    duration_s = float(steps.end_s[-1]) + 1
    blocks = cut_blocks(steps, duration_s)
    measured_j = gain * (blocks.sums(parts.total) + 50 * np.diff(blocks.cuts_s))
    expected = expect(blocks, steps, parts.total, lambda t_s: np.full_like(t_s, 50.0))
    settled = balance(blocks, expected, parts.total, measured_j, 1.0, 0.01)
    shares = share(METHODS[method](parts, steps), steps, segments, blocks, settled.step_j)
    total_j = shares.energy_j.sum() + shares.unlisted_j + settled.idle_j.sum()
    assert total_j == pytest.approx(measured_j.sum(), rel=1e-9)
    assert settled.idle_j.min() >= 0
    assert settled.step_j.min() >= 0
    assert shares.energy_j.min(initial=0) >= 0
    assert np.all(shares.shared_j <= shares.energy_j * (1 + 1e-12) + 1e-12)
    assert shares.unlisted_j >= 0


@given(layouts(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_cutting_a_segment_in_two_changes_nothing(layout, random):
    steps, segments, parts = layout
    long = np.flatnonzero(segments.last > segments.first)
    if not long.size:
        return
    chosen = int(random.choice(list(long)))
    cut = random.randrange(int(segments.first[chosen]), int(segments.last[chosen]))
    halves = take(segments, np.append(np.arange(len(segments)), chosen))
    first, last = halves.first.copy(), halves.last.copy()
    last[chosen], first[-1] = cut, cut + 1
    context, q_start = halves.context.copy(), halves.q_start.copy()
    context[-1] += halves.growth[-1] * (steps.q[cut + 1] - q_start[-1])
    q_start[-1] = steps.q[cut + 1]
    halves = Segments(**{**vars(halves), "first": first, "last": last, "context": context, "q_start": q_start})
    blocks = cut_blocks(steps, float(steps.end_s[-1]) + 1)
    whole = share(parts, steps, segments, blocks).energy_j
    halved = share(parts, steps, halves, blocks).energy_j
    halved[chosen] += halved[-1]
    np.testing.assert_allclose(halved[:-1], whole, rtol=1e-9, atol=1e-9)


@given(layouts(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_order_of_segments_does_not_matter(layout, seed):
    steps, segments, parts = layout
    order = np.random.default_rng(seed).permutation(len(segments))
    blocks = cut_blocks(steps, float(steps.end_s[-1]) + 1)
    mixed = share(parts, steps, take(segments, order), blocks)
    np.testing.assert_allclose(mixed.energy_j, share(parts, steps, segments, blocks).energy_j[order], rtol=1e-12)


@given(layouts())
@settings(deadline=None)
def test_blocks_cover_the_window_and_cut_no_step(layout):
    steps, _, _ = layout
    blocks = cut_blocks(steps, float(steps.end_s[-1]) + 1)
    assert blocks.cuts_s[0] == 0
    assert blocks.cuts_s[-1] == steps.end_s[-1] + 1
    assert np.all(np.diff(blocks.cuts_s) > 0)
    assert np.all(steps.start_s >= blocks.cuts_s[blocks.block] - 1e-12)
    assert np.all(steps.end_s <= blocks.cuts_s[blocks.block + 1] + 1e-12)
    assert np.array_equal(np.searchsorted(blocks.block, np.arange(len(blocks))), blocks.first[:-1])


def test_equal_requests_pay_equally_and_more_work_costs_more():
    n = 10
    q = np.arange(n, dtype=float)
    segments = Segments(
        request=np.array([0, 1, 2]),
        first=np.zeros(3, int),
        last=np.full(3, n - 1),
        kind=np.full(3, DECODE),
        tokens=np.ones(3),
        reads=np.ones(3),
        context=np.array([100.0, 100.0, 5000.0]),
        growth=np.ones(3),
        q_start=np.zeros(3),
    )
    count, work = sum_segments(segments, np.ones(n), q)
    end_s = (q + 1) * 0.05
    steps = Steps(end_s - 0.05, end_s, np.full(n, 0.05), np.ones(n), q, count, work, 0 * q, 0 * work, True)
    price = np.tile([1e-3, 1e-2, 1e-5, 1e-8], (n, 1))
    parts = Parts(10 + (price * work).sum(axis=1), np.full(n, 10.0), price)
    energy_j = share(parts, steps, segments, cut_blocks(steps, 1.0)).energy_j
    assert energy_j[0] == energy_j[1]
    assert energy_j[2] - energy_j[0] == pytest.approx(n * 4900 * 1e-5)
