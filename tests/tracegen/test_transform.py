import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.describe import dispersion, rate_rps
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.prefixes import hit_rate
from tracegen.schema import check_trace, file_sha256, read_metadata, write_trace
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize
from tracegen.transform import (
    chain,
    clamp,
    cut,
    merge,
    merge_traces,
    relabel,
    repeat,
    sample,
    scale,
    scale_trace,
    slice_trace,
    warp,
)

MINUTE_NS = 60 * NS_PER_S


@pytest.fixture(scope="module")
def chat():
    """About 3000 requests at 5/s."""
    return synthesize("chat", 5.0, 10 * MINUTE_NS, 1)[0]


@pytest.fixture(scope="module")
def talks():
    """About 1200 turns of 400 sessions of 20 clients, with prefix hashes of 64 tokens a block."""
    structure = Structure(turns=3, think_s=20.0, clients=20)
    return synthesize("chat", 4.0, 5 * MINUTE_NS, 1, structure=structure)[0]


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


def assert_whole(frame, all_of_them=None):
    """Parents are there, earlier and in the same session; with `all_of_them`, sessions have all their turns."""
    turns = frame.filter(pl.col("parent_id").is_not_null())
    parents = frame.select(
        pl.col("request_id").alias("parent_id"),
        pl.col("session_id").alias("same"),
        pl.col("arrival_ns").alias("before"),
    )
    joined = turns.join(parents, on="parent_id", how="left")
    assert joined["same"].equals(joined["session_id"], check_names=False)
    assert (joined["before"] <= joined["arrival_ns"]).all()
    if all_of_them is not None:
        sizes = dict(all_of_them["session_id"].value_counts().iter_rows())
        assert all(count == sizes[number] for number, count in frame["session_id"].value_counts().iter_rows())


def test_thinning_and_sampling_take_whole_sessions(talks):
    thin, _ = scale(talks, rate_rps(talks) / 2, 1)
    assert_whole(thin, talks)
    assert 0.35 < thin.height / talks.height < 0.65
    few = sample(talks, 100, 1)
    assert_whole(few, talks)
    assert 80 < few.height <= 100


def test_copies_of_sessions_are_other_sessions_with_other_prefixes(talks):
    busy, _ = scale(talks, 3 * rate_rps(talks), 2)
    assert_whole(busy)
    assert busy["request_id"].n_unique() == busy.height
    # Sessions that the turn cut in two count twice, no session is mixed up with another.
    assert busy["session_id"].n_unique() >= 3 * talks["session_id"].n_unique()
    assert busy.group_by("session_id").len()["len"].max() <= talks.group_by("session_id").len()["len"].max()
    # Nobody hits the cache of another copy, so the share of what is known stays.
    assert hit_rate(busy, 64) == pytest.approx(hit_rate(talks, 64), abs=0.02)


def test_turns_without_sessions_are_refused(make_frame):
    frame = make_frame(parent_id=[None, 0, 1])
    for change in (lambda: scale(frame, 0.5, 1), lambda: sample(frame, 1, 1), lambda: repeat(frame, 2, 1)):
        with pytest.raises(TraceError, match="no session_id that says which turns belong together"):
            change()


def test_a_slice_leaves_no_turn_without_its_parent(talks):
    part = cut(talks, MINUTE_NS, 3 * MINUTE_NS)
    assert_whole(part)
    orphans = part.filter(pl.col("parent_id").is_null())["request_id"]
    assert talks.filter(pl.col("request_id").is_in(orphans.implode()) & pl.col("parent_id").is_not_null()).height > 0
    assert part.filter(pl.col("parent_id").is_null())["think_ns"].null_count() == orphans.len()


