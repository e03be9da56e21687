import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.describe import rate_rps
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.schema import file_sha256, read_metadata, write_trace
from tracegen.synthesize import synthesize
from tracegen.transform import cut, scale, scale_trace, slice_trace

MINUTE_NS = 60 * NS_PER_S


@pytest.fixture(scope="module")
def chat():
    """About 3000 requests at 5/s."""
    return synthesize("chat", 5.0, 10 * MINUTE_NS, 1)[0]


def bursty(seed):
    """Bursts of 20 requests within a second, one a minute."""
    stream = np.random.default_rng(seed)
    arrival_ns = np.sort(np.concatenate([m * MINUTE_NS + stream.integers(0, NS_PER_S, 20) for m in range(30)]))
    n = arrival_ns.size
    return pl.DataFrame(
        {
            "request_id": np.arange(n),
            "arrival_ns": arrival_ns,
            "input_tokens": np.arange(1, n + 1),
            "output_tokens": [1] * n,
        }
    )


def test_rate_is_the_reciprocal_of_the_mean_gap(make_frame):
    assert rate_rps(make_frame([7, 7 + 10**9, 7 + 4 * 10**9])) == pytest.approx(0.5)
    assert rate_rps(make_frame([5, 5])) is None
    assert rate_rps(make_frame([5])) is None


