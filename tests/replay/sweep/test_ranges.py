"""Lists and ranges of settings."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.sweep.ranges import parse_clocks, parse_numbers, parse_whole
from tracegen.errors import ReplayError

clocks = st.integers(1, 5000)


@given(clocks, clocks, clocks)
def test_a_range_has_both_ends_and_steps_between(low, high, step):
    low, high = sorted((low, high))
    found = parse_clocks("--freq", f"{low}:{high}:{step}")
    assert found[0] == low
    assert found[-1] == high
    gaps = [b - a for a, b in pairwise(found)]
    assert all(gap == step for gap in gaps[:-1])
    assert not gaps or 0 < gaps[-1] <= step


@given(st.lists(st.one_of(clocks, st.none()), min_size=1))
def test_a_list_is_kept_in_order_without_repetitions(values):
    text = " , ".join("unlocked" if value is None else str(value) for value in values)
    assert parse_clocks("--freq", text) == tuple(dict.fromkeys(values))


def test_lists_and_ranges_mix():
    assert parse_clocks("--freq", "800:1400:400,unlocked,1000") == (800, 1200, 1400, None, 1000)


@pytest.mark.parametrize("text", ["", "800,", "a", "800:1980", "800:700:100", "0", "800:900:0", "-5", "1:9999999:1"])
def test_what_is_no_clock_is_refused_with_its_option(text):
    with pytest.raises(ReplayError, match="--freq"):
        parse_clocks("--freq", text)


@pytest.mark.parametrize("text", ["", "1,,2", "nan", "inf", "0", "-1", "x"])
def test_what_is_no_number_is_refused_with_its_option(text):
    with pytest.raises(ReplayError, match="--rate"):
        parse_numbers("--rate", text)
    with pytest.raises(ReplayError, match="--tp"):
        parse_whole("--tp", text)