@given(st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_a_warp_changes_times_only(time_scale):
    frame = bursty(0)
    warped = warp(frame, time_scale)
    assert warped.drop("arrival_ns").equals(frame.drop("arrival_ns"))
    assert warped["arrival_ns"].is_sorted()
    assert rate_rps(warped) == pytest.approx(rate_rps(frame) / time_scale, rel=1e-6)


def test_warped_users_think_as_much_longer(make_frame):
    frame = make_frame(session_id=[1, 1, 1], parent_id=[None, 0, 1], think_ns=[None, 10, 30])
    assert warp(frame, 2.0)["think_ns"].to_list() == [None, 20, 60]
    for scale_ in (0.0, -1.0, math.nan, 1e300):
        with pytest.raises(TraceError, match="time scale"):
            warp(frame, scale_)


@given(st.integers(2, 2000), st.sampled_from(["drop", "clip"]))
@settings(max_examples=40, deadline=None)
def test_clamped_requests_fit(max_context, how):
    frame = bursty(1).with_columns(output_tokens=pl.col("input_tokens") // 3 + 1)
    clamped, changed = clamp(frame, max_context, how)
    total = clamped["input_tokens"].cast(pl.Int64) + clamped["output_tokens"]
    assert total.max() <= max_context
    assert min(clamped["input_tokens"].min(), clamped["output_tokens"].min()) >= 1
    fits = frame["input_tokens"] + frame["output_tokens"] <= max_context
    assert changed == (~fits).sum()
    kept = clamped.filter(pl.col("request_id").is_in(frame.filter(fits)["request_id"].implode()))
    assert (
        kept.select("input_tokens", "output_tokens")
        .cast(pl.Int64)
        .equals(frame.filter(fits).select("input_tokens", "output_tokens").cast(pl.Int64))
    )


def test_dropping_a_turn_drops_those_that_build_on_it(make_frame):
    frame = make_frame(
        range(4), session_id=[1, 1, 1, 2], parent_id=[None, 0, 1, None], input_tokens=[5, 99, 6, 7]
    ).with_columns(pl.col("input_tokens").cast(pl.UInt32))
    assert clamp(frame, 50, "drop")[0]["request_id"].to_list() == [0, 3]
    with pytest.raises(TraceError, match="no request fits"):
        clamp(frame, 3, "drop")


def test_clipped_prefixes_end_with_their_input(make_frame):
    frame = make_frame([1, 2], input_tokens=[100, 10], prefix_hashes=[[1, 2, 3, 4, 5, 6], [1]])
    clipped, changed = clamp(frame.cast({"input_tokens": pl.UInt32}), 50, "clip", block_tokens=16)
    assert changed == 1
    assert clipped["input_tokens"].to_list() == [40, 10]
    assert clipped["prefix_hashes"].to_list() == [[1, 2], [1]]


def test_a_sample_has_as_many_as_asked_for_in_their_order(chat):
    few = sample(chat, 500, 3)
    assert few.height == 500
    assert chat.filter(pl.col("request_id").is_in(few["request_id"].implode())).equals(few)
    assert not few.equals(sample(chat, 500, 4))
    with pytest.raises(TraceError, match="cannot sample"):
        sample(chat, chat.height + 1, 1)


def test_a_merge_holds_every_request_and_mixes_nothing_up(talks, chat):
    both = merge([talks, chat, talks], ["a", "b", "c"])
    assert both.height == 2 * talks.height + chat.height
    assert both["request_id"].to_list() == list(range(both.height))
    assert_whole(both.filter(pl.col("session_id").is_not_null()))
    assert both["session_id"].drop_nulls().n_unique() == 2 * talks["session_id"].n_unique()
    assert both["client_id"].drop_nulls().n_unique() == 2 * talks["client_id"].n_unique()
    lengths = pl.concat([f.select("input_tokens", "output_tokens") for f in (talks, chat, talks)])
    assert sorted(both.select("input_tokens", "output_tokens").iter_rows()) == sorted(lengths.iter_rows())


def test_a_merge_labels_what_has_no_label(make_frame):
    both = merge([make_frame(), make_frame(label=["x", None, "x"])], ["one", "two"])
    assert sorted(both["label"]) == ["one", "one", "one", "two", "x", "x"]
    assert relabel(both, "y", only="x")[0]["label"].to_list().count("y") == 2
    assert set(relabel(both, "z")[0]["label"]) == {"z"}
    with pytest.raises(TraceError, match="the labels are one, two, x"):
        relabel(both, "y", only="q")
    with pytest.raises(TraceError, match="two traces or more"):
        merge([both], ["one"])


def test_a_repetition_begins_with_the_trace_and_goes_on_with_others(chat):
    longer = repeat(chat, 4, 1)
    first = longer.head(chat.height)
    assert first.drop("request_id").equals(chat.drop("request_id"))
    span = chat["arrival_ns"][-1] - chat["arrival_ns"][0]
    second = longer.filter(pl.col("arrival_ns") > chat["arrival_ns"][-1])
    # Other gaps, the same lengths in another order: neither is a copy.
    gaps = [set(f["arrival_ns"].diff().drop_nulls().to_list()) for f in (first, second.head(chat.height))]
    assert gaps[0] != gaps[1]
    assert not second["input_tokens"].head(100).equals(chat["input_tokens"].head(100))
    assert set(second["input_tokens"]) <= set(chat["input_tokens"])
    assert rate_rps(longer) == pytest.approx(rate_rps(chat), rel=0.06)
    assert 3.9 * span < longer["arrival_ns"][-1] < 4.1 * span
    assert repeat(chat, 4, 1).equals(longer)
    assert not repeat(chat, 4, 2).equals(longer)


def test_repeated_bursts_stay_bursts():
    frame = bursty(2)
    longer = repeat(frame, 3, 1)
    assert dispersion(longer["arrival_ns"], 1) == pytest.approx(dispersion(frame["arrival_ns"], 1), rel=0.2)


def test_repeated_sessions_stay_whole(talks):
    longer = repeat(talks, 3, 5)
    assert_whole(longer)
    # A longer trace cuts fewer sessions off, so that more of its tokens are known from turns before.
    structure = Structure(turns=3, think_s=20.0, clients=20)
    as_long = synthesize("chat", 4.0, 15 * MINUTE_NS, 2, structure=structure)[0]
    assert hit_rate(talks, 64) - 0.02 < hit_rate(longer, 64) < hit_rate(as_long, 64) + 0.02


@given(st.integers(0, 2**32), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_repeated_sessions_lose_no_turn_at_the_end(seed, times):
    """What would come after the end stands for what began before, behind the trace itself: so the rate stays."""
    sessions = pl.DataFrame({"session_id": range(40)})
    turns = [
        sessions.with_columns(
            arrival_ns=(pl.col("session_id") * 10 + later) * NS_PER_S,
            input_tokens=pl.lit(turn),
            output_tokens=pl.lit(1),
        )
        for turn, later in ((1, 0), (2, 150))
    ]
    frame = pl.concat(turns).sort("arrival_ns").with_row_index("request_id")
    longer = repeat(check_trace(frame, "frame"), times, seed)
    assert longer["request_id"].n_unique() == longer.height
    assert (longer["input_tokens"] == 1).sum() == (longer["input_tokens"] == 2).sum()
    end_ns = int(frame["arrival_ns"][0]) + times * round(80 / rate_rps(frame) * NS_PER_S)
    assert longer["arrival_ns"][-1] < end_ns


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


def test_columns_of_ones_own_are_kept(talks):
    """Whatever they are called: nothing here needs a name that a table is likely to have."""
    own = {name: pl.int_range(pl.len()) * 10 for name in ("number", "parent", "row", "unit", "over", "copy", "place")}
    frame = talks.with_columns(**own)
    for made in (
        scale(frame, 9.0, 1)[0],
        scale(frame, 2.0, 1)[0],
        repeat(frame, 2, 1),
        merge([frame, talks], ["a", "b"]),
    ):
        known = made.filter(pl.col("number").is_not_null())
        whole = known.join(frame.select("number", "input_tokens"), on="number", how="left", suffix=" then")
        assert whole["input_tokens"].equals(whole["input_tokens then"])
        assert all(made[name].equals(made["number"]) for name in own)
        assert_whole(made)


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


def test_the_chain_of_transforms_is_in_the_file(chat, tmp_path):
    write_trace(
        chat, tmp_path / "chat.parquet", {"generator": "tracegen synth", "seed": 1, "parameters": {"mix": "chat"}}
    )
    write_trace(*swap(scale_trace(tmp_path / "chat.parquet", 2.0, 7), tmp_path / "thin.parquet"))
    write_trace(*swap(slice_trace(tmp_path / "thin.parquet", 0, MINUTE_NS), tmp_path / "part.parquet"))
    steps = chain(read_metadata(tmp_path / "part.parquet"))
    assert [step["generator"] for step in steps] == ["tracegen synth", "tracegen scale", "tracegen slice"]
    assert steps[1] | {"parameters": 0} == {
        "generator": "tracegen scale",
        "parameters": 0,
        "seed": 7,
        "file": "chat.parquet",
    }
    merged = merge_traces([tmp_path / "part.parquet", tmp_path / "thin.parquet"])[1]
    assert chain(merged) == [
        {"generator": "tracegen merge", "parameters": {}, "files": ["part.parquet", "thin.parquet"]}
    ]
    assert len(chain(merged["sources"][0]["metadata"])) == 3


def swap(made, path):
    frame, metadata = made
    return frame, path, metadata


def test_blocks_of_different_lengths_are_not_merged(make_frame, tmp_path):
    for name, tokens in (("a", 16), ("b", 64)):
        frame = make_frame(prefix_hashes=[[1], [2], [3]])
        write_trace(frame, tmp_path / f"{name}.parquet", {"generator": "x", "block_tokens": tokens})
    with pytest.raises(TraceError, match="blocks of different lengths"):
        merge_traces([tmp_path / "a.parquet", tmp_path / "b.parquet"])
