"""Where blocks are cut: beside long rests, never in a step, and in the same places however a run comes in pieces."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from analysis.blocks import CUT_IDLE_S, USUAL_S, cut_times

# Of each step how long nothing ran before it, and how long it took.
STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.001, 0.3, 2.0, 9.0, 19.0, 21.0, 35.0, 50.0, 300.0]),
        st.sampled_from([0.05, 1.0, 4.0]),
    ),
    min_size=1,
    max_size=60,
)


def times(steps):
    end_s = np.cumsum([gap + took for gap, took in steps])
    return end_s - np.array([took for _, took in steps]), end_s


def in_pieces(start_s, end_s, untils, duration_s):
    """The cuts of a run whose steps come in pieces, as `analysis.slabs` takes them."""
    cuts, done = [0.0], 0
    for until_s in [*untils, duration_s]:
        final = until_s == duration_s
        known = end_s.size if final else int(np.searchsorted(end_s, until_s))
        if known == done and not final:
            continue
        new = cut_times(start_s[done:known], end_s[done:known], cuts[-1], until_s, final=final)
        cuts += new[1:].tolist()
        done = max(done, int(np.searchsorted((start_s + end_s) / 2, cuts[-1])))
    return cuts


@given(STEPS, st.lists(st.floats(0.01, 0.99), max_size=5), st.sampled_from([0.0, 3.0, 30.0, 200.0]))
def test_cuts_do_not_depend_on_the_pieces_that_a_run_comes_in(steps, shares, after_s):
    start_s, end_s = times(steps)
    duration_s = float(end_s[-1]) + after_s
    whole = cut_times(start_s, end_s, 0.0, duration_s, final=True).tolist()
    assert in_pieces(start_s, end_s, sorted(share * duration_s for share in shares), duration_s) == whole


@given(STEPS, st.sampled_from([0.0, 3.0, 30.0, 200.0]))
def test_a_long_rest_is_a_block_of_its_own_and_no_step_is_cut(steps, after_s):
    start_s, end_s = times(steps)
    duration_s = float(end_s[-1]) + after_s
    cuts = cut_times(start_s, end_s, 0.0, duration_s, final=True)
    assert (cuts[0], cuts[-1]) == (0.0, duration_s)
    assert (np.diff(cuts) > 0).all()
    inside = (cuts[:, None] > start_s + 1e-9) & (cuts[:, None] < end_s - 1e-9)
    assert not inside.any()
    edges_s = np.concatenate([[0.0], np.ravel([start_s, end_s], order="F"), [duration_s]])
    rests = [(a, b) for a, b in edges_s.reshape(-1, 2) if b - a > USUAL_S + 2 * CUT_IDLE_S]
    for begin_s, until_s in rests:
        (inner,) = np.nonzero((cuts > begin_s + CUT_IDLE_S) & (cuts < until_s - CUT_IDLE_S))
        assert inner.size == 0, "one block"
        near = (cuts >= begin_s) & (cuts <= begin_s + CUT_IDLE_S), (cuts <= until_s) & (cuts >= until_s - CUT_IDLE_S)
        assert all(side.sum() == 1 for side in near)
