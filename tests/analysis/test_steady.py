"""Where a run is steady: queues whose truth is known."""

import numpy as np
import polars as pl
import pytest

from analysis.buckets import bucket_table
from analysis.requests import request_table
from analysis.saved import RunEnergy
from analysis.serving import Question, only_steady, serving, steady_part
from analysis.steady import find_steady, mser, trend
from tracegen.errors import AnalysisError

NO_ENERGY = RunEnergy(None, None, why="not asked for")


def served(rate, servers, duration_s, seed, stay_s=10.0):
    """Send and end times in ns of Poisson arrivals at as many servers, first come, first served."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * duration_s)
    sent = np.sort(rng.uniform(0, duration_s, count))
    work = rng.lognormal(np.log(stay_s) - 0.18, 0.6, count)
    free, gone = np.zeros(servers), np.empty(count)
    for i in range(count):
        place = int(np.argmin(free))
        free[place] = gone[i] = max(sent[i], free[place]) + work[i]
    return (sent * 1e9).astype(np.int64), (gone * 1e9).astype(np.int64)


def test_a_ramp_up_is_cut_off_and_most_of_a_steady_load_kept():
    # In a system that begins empty the load is within 1 % of its mean after a few stays of 10 s.
    starts, kept = [], []
    for seed in range(10):
        found = find_steady(*served(5.0, 500, 600.0, seed))
        if found.why is None:
            starts.append(found.start_s)
            kept.append((found.end_s - found.start_s) / found.sent_s)
            assert found.in_flight == pytest.approx(50, rel=0.2)
    assert len(kept) >= 9
    assert 3 <= np.median(starts) <= 60
    assert np.median(kept) > 0.8


def test_a_queue_that_grows_throughout_has_no_steady_state():
    for seed in range(5):
        found = find_steady(*served(15.0, 100, 300.0, seed))
        assert found.start_ns is None
        assert "no steady state: the queue grows throughout" in found.why
        assert "requests/s are sent and" in found.why


def test_a_load_that_jumps_in_the_middle_does_not_settle():
    slow, fast = served(3.0, 500, 300.0, 1), served(9.0, 500, 300.0, 2)
    both = [np.concatenate([a, b + 300 * 10**9]) for a, b in zip(slow, fast, strict=True)]
    found = find_steady(*both)
    assert "no steady state" in found.why


def test_too_little_to_tell_is_said():
    sent, gone = served(5.0, 500, 60.0, 1)
    assert "a longer run would tell" in find_steady(sent, gone).why
    assert "too few" in find_steady(sent[:40], gone[:40]).why
    assert "at one moment" in find_steady(np.zeros(60, np.int64), np.full(60, 10**9)).why


def test_the_order_of_requests_does_not_matter():
    sent, gone = served(5.0, 500, 600.0, 3)
    shuffled = np.random.default_rng(0).permutation(sent.size)
    assert find_steady(sent[shuffled], gone[shuffled]) == find_steady(sent, gone)


def test_mser_cuts_where_a_step_ends_and_trend_sees_a_slope():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(200)
    assert mser(noise + np.where(np.arange(200) < 30, -40, 0)) in range(30, 40)
    assert mser(noise + np.linspace(0, 100, 200)) is None
    assert not trend(100 + noise)
    assert trend(100 + noise + np.linspace(0, 60, 200))


@pytest.fixture
def steady_run(run_of, rewrite):
    """A made-up run with requests of a queue: steady but for its beginning."""
    run = run_of()
    sent, gone = served(5.0, 500, 600.0, 0)
    row = run.scan("requests").head(1).collect()
    zero = run.manifest["measure_start_ns"]
    table = pl.concat([row] * sent.size).with_columns(
        pl.Series("request_id", np.arange(sent.size), pl.UInt64),
        *(pl.Series(name, sent + zero, pl.Int64) for name in ("scheduled_ns", "sent_ns", "first_token_ns")),
        *(pl.Series(name, gone + zero, pl.Int64) for name in ("last_token_ns", "done_ns")),
    )
    return rewrite(run, {"measure_end_ns": zero + int(gone.max())}, requests=table)


def test_the_steady_part_is_what_was_sent_in_it(steady_run):
    found, _ = steady_part(steady_run)
    window = only_steady(steady_run, found)
    mine = request_table(steady_run).filter(pl.col("sent_ns").is_between(*window, closed="left"))
    answer = serving(steady_run, NO_ENERGY, Question(steady=True))
    assert 0 < mine.height < request_table(steady_run).height
    assert answer.whole["requests"] == mine.height
    assert answer.whole["request_rate"] == pytest.approx(mine.height / (found.end_s - found.start_s))
    assert answer.document()["window"]["kind"] == "steady"
    assert bucket_table(steady_run, None, sent_ns=window)["requests"][-1] == mine.height


def test_a_difference_between_the_steady_part_and_the_whole_is_said(steady_run, rewrite):
    assert not any("--steady" in remark for remark in serving(steady_run, NO_ENERGY).remarks)
    found, _ = steady_part(steady_run)
    late = pl.when(pl.col("sent_ns") < found.start_ns).then(pl.col("sent_ns") + 10**9).otherwise("sent_ns")
    slow = steady_run.scan("requests").with_columns(late.alias("first_token_ns")).collect()
    answer = serving(rewrite(steady_run, requests=slow), NO_ENERGY, Question(percentiles=(50, 99.9)))
    assert any("TTFT p99.9 is 0 ms there and 1,000 ms over all" in remark for remark in answer.remarks)


def test_asking_for_a_steady_part_that_is_not_there_is_an_error(run_of):
    with pytest.raises(AnalysisError, match=r"no steady state: .*without --steady"):
        serving(run_of(), NO_ENERGY, Question(steady=True))
