import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.errors import TraceError
from tracegen.lengths import load_mix
from tracegen.prefixes import block_hashes, hit_rate, mixed
from tracegen.sessions import ASSUMED_NS_A_TOKEN, Structure, system_lengths
from tracegen.synthesize import synthesize

S = 10**9
STRUCTURES = st.builds(
    Structure,
    clients=st.sampled_from([0, 7]),
    turns=st.sampled_from([1.0, 1.5, 4.0]),
    think_s=st.sampled_from([1.0, 30.0]),
    max_context=st.sampled_from([4000, 131_072]),
    system_prompts=st.sampled_from([0, 1, 5]),
    system_tokens=st.sampled_from([100, 700]),
    system_sigma=st.sampled_from([0.0, 1.5]),
    block_tokens=st.sampled_from([16, 64, 512]),
)


@given(STRUCTURES, st.sampled_from(["chat", "chat:2,code:1"]), st.integers(0, 2**32))
@settings(max_examples=40)
def test_what_ties_requests_together_is_whole(structure, mix, seed):
    frame, metadata = synthesize(mix, 3.0, 120 * S, seed, structure=structure)
    assert ("client_id" in frame.columns) == (structure.clients > 0)
    if structure.clients:
        assert frame["client_id"].max() < structure.clients
    if structure.has_sessions:
        parents = frame.select(
            pl.col("request_id").alias("parent_id"),
            *(pl.col(name).alias(f"{name}_before") for name in ("arrival_ns", "session_id", "label")),
            *(pl.col(f"{side}_tokens").cast(pl.Int64).alias(f"{side}_before") for side in ("input", "output")),
        )
        turns = frame.join(parents, on="parent_id")
        assert turns.height == frame["parent_id"].count() == frame["think_ns"].count()
        assert turns["session_id"].equals(turns["session_id_before"])
        assert turns["label"].equals(turns["label_before"])
        assert turns["parent_id"].is_unique().all()
        # What was said before is in the input, with one token or more of its own; and it takes its time.
        assert (turns["input_tokens"] > turns["input_before"] + turns["output_before"]).all()
        due_ns = turns["arrival_ns_before"] + turns["output_before"] * ASSUMED_NS_A_TOKEN + turns["think_ns"]
        assert (turns["arrival_ns"] == due_ns).all()
        assert (turns["input_tokens"].cast(pl.Int64) + turns["output_tokens"] <= structure.max_context).all()
    assert ("prefix_hashes" in frame.columns) == structure.has_prefixes == ("prefix_hit_rate" in metadata)
    if structure.has_prefixes:
        assert metadata["block_tokens"] == structure.block_tokens
        assert (frame["prefix_hashes"].list.len() <= frame["input_tokens"] // structure.block_tokens).all()
        assert metadata["prefix_hit_rate"] == pytest.approx(hit_rate(frame, structure.block_tokens))


def test_a_turn_begins_with_the_blocks_of_the_turn_before():
    frame, _ = synthesize("chat", 3.0, 300 * S, 1, structure=Structure(turns=5, think_s=5))
    blocks = dict(frame.select("request_id", "prefix_hashes").iter_rows())
    turns = frame.filter(pl.col("parent_id").is_not_null())
    assert turns.height > 100
    for parent, own in turns.select("parent_id", "prefix_hashes").iter_rows():
        assert own[: len(blocks[parent])] == blocks[parent]


def test_sessions_share_system_prompts_and_nothing_else():
    structure = Structure(turns=2, think_s=5, system_prompts=3, system_tokens=200)
    frame, _ = synthesize("chat", 3.0, 200 * S, 1, structure=structure)
    rows = frame.select("session_id", pl.col("prefix_hashes").alias("block")).with_row_index()
    rows = rows.explode("block").drop_nulls().with_columns(place=pl.int_range(pl.len()).over("index"))
    of_many = rows.group_by("block").agg(pl.col("session_id").n_unique(), pl.col("place").unique())
    assert of_many["place"].list.len().max() == 1  # a block is the same block everywhere
    shared = of_many.filter(pl.col("session_id") > 1)
    assert shared.height == 3 * (200 // 64)
    assert shared["place"].list.first().max() == 200 // 64 - 1


def test_the_rate_counts_requests_from_the_start():
    """Sessions that began before the trace are in it, so its first minute is as busy as its last."""
    structure = Structure(turns=6, think_s=30, think_sigma=0.5)
    firsts, alls = [], []
    for seed in range(12):
        arrival_ns = synthesize("code", 5.0, 600 * S, seed, structure=structure)[0]["arrival_ns"]
        firsts.append((arrival_ns < 60 * S).sum())
        alls.append(arrival_ns.len())
    assert np.mean(alls) == pytest.approx(3000, rel=0.05)
    assert np.mean(firsts) == pytest.approx(300, rel=0.12)


def test_turns_and_thinks_are_as_asked():
    structure = Structure(turns=4, think_s=20, think_sigma=0.7)
    frame, _ = synthesize("code", 5.0, 4000 * S, 1, structure=structure)
    think_s = frame["think_ns"].drop_nulls().to_numpy() / S
    assert np.median(think_s) == pytest.approx(20, rel=0.05)
    assert np.log(think_s).std() == pytest.approx(0.7, rel=0.05)
    whole = (
        frame.filter(pl.col("arrival_ns") > 1000 * S).group_by("session_id").agg(pl.col("parent_id").first(), pl.len())
    )
    turns = whole.filter(pl.col("parent_id").is_null())["len"].to_numpy()
    assert np.mean(turns) == pytest.approx(4, rel=0.12)


def test_system_prompts_have_lengths_of_their_own():
    structure = Structure(system_prompts=5000, system_tokens=400, system_sigma=0.8)
    numbers = np.arange(5000, dtype=np.uint64) | np.uint64(2**63)
    lengths = system_lengths(structure, numbers)
    assert np.median(lengths) == pytest.approx(400, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.05)
    assert system_lengths(structure, numbers[[7, 9, 7]]).tolist() == lengths[[7, 9, 7]].tolist()


def test_without_sessions_lengths_are_the_mixes():
    plain = synthesize("chat", 3.0, 300 * S, 1)[0]
    shared, metadata = synthesize("chat", 3.0, 300 * S, 1, structure=Structure(system_prompts=2, system_tokens=600))
    assert shared.select(plain.columns).equals(plain)
    known = np.minimum(600, shared["input_tokens"].to_numpy() - 1) // 64 * 64
    assert shared["prefix_hashes"].list.len().to_list() == (known // 64).tolist()
    assert metadata["prefix_hit_rate"] == pytest.approx(known.sum() / shared["input_tokens"].sum(), abs=0.002)


def test_a_session_ends_at_the_context():
    small = load_mix("code").high[0] + load_mix("code").high[1]
    frame, _ = synthesize("code", 3.0, 300 * S, 1, structure=Structure(turns=50, think_s=1, max_context=small))
    assert (frame["input_tokens"] + frame["output_tokens"]).max() <= small


def test_where_the_context_ends_sessions_the_rate_stays():
    """Fewer turns a session then, and more sessions."""
    structure = Structure(turns=8, think_s=1, max_context=3000)
    counts = [synthesize("LS", 4.0, 500 * S, seed, structure=structure)[0].height for seed in range(4)]
    assert np.mean(counts) == pytest.approx(2000, rel=0.05)
    counts = [synthesize("chat", 4.0, 500 * S, seed, structure=structure)[0].height for seed in range(8)]
    assert np.mean(counts) == pytest.approx(2000, rel=0.05)


def test_hashes_are_whose_and_where():
    owner, common = np.array([1, 1, 2], np.uint64), np.array([9, 8, 9], np.uint64)
    a, b, c = block_hashes(owner, np.array([3, 4, 0]), common, np.array([1, 1, 0])).to_list()
    assert (len(a), len(b), c) == (3, 4, [])
    assert a[0] != b[0]
    assert a[1:] == b[1:3]
    assert mixed(np.arange(1000, dtype=np.uint64)).size == np.unique(mixed(np.arange(1000, dtype=np.uint64))).size


def test_the_hit_rate_by_hand():
    frame = pl.DataFrame(
        {"prefix_hashes": [[1, 2], [1, 2, 3], [4, 2], [], [1, 9]], "input_tokens": [25, 35, 25, 5, 20]},
        schema_overrides={"prefix_hashes": pl.List(pl.UInt64)},
    )
    # The second row finds 1 and 2, the last one 1; 2 behind an unknown block is no prefix.
    assert hit_rate(frame, 10) == pytest.approx(30 / 110)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"turns": 0.5}, "turns is 0.5, not a mean from 1"),
        ({"think_s": 0.0}, "think_s is 0.0, not a positive time"),
        ({"clients": -1}, "clients is -1"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"max_context": 1}, "max_context is 1"),
        ({"system_tokens": -1}, "system_tokens is -1"),
        ({"system_sigma": -1.0}, "system_sigma is -1"),
    ],
)
def test_what_cannot_be_is_named(change, says):
    with pytest.raises(TraceError, match=says):
        Structure(**change)
