"""Pareto fronts: no point on one is dominated, every point off it is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis.pareto import front, with_fronts


def dominates(a, b):
    return (a <= b).all() and (a < b).any()


@given(arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(0, 6)))
def test_no_point_on_the_front_is_dominated_and_every_other_is(values):
    on = front(values)
    assert on.any()
    for i, row in enumerate(values):
        assert any(dominates(other, row) for other in values) != on[i]
    for row in values[~on]:
        assert any(dominates(other, row) for other in values[on])


def test_what_is_not_known_is_on_no_front_and_keeps_nobody_off():
    values = np.array([[1.0, np.nan], [2.0, 2.0], [3.0, 3.0]])
    assert front(values).tolist() == [False, True, False]


def test_fronts_are_of_sound_settings_at_one_rate(table_of):
    cheap, quick = {"energy_per_request_j": 50.0, "ttft_p99_ms": 300.0}, {"tp": 4, "ttft_p99_ms": 60.0}
    worse = {"tp": 8, "energy_per_request_j": 200.0, "ttft_p99_ms": 400.0, "tbt_mean_ms": 90.0}
    bad = {"tp": 1, "energy_per_request_j": 1.0, "standing": "invalid"}
    table = table_of([cheap, quick, worse, bad, {**worse, "rate_rps": 2.0}])
    found = {(row["tp"], row["rate_rps"]): row for row in with_fronts(table.settings).iter_rows(named=True)}
    assert [found[tp, 1.0]["pareto_ttft"] for tp in (1, 2, 4, 8)] == [None, True, True, False]
    assert found[8, 2.0]["pareto_ttft"] is True  # alone at its rate
    assert found[8, 1.0]["pareto_tbt"] is False


def test_a_setting_of_which_only_the_cheap_repeat_is_there_takes_nobody_off_the_front(table_of):
    whole = [{"tp": 2, "repeat": r, "energy_per_request_j": j} for r, j in enumerate((100.0, 300.0))]
    light = {"tp": 4, "repeat": 0, "energy_per_request_j": 110.0}
    gone = {"tp": 4, "repeat": 1, "standing": "missing", "state": "planned", "energy_per_request_j": None}
    found = with_fronts(table_of([*whole, light, gone]).settings)
    assert dict(found.select("tp", "pareto_ttft").iter_rows()) == {2: True, 4: None}
    alone = with_fronts(table_of([light, gone]).settings)
    assert alone["pareto_ttft"].to_list() == [True]


def test_a_sweep_without_a_sound_setting_has_no_front(table_of):
    found = with_fronts(table_of([{"standing": "invalid"}]).settings)
    assert found["pareto_ttft"].to_list() == [None]
    assert found["tbt_mean_ms"][0] == pytest.approx(20.0)