@given(st.floats(0.02, 1.0), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_thinning_keeps_whole_rows_in_order(fraction, seed):
    frame = bursty(0)
    thin, done = scale(frame, fraction * rate_rps(frame), seed)
    assert done["method"] == "thinning"
    assert done["keep_probability"] == pytest.approx(fraction)
    kept = frame.filter(pl.col("request_id").is_in(thin["request_id"].to_list()))
    assert kept.equals(thin.cast(frame.schema))
    assert abs(thin.height - fraction * frame.height) <= 6 * math.sqrt(frame.height * fraction * (1 - fraction)) + 1e-9


def test_thinning_is_independent_from_row_to_row(chat):
    """The number kept varies as a binomial count does; taking every k-th row would make it constant."""
    kept = np.array([scale(chat, 2.0, seed)[0].height for seed in range(300)])
    p = 2.0 / rate_rps(chat)
    assert kept.mean() == pytest.approx(p * chat.height, abs=4 * math.sqrt(chat.height * p * (1 - p) / 300))
    assert 0.75 < kept.var(ddof=1) / (chat.height * p * (1 - p)) < 1.3


def test_the_same_rate_is_the_same_trace(chat):
    assert scale(chat, rate_rps(chat), 1)[0].equals(chat)


@given(st.floats(1.001, 6.0), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_superposing_overlays_whole_copies_within_the_span(ratio, seed):
    frame = bursty(0)
    target = ratio * rate_rps(frame)
    busy, done = scale(frame, target, seed)
    assert done["method"] == "superposing"
    assert done["whole_copies"] + done["thinned_copy_keep_probability"] == pytest.approx(ratio)
    assert busy["request_id"].to_list() == list(range(busy.height))
    assert busy["arrival_ns"].is_sorted()
    # Every request is there once for each whole copy, and at most once more.
    times = busy["input_tokens"].value_counts()["count"]
    assert times.len() == frame.height
    assert set(times) <= {done["whole_copies"], done["whole_copies"] + 1}
    # The original is among the copies, untouched.
    pairs = set(busy.select("arrival_ns", "input_tokens").iter_rows())
    assert set(frame.select("arrival_ns", "input_tokens").iter_rows()) <= pairs
    # Copies stay on the circle: the span and one mean gap.
    first, last = frame["arrival_ns"][0], frame["arrival_ns"][-1]
    assert busy["arrival_ns"][0] >= first
    assert busy["arrival_ns"][-1] <= last + NS_PER_S / rate_rps(frame) + 1
    part = done["thinned_copy_keep_probability"]
    slack = 6 * math.sqrt(frame.height * part * (1 - part)) + 1e-6
    assert abs(busy.height - ratio * frame.height) <= slack


def test_superposing_reaches_the_rate(chat):
    busy, done = scale(chat, 33.0, 2)
    assert rate_rps(busy) == done["rate_after_rps"] == pytest.approx(33.0, rel=0.02)
    assert done["rate_before_rps"] == rate_rps(chat)


def test_copies_are_shifted_apart():
    """Unshifted copies would make each burst 4 times as large, instead of 4 times as many bursts."""
    frame = bursty(0)
    busy, _ = scale(frame, 4 * rate_rps(frame), 3)
    largest = busy.group_by(pl.col("arrival_ns") // NS_PER_S).len()["len"].max()
    assert largest <= 40


def test_same_seed_same_rows_other_seed_others(chat):
    for rate in (2.0, 12.0):
        first, again, other = (scale(chat, rate, seed)[0] for seed in (1, 1, 2))
        assert first.equals(again)
        assert not first.equals(other)


def test_optional_and_unknown_columns_come_along(chat):
    wide = chat.with_columns(model=pl.lit("m"), note=pl.lit(1))
    for rate in (2.0, 12.0):
        assert scale(wide, rate, 1)[0].columns == [*chat.columns[:4], "model", "label", "note"]


def test_rates_that_cannot_be(chat, make_frame):
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TraceError, match="not a positive number"):
            scale(chat, rate, 1)
    with pytest.raises(TraceError, match="has no rate to scale from"):
        scale(make_frame([5, 5]), 1.0, 1)
    with pytest.raises(TraceError, match="kept none"):
        scale(make_frame(), 1e-9, 1)
    with pytest.raises(TraceError, match="at most 20,000,000"):
        scale(chat, 1e9, 1)


@pytest.mark.parametrize("column", ["session_id", "parent_id", "think_ns"])
def test_sessions_are_not_torn(make_frame, column):
    frame = make_frame(**{column: [1, None, 1]})
    for change in (lambda f: scale(f, 0.5, 1), lambda f: scale(f, 5.0, 1), lambda f: cut(f, 0, NS_PER_S)):
        with pytest.raises(TraceError, match=f"column '{column}': its requests depend on each other"):
            change(frame)


def test_copies_do_not_share_prefixes(make_frame):
    frame = make_frame(prefix_hashes=[[1], [1], [2]])
    with pytest.raises(TraceError, match="cannot scale up a trace with column 'prefix_hashes'"):
        scale(frame, 5.0, 1)
    assert scale(frame, 1.0, 1)[0].height == 3


@given(st.integers(0, 40 * MINUTE_NS), st.integers(1, 40 * MINUTE_NS))
@settings(max_examples=60, deadline=None)
def test_a_slice_holds_what_arrives_in_it(start_ns, duration_ns):
    frame = bursty(0)
    inside = [
        (i, t - start_ns)
        for i, t in frame.select("request_id", "arrival_ns").iter_rows()
        if 0 <= t - start_ns < duration_ns
    ]
    if not inside:
        with pytest.raises(TraceError, match="no request arrives in the"):
            cut(frame, start_ns, duration_ns)
    else:
        assert list(cut(frame, start_ns, duration_ns).select("request_id", "arrival_ns").iter_rows()) == inside


def test_a_slice_may_reach_beyond_what_64_bits_hold(make_frame):
    assert cut(make_frame(), NS_PER_S, 2**63 - 1)["arrival_ns"].to_list() == [0, NS_PER_S]


def test_metadata_lead_back_to_the_origin(chat, tmp_path):
    write_trace(chat, tmp_path / "chat.parquet", {"generator": "tracegen synth", "seed": 1, "block_tokens": 16})
    frame, metadata = scale_trace(tmp_path / "chat.parquet", 2.0, 7)
    write_trace(frame, tmp_path / "thin.parquet", metadata)
    part, of_part = slice_trace(tmp_path / "thin.parquet", MINUTE_NS, MINUTE_NS)
    assert part.equals(cut(frame, MINUTE_NS, MINUTE_NS))
    assert of_part["generator"] == "tracegen slice"
    assert of_part["parameters"] == {"start_ns": MINUTE_NS, "duration_ns": MINUTE_NS}
    assert of_part["block_tokens"] == 16
    thin = of_part["source"]
    assert (thin["file"], thin["sha256"]) == ("thin.parquet", file_sha256(tmp_path / "thin.parquet"))
    assert thin["metadata"]["seed"] == 7
    assert thin["metadata"]["parameters"]["method"] == "thinning"
    assert thin["metadata"]["source"]["metadata"] == read_metadata(tmp_path / "chat.parquet")
