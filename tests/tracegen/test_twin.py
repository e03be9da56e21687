import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from tracegen.describe import describe
from tracegen.durations import NS_PER_S
from tracegen.schema import write_trace
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize
from tracegen.twin import Bounds, beyond, compare, compare_traces, facts, ks_distance

MINUTE_NS = 60 * NS_PER_S


@pytest.fixture(scope="module")
def chat():
    return synthesize("chat", 5.0, 11 * MINUTE_NS, 1)


@pytest.fixture(scope="module")
def code():
    return synthesize("code", 9.0, 11 * MINUTE_NS, 2, arrivals="gamma:cv=3")


@given(st.lists(st.integers(0, 20), min_size=3), st.lists(st.integers(0, 20), min_size=3))
@settings(max_examples=60, deadline=None)
def test_the_distance_is_kolmogorov_and_smirnovs(a, b):
    a, b = (np.sort(np.array(x, dtype=float)) for x in (a, b))
    assert ks_distance(a, b) == pytest.approx(ks_2samp(a, b, method="asymp").statistic)


def test_a_trace_is_no_way_from_itself(chat):
    found = compare(facts(*chat), facts(*chat))["differences"]
    assert set(found["ks"].values()) == {0.0}
    assert set(found["dispersion_ratio"].values()) == {1.0}
    assert found["worst_bucket_error"] == found["spearman"] == 0.0
    assert beyond(found, Bounds(0.0, 0.0, 0.0, 1.0)) == []


def test_figures_are_those_of_describe_and_differences_have_their_sign(chat, code):
    found = compare(facts(*chat), facts(*code))
    for side, made in (("a", chat), ("b", code)):
        document = describe(*made)
        assert found[side]["index_of_dispersion"] == document["index_of_dispersion"]
        assert found[side]["rate_rps"] == document["rate_rps"]
        assert found[side]["buckets"]["LL"] == document["buckets"]["LL"]["share"]
    apart = found["differences"]
    assert apart["bucket_shares"]["LS"] > 0.3  # code has more of them
    assert apart["worst_bucket_error"] == max(abs(share) for share in apart["bucket_shares"].values())
    assert apart["dispersion_ratio"]["1s"] > 2
    assert apart["spearman"] == found["b"]["spearman"] - found["a"]["spearman"]


def test_what_is_beyond_the_bounds_is_named(chat, code):
    found = compare(facts(*chat), facts(*code))["differences"]
    assert beyond(found, Bounds()) == []
    assert [line.partition(":")[0] for line in beyond(found, Bounds(ks=0.03, bucket=0.01))] == [
        "KS of input_tokens",
        "KS of output_tokens",
        "worst bucket",
    ]
    assert len(beyond(found, Bounds(dispersion=1.5))) == 3


def test_what_is_not_known_is_beyond_every_bound(make_frame):
    short = facts(make_frame(), {})
    found = compare(short, short)["differences"]
    assert found["dispersion_ratio"]["60s"] is None
    assert beyond(found, Bounds(dispersion=2.0))[0].startswith("dispersion 1s, as a factor: not known")


def test_hit_rates_stand_side_by_side(chat, tmp_path):
    talks = synthesize("chat", 5.0, 2 * MINUTE_NS, 1, structure=Structure(turns=3, think_s=10.0))
    for name, (frame, metadata) in (("a", chat), ("b", talks)):
        write_trace(frame, tmp_path / name, metadata)
    found = compare_traces(tmp_path / "a", tmp_path / "b")
    assert found["a"]["hit_rate"] is None
    assert found["b"]["hit_rate"] == pytest.approx(talks[1]["prefix_hit_rate"])
    assert found["differences"]["hit_rate"] is None
