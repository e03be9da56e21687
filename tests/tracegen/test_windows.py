import tracemalloc
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracegen.windows
import tracegen.workload
from tracegen.prefixes import HitTally
from tracegen.schema import read_metadata, read_trace
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize, synthesize_file
from tracegen.windows import windows
from tracegen.workload import Workload, make_plan

S = 10**9
MODELS = ["poisson", "constant", "gamma:cv=3", "weibull:cv=0.5", "mmpp", "log-ou:tau=20", "on-off", "clients:n=9"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows of so few rows that a small trace has many."""
    monkeypatch.setattr(tracegen.workload, "WINDOW_ROWS", 150)
    monkeypatch.setattr(tracegen.windows, "PREFIX_ROWS", 70)


@given(
    st.sampled_from(["chat", "code:1,chat:2"]),
    st.sampled_from([4.0, "1..6", "0,5,2:70s"]),
    st.sampled_from(MODELS),
    st.sampled_from([None, "code-day@3h"]),
    st.sampled_from([None, Structure(clients=5, system_prompts=2, system_tokens=300), Structure(turns=3, think_s=4)]),
    st.integers(0, 2**64),
    st.integers(1, 7),
)
@settings(max_examples=25)
def test_shards_are_the_whole(mix, rate, arrivals, profile, structure, seed, count):
    if arrivals.startswith("clients") and structure is not None:
        structure = replace(structure, clients=0)  # the model has its own
    options = {"arrivals": arrivals, "profile": profile, "structure": structure}
    cuts = [(1, 1), *((k, count) for k in range(1, count + 1))]
    plans = [make_plan(Workload(mix, rate, 300 * S, seed, shard=cut, **options)) for cut in cuts]
    whole, *shards = [list(windows(plan, HitTally(64))) for plan in plans]
    assert plans[0].window_ns < 300 * S / 2  # or there would be nothing to join
    assert pl.concat([frame for shard in shards for frame in shard]).equals(pl.concat(whole))
    ids = pl.concat(whole)["request_id"]
    assert ids.is_unique().all()
    for k, shard in enumerate(shards):
        times = [frame["arrival_ns"] for frame in shard]
        assert all(t.is_sorted() and t[0] >= 300 * S * k // count and t[-1] < 300 * S * (k + 1) // count for t in times)


def test_a_shard_is_made_without_the_rest(monkeypatch):
    """The last of a hundred parts draws lengths for its own window and no other."""
    made = []
    original = tracegen.windows.sample_lengths
    monkeypatch.setattr(tracegen.windows, "sample_lengths", lambda *a: made.append(a[3]) or original(*a), raising=True)
    synthesize("chat", 5.0, 3000 * S, 1, arrivals="log-ou", shard=(100, 100))
    assert 1 <= len(made) <= 2
    assert min(made) > 90


@pytest.mark.parametrize("structure", [None, Structure(turns=3, think_s=5)])
def test_a_file_is_what_is_made_in_memory(tmp_path, structure):
    workload = Workload("chat:1,code:1", 5.0, 300 * S, 3, "gamma", structure=structure)
    figures = synthesize_file(tmp_path / "a.parquet", workload)
    frame, metadata = synthesize("chat:1,code:1", 5.0, 300 * S, 3, arrivals="gamma", structure=structure)
    assert read_trace(tmp_path / "a.parquet").equals(frame)
    assert read_metadata(tmp_path / "a.parquet") == {"schema_version": "1.0", **metadata}
    assert figures["requests"] == frame.height
    assert figures["input_tokens"]["mean"] == pytest.approx(frame["input_tokens"].mean())
    first = (tmp_path / "a.parquet").read_bytes()
    synthesize_file(tmp_path / "a.parquet", workload)
    assert (tmp_path / "a.parquet").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_memory_does_not_grow_with_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(tracegen.workload, "WINDOW_ROWS", 5_000)
    peaks = []
    for rows in (20_000, 20_000, 200_000):  # the first warms up
        tracemalloc.start()
        synthesize_file(tmp_path / "t.parquet", Workload("chat", 100.0, rows // 100 * S, 1, "log-ou"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def test_windows_of_one_seed_are_independent():
    whole = synthesize("chat", 5.0, 6000 * S, 1)[0]
    inputs = whole["input_tokens"].to_numpy()
    windows_of = whole["request_id"].to_numpy() >> 32
    a, b = inputs[windows_of == 3][:100], inputs[windows_of == 4][:100]
    assert a.size == b.size == 100
    assert (a != b).any()
