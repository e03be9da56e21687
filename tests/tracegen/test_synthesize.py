import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest, spearmanr

from tracegen.arrivals import poisson_arrivals_ns
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.schema import read_trace, write_trace
from tracegen.streams import random_stream
from tracegen.synthesize import synthesize

MINUTE_NS = 60 * NS_PER_S


def test_counts_vary_from_seed_to_seed_as_poisson_counts_do():
    """A fixed count, or gaps rescaled to fill the window, would give a variance far below the mean."""
    runs, mean = 400, 30.0
    counts = np.array([poisson_arrivals_ns(0.5, MINUTE_NS, random_stream(s, "arrivals")).size for s in range(runs)])
    assert counts.mean() == pytest.approx(mean, abs=4 * math.sqrt(mean / runs))
    dispersion = counts.var(ddof=1) / counts.mean()
    low, high = chi2.ppf([0.0005, 0.9995], runs - 1) / (runs - 1)
    assert low < dispersion < high


def test_gaps_are_exponential():
    arrival_ns = poisson_arrivals_ns(5.0, 2000 * NS_PER_S, random_stream(1, "arrivals"))
    gaps_s = np.diff(arrival_ns) / NS_PER_S
    assert kstest(gaps_s, "expon", args=(0, 1 / 5.0)).pvalue > 0.001


def test_streams_of_one_seed_are_independent():
    a, b = (random_stream(1, purpose).random(20_000) for purpose in ("arrivals", "input_tokens"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(20_000)
    assert not np.array_equal(a, b)


def test_lengths_do_not_depend_on_arrivals():
    frame, _ = synthesize("chat", 5.0, 4000 * NS_PER_S, 1)
    gaps_ns = frame["arrival_ns"].diff().to_numpy()[1:]
    for column in ("input_tokens", "output_tokens"):
        correlation = spearmanr(gaps_ns, frame[column].to_numpy()[1:]).statistic
        assert abs(correlation) < 4 / math.sqrt(gaps_ns.size)


def test_mixes_of_one_seed_share_their_arrivals():
    chat, code = (synthesize(mix, 2.0, MINUTE_NS, 7)[0] for mix in ("chat", "code"))
    assert chat["arrival_ns"].equals(code["arrival_ns"])
    assert not chat["input_tokens"].equals(code["input_tokens"])


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        frame, metadata = synthesize("chat", 0.5, 5 * MINUTE_NS, seed)
        write_trace(frame, tmp_path / name, metadata)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert not read_trace(tmp_path / "a").equals(read_trace(tmp_path / "c"))
    assert a != c


@given(
    st.sampled_from(["chat", "code"]),
    st.floats(1, 50),
    st.integers(MINUTE_NS, 20 * MINUTE_NS),
    st.integers(0, 2**64),
)
@settings(max_examples=40, deadline=None)
def test_every_trace_keeps_the_rules(mix, rate_rps, duration_ns, seed):
    frame, metadata = synthesize(mix, rate_rps, duration_ns, seed)
    arrival_ns = frame["arrival_ns"].to_numpy()
    assert arrival_ns[0] >= 0
    assert arrival_ns[-1] < duration_ns
    assert (np.diff(arrival_ns) >= 0).all()
    assert frame["request_id"].to_list() == list(range(frame.height))
    assert frame["label"].unique().to_list() == [mix]
    expected = rate_rps * duration_ns / NS_PER_S
    assert abs(frame.height - expected) < 6 * math.sqrt(expected) + 12
    assert metadata["seed"] == seed
    assert metadata["parameters"] == {
        "mix": mix,
        "rate_rps": rate_rps,
        "duration_ns": duration_ns,
        "arrivals": "poisson",
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mix": "nope"}, "there is no mix 'nope'; the mixes are chat, code"),
        ({"rate_rps": 0.0}, "rate 0 is not a positive"),
        ({"rate_rps": -1.0}, "rate -1 is not a positive"),
        ({"rate_rps": math.nan}, "rate nan is not a positive"),
        ({"rate_rps": math.inf}, "rate inf is not a positive"),
        ({"rate_rps": 1e9}, "at most 20,000,000"),
        ({"duration_ns": 0}, "duration 0 ns is not positive"),
        ({"duration_ns": 1000}, "no request arrived"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"arrivals": "nope"}, "there is no arrival model 'nope'; the models are poisson"),
    ],
)
def test_wrong_arguments_are_named(change, says):
    arguments = {"mix": "chat", "rate_rps": 1.0, "duration_ns": MINUTE_NS, "seed": 1, **change}
    with pytest.raises(TraceError, match=says):
        synthesize(**arguments)
