"""Recommendations on made-up tables: the right setting, the right reasons, and no winner where data tells none."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.objectives import OBJECTIVES, Wanted, parse_wanted
from analysis.paired import apart, over_repeats
from analysis.recommend import ALONE, CLEAR, NONE, OPEN, recommend
from analysis.recommend_json import document, schedule
from analysis.recommend_text import answer_lines, answer_rows, closing, loser_rows, misses, opening
from analysis.slo import Slo
from tracegen.console import print_table
from tracegen.errors import AnalysisError

WANTED = Wanted()


def no_requests(_a, _b, _group):
    return "no requests in a made-up table"


def asked(table, name="energy", **options):
    return recommend(table, WANTED, name, pairs=no_requests, **options)


def cells_of(joules, **more):
    """One setting by repeat, from its joules a request."""
    return [{"energy_per_request_j": j, "repeat": r, **more} for r, j in enumerate(joules)]


def known():
    """TP2 at three clocks and TP4 at one, three repeats: 1200 MHz is cheapest, 1000 MHz misses TTFT."""
    return [
        *cells_of([100.0, 110.0, 90.0], freq_mhz=1200.0),
        *cells_of([130.0, 143.2, 117.1], freq_mhz=1980.0, e2e_mean_ms=800.0),
        *cells_of([80.0, 88.0, 72.0], freq_mhz=1000.0, slo_attainment=0.9, slo_attainment_ttft=0.9, ttft_p99_ms=612.0),
        *cells_of([210.0, 231.0, 189.0], tp=4, freq_mhz=1980.0, e2e_mean_ms=500.0),
    ]


def test_the_best_of_a_known_table_and_what_it_saves(table_of):
    (answer,) = asked(table_of(known())).answers
    assert answer.verdict == CLEAR
    assert answer.best.name == "TP2 1200 MHz"
    assert answer.best.value == pytest.approx(100.0)
    assert answer.runner_up.option.name == "TP2 1980 MHz"
    against = {versus.what: versus for versus in answer.against}
    highest = against["the highest clock of TP2"]
    assert highest.apart.percent == pytest.approx(100 * (100 / 130 - 1), abs=0.1)
    assert highest.apart.low_percent < highest.apart.percent < highest.apart.high_percent < 0
    assert highest.apart.paired_by == "repeats"
    assert against["the fastest of all"].option.name == "TP4 1980 MHz"
    assert against["the fastest of all"].apart.percent == pytest.approx(100 * (100 / 210 - 1), abs=0.1)


def test_each_other_setting_is_told_why_it_loses(table_of):
    found = asked(table_of(known()))
    headings, rows = loser_rows(found, found.answers[0])
    by_name = {row[0]: row for row in rows}
    assert by_name["TP2 1000 MHz"][-1] == "misses TTFT: met by 90.0 %, p99 612 ms"
    assert by_name["TP4 1980 MHz"][2] == "+110.0 %"
    assert by_name["TP4 1980 MHz"][-1] == "more J/request"
    assert len(headings) == len(rows[0])
    lines = answer_lines(found, found.answers[0])
    assert "TP2 1200 MHz, 100" in lines[0]
    assert any(line.strip().startswith("saves 23.1 % of J/request") for line in lines)
    assert opening(found)[0].startswith("SIMULATED")


def test_where_the_interval_includes_zero_no_winner_is_claimed(table_of):
    rows = [*cells_of([100.0, 120.0, 95.0]), *cells_of([101.0, 117.0, 99.0], freq_mhz=1400.0)]
    found = asked(table_of(rows))
    (answer,) = found.answers
    assert answer.verdict == OPEN
    assert answer.tied == (answer.runner_up.option.name,)
    assert answer.runner_up.apart.low_percent < 0 < answer.runner_up.apart.high_percent
    assert "not enough data to tell it from the runner-up" in answer_lines(found, answer)[1]
    assert any(line.endswith("--repeats N") for line in closing(found))
    assert document(found)["answers"][0]["verdict"] == "not enough data"


def test_one_repeat_without_requests_tells_no_winner(table_of):
    (answer,) = asked(table_of([*cells_of([100.0]), *cells_of([150.0], freq_mhz=1400.0)])).answers
    assert answer.verdict == OPEN
    assert answer.runner_up.apart.low_percent is None
    assert answer.runner_up.apart.percent == pytest.approx(50.0)


def test_one_repeat_is_paired_by_requests(table_of):
    rng = np.random.default_rng(1)
    values = rng.lognormal(4.0, 1.0, 200)

    def pairs(_a, b, _group):
        return values, values * (1.5 if "1400" in b else 1.0) * rng.normal(1.0, 0.01, values.size)

    table = table_of([*cells_of([100.0]), *cells_of([150.0], freq_mhz=1400.0)])
    found = recommend(table, WANTED, pairs=pairs)
    (answer,) = found.answers
    assert answer.verdict == CLEAR
    assert answer.runner_up.apart.paired_by == "requests"
    assert answer.runner_up.apart.low_percent < 50 < answer.runner_up.apart.high_percent
    assert any("say nothing of how repeats would vary" in line for line in closing(found))


def test_what_cannot_be_believed_is_not_chosen_and_says_why(table_of):
    rows = [
        *cells_of([100.0, 110.0]),
        *cells_of([50.0, 55.0], freq_mhz=1000.0, standing="invalid", verdicts=["dispatch_lag"],
                  invalid_because=["dispatch_lag: 40 ms"]),
        *cells_of([60.0], freq_mhz=1100.0),
        {"freq_mhz": 1100.0, "repeat": 1, "standing": "saturated", "state": "saturated", "why": "77 waited"},
        {"tp": 1, "freq_mhz": 1100.0, "standing": "missing", "state": "failed", "why": "does not fit"},
    ]  # fmt: skip
    found = asked(table_of(rows))
    (answer,) = found.answers
    assert answer.best.freq_mhz == 1200.0
    assert answer.verdict == ALONE
    why = {loser.option.name: loser.option.unfit for loser in answer.losers}
    assert why == {
        "TP2 1000 MHz": "invalid: dispatch_lag: 40 ms",
        "TP2 1100 MHz": "saturated in 1 of 2 repeats (77 waited)",
        "TP1 1100 MHz": "failed: does not fit",
    }


def test_a_clock_that_the_gpu_does_not_hold_is_a_setting_that_says_so(table_of):
    rows = [*cells_of([100.0, 110.0, 90.0]), *cells_of([150.0, 166.0, 134.0], freq_mhz=1980.0, clock_held=False)]
    found = asked(table_of(rows))
    (answer,) = found.answers
    assert answer.verdict == CLEAR
    (versus,) = answer.against
    assert versus.option.freq_mhz == 1980.0
    assert versus.apart.high_percent < 0
    assert any("did not let them hold under load)" in line for line in answer_lines(found, answer))
    (best,) = asked(table_of([row for row in rows if row.get("freq_mhz")])).answers
    assert best.best.clock_held is False
    assert any("did not let them hold" in line for line in answer_lines(found, best))
    assert document(found)["answers"][0]["best"]["clock_held"] is True


def test_a_setting_is_called_invalid_for_what_is_invalid_and_not_for_what_is_missing(table_of):
    gone = {"repeat": 0, "freq_mhz": 1980.0, "standing": "missing", "state": "complete", "why": "its file is torn"}
    slow = {
        "repeat": 1,
        "freq_mhz": 1980.0,
        "standing": "invalid",
        "invalid_because": ["sent late"],
        "verdicts": ["lag"],
    }
    found = asked(table_of([*cells_of([100.0, 110.0]), gone, slow]))
    (answer,) = found.answers
    assert answer.losers[0].option.unfit == "invalid: sent late"
    # Nor is 1200 MHz called the highest clock where one above it cannot be believed.
    assert "nothing to be believed has a higher clock at its TP or is faster" in answer_lines(found, answer)[-1]


def test_where_none_keeps_to_the_objectives_the_nearest_is_named(table_of):
    near, far = ({"slo_attainment": s, "slo_attainment_tbt": s} for s in (0.97, 0.5))
    found = asked(table_of([*cells_of([100.0], **far), *cells_of([150.0], freq_mhz=1400.0, **near)]))
    (answer,) = found.answers
    assert (answer.verdict, answer.best) == (NONE, None)
    assert "nearest is TP2 1400 MHz, which misses TBT: met by 97.0 %" in answer_lines(found, answer)[0]


def test_objectives_met_apart_but_not_at_once_are_missed(table_of):
    row = {"slo_attainment": 0.985, "slo_attainment_ttft": 0.992, "slo_attainment_tbt": 0.993}
    (answer,) = asked(table_of([row])).answers
    assert misses(answer.losers[0].option.misses) == "all at once: met by 98.5 %"


def test_a_bound_on_the_gaps_tail_is_kept_to(table_of):
    wanted = parse_wanted("tbt:100,tbt_p99:40")
    table = table_of([{}, {"freq_mhz": 1000.0, "energy_per_request_j": 1.0, "tbt_p99_ms": 41.0}], slo=wanted.slo)
    (answer,) = recommend(table, wanted, pairs=no_requests).answers
    assert answer.best.freq_mhz == 1200.0
    assert misses(answer.losers[0].option.misses) == "TBT p99: 41 ms, 40 asked"


joules = st.lists(st.floats(10.0, 1000.0), min_size=2, max_size=4)
shares = st.sampled_from([1.0, 0.995, 0.9])


@st.composite
def sweeps(draw):
    """Cells of a few settings, all of as many repeats."""
    repeats = draw(st.integers(1, 3))
    rows = []
    for tp in (2, 4):
        for clock in (1000.0, 1500.0, None):
            share = draw(shares)
            values = draw(st.lists(st.floats(10.0, 1000.0), min_size=repeats, max_size=repeats))
            kept = {"slo_attainment": share, "slo_attainment_ttft": share, "e2e_mean_ms": draw(st.floats(1.0, 1e4))}
            rows += cells_of(values, tp=tp, freq_mhz=clock, **kept)
    return rows


@settings(max_examples=40)
@given(rows=sweeps(), name=st.sampled_from(["energy", "performance", "edp"]), data=st.data())
def test_the_best_has_the_least_mean_of_those_that_keep_to_the_objectives(table_of, rows, name, data):
    table = table_of(rows)
    (answer,) = asked(table, name).answers
    value = OBJECTIVES[name].value
    means = (
        table.cells.with_columns(value.alias("value"))
        .group_by("tp", "freq_mhz")
        .agg(pl.col("value").mean(), pl.col("slo_attainment").mean())
        .filter(pl.col("slo_attainment") >= WANTED.attainment)
    )
    if means.is_empty():
        assert answer.best is None
    else:
        assert answer.best.value == pytest.approx(means["value"].min())
        assert {loser.option.name for loser in answer.losers if loser.option.eligible} | {answer.best.name} == {
            f"TP{tp} {'unlocked' if clock is None else f'{clock:g} MHz'}"
            for tp, clock in means.select("tp", "freq_mhz").iter_rows()
        }
    shuffled = asked(table_of(data.draw(st.permutations(rows))), name)
    assert document(shuffled) == document(asked(table, name))


@given(ratios=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=6), loads=st.data())
def test_what_a_repeat_does_to_both_drops_out_and_more_of_the_same_narrows(ratios, loads):
    a = loads.draw(st.lists(st.floats(1.0, 1e4), min_size=len(ratios), max_size=len(ratios)))
    b = [x * ratio for x, ratio in zip(a, ratios, strict=True)]
    found, bare = over_repeats(a, b), over_repeats([1.0] * len(ratios), ratios)
    assert found.percent == pytest.approx(bare.percent, abs=1e-6)
    assert found.high_percent == pytest.approx(bare.high_percent, rel=1e-6, abs=1e-6)
    assert found.low_percent <= found.percent + 1e-9 <= found.high_percent + 2e-9
    twice = over_repeats(a + a, b + b)
    assert twice.percent == pytest.approx(found.percent, abs=1e-6)
    assert twice.high_percent - twice.low_percent <= found.high_percent - found.low_percent + 1e-9
    turned = over_repeats(b, a)
    assert 1 + turned.percent / 100 == pytest.approx(1 / (1 + found.percent / 100))


def test_settings_without_a_repeat_in_common_are_not_set_against_each_other():
    assert apart({0: 1.0}, {1: 2.0}, lambda _: "no") is None


def test_fewer_repeats_than_planned_are_said(table_of):
    rows = [*cells_of([100.0, 110.0]), {"repeat": 2, "standing": "missing", "state": "failed", "why": "gone"}]
    found = asked(table_of([*rows, *cells_of([200.0, 210.0, 190.0], freq_mhz=1400.0)]))
    assert any("TP2 1200 MHz has 2 of 3 repeats" in line for line in answer_lines(found, found.answers[0]))
    assert found.answers[0].runner_up.apart.pairs == 2


def test_a_setting_that_only_has_the_cheap_repeat_does_not_win_by_it(table_of):
    light = [{"energy_per_request_j": 120.0, "freq_mhz": 1400.0, "repeat": 0, "e2e_mean_ms": 10.0}]
    gone = {"freq_mhz": 1400.0, "standing": "missing", "state": "planned"}
    light += [gone | {"repeat": 1}, gone | {"repeat": 2}]
    rows = [*cells_of([100.0, 201.0, 300.0]), *light, *cells_of([130.0, 262.0, 391.0], freq_mhz=1600.0)]
    (answer,) = asked(table_of(rows)).answers
    assert answer.best.name == "TP2 1200 MHz"  # 200 J in the mean; the light one has 120 J, all of a cheap repeat
    assert [loser.option.name for loser in answer.losers] == ["TP2 1400 MHz", "TP2 1600 MHz"]
    assert answer.runner_up.apart.percent == pytest.approx(20.0)
    assert "TP2 1400 MHz" not in {versus.option.name for versus in answer.against}


def test_where_pairs_go_round_in_a_circle_no_winner_is_claimed(table_of):
    rows = []
    for clock, first, a, second, b in (
        (1000.0, 0, 10.0, 1, 40.0),
        (1100.0, 1, 30.0, 2, 90.0),
        (1200.0, 2, 80.0, 0, 12.0),
    ):
        for repeat, joules in ((first, a), (second, b)):
            rows.append({"freq_mhz": clock, "repeat": repeat, "energy_per_request_j": joules})

    def pairs(a, b, _group):
        order = np.linspace(1.0, 2.0, 50)
        return order * _joules(rows, a), order * _joules(rows, b)

    (answer,) = recommend(table_of(rows), WANTED, pairs=pairs).answers
    beaten = {loser.option.name for loser in answer.losers if loser.apart.percent < 0}
    assert beaten <= set(answer.tied)
    assert answer.verdict == OPEN


def _joules(rows, run):
    named = {f"cells/tp2-{row['freq_mhz']}-1.0-r{row['repeat']}": row["energy_per_request_j"] for row in rows}
    return named[run]


def test_several_rates_have_an_answer_each_in_order(table_of):
    rows = [
        {"rate_rps": 10.0}, {"rate_rps": 10.0, "freq_mhz": 1400.0, "energy_per_request_j": 50.0},
        {"rate_rps": 2.0}, {"rate_rps": 2.0, "freq_mhz": 1400.0},
    ]  # fmt: skip
    found = asked(table_of(rows))
    assert [(a.rate_rps, a.best.freq_mhz) for a in found.answers] == [(2.0, 1200.0), (10.0, 1400.0)]
    headings, cells = answer_rows(found)
    assert [row[0] for row in cells] == ["2", "10"]
    assert len(headings) == len(cells[0])
    assert [a.rate_rps for a in asked(table_of(rows), rate_rps=10.0).answers] == [10.0]
    with pytest.raises(AnalysisError, match=r"--rate 3: .* it has 2, 10"):
        asked(table_of(rows), rate_rps=3.0)


def test_a_trace_of_its_own_rate_has_one_answer(table_of):
    (answer,) = asked(table_of([{"rate_rps": None}, {"rate_rps": None, "freq_mhz": 1400.0}])).answers
    assert answer.rate_rps is None
    assert answer.best.freq_mhz == 1200.0  # of equals the lower clock


def test_a_schedule_has_the_best_of_each_bucket(table_of):
    groups = [
        {"group": group, "repeat": repeat, "freq_mhz": clock, "energy_per_request_j": j * (1 + repeat / 10)}
        for repeat in (0, 1)
        for group, clock, j in (("SS", 1200.0, 5.0), ("SS", 1400.0, 4.0), ("LL", 1200.0, 50.0), ("LL", 1400.0, 60.0))
    ]
    cells = [{"freq_mhz": clock, "repeat": repeat} for clock in (1200.0, 1400.0) for repeat in (0, 1)]
    found = asked(table_of(cells, groups), per_group=True)
    made = json.loads(json.dumps(schedule(found)))
    (rate,) = made["rates"]
    assert {group: entry["freq_mhz"] for group, entry in rate["groups"].items()} == {"SS": 1400, "LL": 1200}
    entry = rate["groups"]["LL"]
    assert entry["energy_per_request_j"] == pytest.approx(52.5)
    low, high = entry["energy_interval_j"]
    assert low <= 52.5 <= high
    assert entry["verdict"] == "clear"
    assert made["simulated"] is True
    assert (made["schema_version"], made["kind"]) == (1, "wattrace-schedule")


def test_watts_and_gpu_hours_know_no_buckets(table_of):
    for name in ("power", "cost"):
        with pytest.raises(AnalysisError, match="is of the GPUs as a whole and not of a bucket"):
            asked(table_of([{}]), name, per_group=True)


def test_a_table_of_other_objectives_is_refused(table_of):
    with pytest.raises(AnalysisError, match="other latency objectives"):
        recommend(table_of([{}], slo=Slo({})), WANTED)


def test_its_tables_fit_a_terminal(table_of, terminal):
    long = {"standing": "invalid", "invalid_because": ["dispatch_lag: " + "40 ms of lag and so on " * 5]}
    rows = [*known(), *cells_of([1e6], tp=8, batch_cap=128, power_cap_w=450.0, **long)]
    found = asked(table_of([*rows, *({**row, "rate_rps": 12.5} for row in rows)]))
    for headings, cells in (loser_rows(found, found.answers[0]), answer_rows(found)):
        lines = terminal(lambda h=headings, c=cells: print_table(h, c, left=[True] * len(h), wrap=True))
        assert max(map(len, lines)) <= 80, lines


def test_what_it_says_is_json(table_of):
    found = asked(table_of(known()), "cost")
    text = json.dumps(document(found, 2.5), allow_nan=False)
    assert json.loads(text)["answers"][0]["best"]["cost_per_1000_requests"] == pytest.approx(2 * 2.5 / 3.6)


@pytest.mark.parametrize(
    ("text", "bounds", "tail"),
    [
        ("ttft:250,tbt:100", {"ttft": (250.0,) * 3, "tpot": (100.0,) * 3}, None),
        ("ttft:250,400,2000,tbt:100", {"ttft": (250.0, 400.0, 2000.0), "tpot": (100.0,) * 3}, None),
        ("ttft:0.25s , e2e:5s", {"ttft": (250.0,) * 3, "e2el": (5000.0,) * 3}, None),
        ("tbt:100ms,tbt_p99:200", {"tpot": (100.0,) * 3}, 200.0),
    ],
)
def test_objectives_are_read(text, bounds, tail):
    wanted = parse_wanted(text)
    assert {name: pytest.approx(value) for name, value in bounds.items()} == dict(wanted.slo.bounds_ms)
    assert wanted.tbt_p99_ms == tail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttfb:250", "'ttfb' is not one of ttft, tbt"),
        ("250", "give NAME:MS"),
        ("", "give NAME:MS"),
        ("ttft:250min", "'250min', not a positive number of ms"),
        ("ttft:-1", "not a positive number of ms"),
        ("ttft:0", "not a positive number of ms"),
        ("ttft:nan", "not a positive number of ms"),
        ("ttft:1,2", "has 2 values"),
        ("ttft:1,ttft:2", "given twice"),
        ("tbt:1,tpot:2", "are the same"),
        ("tbt_p99:1,2,3", "takes one value"),
    ],
)
def test_objectives_that_are_wrong_are_refused_with_what_to_write(text, words):
    with pytest.raises(AnalysisError, match=words):
        parse_wanted(text)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_an_attainment_is_a_share(share):
    with pytest.raises(AnalysisError, match="--attainment"):
        parse_wanted(None, share)
