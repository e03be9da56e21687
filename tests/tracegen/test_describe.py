import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tracegen.describe import WHY_NONE, describe
from tracegen.durations import NS_PER_S
from tracegen.render import bars, headline, print_description, sparkline
from tracegen.schema import TRACE
from tracegen.synthesize import synthesize


@st.composite
def frames(draw):
    n = draw(st.integers(1, 60))
    arrival_ns = sorted(draw(st.lists(st.integers(0, 900 * NS_PER_S), min_size=n, max_size=n)))
    lengths = st.lists(st.integers(1, 20_000), min_size=n, max_size=n)
    data = {
        "request_id": range(n),
        "arrival_ns": arrival_ns,
        "input_tokens": draw(lengths),
        "output_tokens": draw(lengths),
    }
    return pl.DataFrame(data, schema=TRACE)


@given(frames())
@settings(max_examples=80, deadline=None)
def test_figures_agree_with_numpy_and_scipy(frame):
    document = describe(frame, {"seed": 1})
    json.dumps(document, allow_nan=False)
    arrival_s = frame["arrival_ns"].to_numpy() / NS_PER_S
    gaps_s = np.diff(arrival_s)
    assert document["requests"] == frame.height
    assert document["span_s"] == pytest.approx(arrival_s[-1] - arrival_s[0])
    if gaps_s.sum() > 0:
        assert document["rate_rps"] == pytest.approx(1 / gaps_s.mean())
        assert document["interarrival_s"]["mean"] == pytest.approx(gaps_s.mean())
    if gaps_s.size > 1 and gaps_s.sum() > 0:
        assert document["interarrival_s"]["cv"] == pytest.approx(gaps_s.std(ddof=1) / gaps_s.mean())
    for side in ("input_tokens", "output_tokens"):
        tokens = frame[side].to_numpy()
        assert document[side]["mean"] == pytest.approx(tokens.mean())
        assert document[side]["max"] == tokens.max()
        for q in (10, 50, 90, 99):
            assert document[side][f"p{q}"] == pytest.approx(np.percentile(tokens, q))
        assert sum(b["requests"] for b in document["histograms"][side]) == frame.height
        for b in document["histograms"][side]:
            assert b["requests"] == ((tokens >= b["from"]) & (tokens <= b["to"])).sum()
    if document["spearman"] is not None:
        assert document["spearman"] == pytest.approx(spearmanr(frame["input_tokens"], frame["output_tokens"]).statistic)
    for window_s in (1, 10, 60):
        windows = int((frame["arrival_ns"][-1] - frame["arrival_ns"][0]) // (window_s * NS_PER_S))
        value = document["index_of_dispersion"][f"{window_s}s"]
        assert (value is None) == (windows < 10)
        if value is not None:
            since_ns = frame["arrival_ns"].to_numpy() - frame["arrival_ns"][0]
            counts = np.bincount(since_ns // (window_s * NS_PER_S), minlength=windows)[:windows]
            assert value == pytest.approx(counts.var(ddof=1) / counts.mean())
    assert sum(b["requests"] for b in document["buckets"].values()) == frame.height
    assert sum(b["share"] for b in document["buckets"].values()) == pytest.approx(1)
    if document["span_s"]:
        assert sum(b["requests"] for b in document["histograms"]["arrivals"]) == frame.height
        assert len(document["histograms"]["arrivals"]) <= 60


@given(frames())
@settings(max_examples=40, deadline=None)
def test_what_is_missing_has_a_reason_and_only_that(frame):
    document = describe(frame, {})

    def missing(part, prefix=""):
        for name, value in part.items():
            if isinstance(value, dict):
                yield from missing(value, f"{prefix}{name}.")
            elif value is None:
                yield prefix + name

    assert set(missing({k: v for k, v in document.items() if k not in {"metadata", "reasons"}})) == set(
        document["reasons"]
    )


def test_a_single_request_says_what_it_cannot_have(make_frame, capsys):
    document = describe(make_frame([5]), {})
    assert set(document["reasons"]) == set(WHY_NONE)
    assert document["input_tokens"]["p50"] == 100
    print_description(document)
    out = capsys.readouterr().out
    assert "a single request has no gap" in out
    assert "1 request over 0ms (-/s)" in out


def test_parameters_within_parameters_are_shown_whole(make_frame, capsys):
    print_description(describe(make_frame([5]), {"generator": "g", "parameters": {"structure": {"turns": 4.0}}}))
    assert "made by g, structure: {turns: 4.0}\n" in capsys.readouterr().out


@pytest.mark.parametrize("gap_ns", [1, 7, 10**9 // 3])
def test_equal_gaps_have_no_variation(make_frame, gap_ns):
    assert describe(make_frame([k * gap_ns for k in range(1000)]), {})["interarrival_s"]["cv"] == 0


def test_a_sparse_trace_of_years_needs_no_memory(make_frame):
    """10^9 windows of a second, three of them with a request each."""
    document = describe(make_frame([0, 5 * 10**17, 10**18]), {})
    assert document["index_of_dispersion"]["1s"] == pytest.approx(1, rel=1e-6)


def test_a_poisson_trace_looks_like_one():
    document = describe(*synthesize("chat", 10.0, 3600 * NS_PER_S, 1))
    assert document["rate_rps"] == pytest.approx(10, rel=0.03)
    assert document["interarrival_s"]["cv"] == pytest.approx(1, abs=0.03)
    assert document["index_of_dispersion"]["1s"] == pytest.approx(1, abs=0.1)
    assert document["index_of_dispersion"]["10s"] == pytest.approx(1, abs=0.3)


def test_bars_are_in_proportion():
    lines = bars([{"from": 1, "to": 1, "requests": n} for n in (1000, 500, 1, 0)])
    assert [line.count("█") for line in lines] == [40, 20, 0, 0]
    assert "▏" in lines[2]
    assert lines[3].split() == ["1", "-", "1", "0"]


def test_sparkline_is_in_proportion():
    assert sparkline([0.0, 0.001, 4.0, 8.0]) == " ▁▄█"


def test_the_description_shows_every_part(capsys):
    frame, metadata = synthesize("chat", 2.0, 1800 * NS_PER_S, 1)
    document = describe(frame, metadata)
    print_description(document)
    out = capsys.readouterr().out
    assert out.startswith(headline(document))
    for part in ("made by tracegen synth, seed 1", "dispersion 60s", "Spearman", "input tokens", "requests/s", "█"):
        assert part in out
    for bucket in ("SS", "LL"):
        assert f"{document['buckets'][bucket]['share']:.1%}" in out
