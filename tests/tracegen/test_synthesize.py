import hashlib
import math
from importlib.resources import files

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest, spearmanr

from tracegen.arrivals import poisson_arrivals_ns
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.schema import read_trace, write_trace
from tracegen.sessions import Structure
from tracegen.streams import random_stream
from tracegen.synthesize import synthesize, synthesize_file
from tracegen.workload import Workload

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


def test_mixes_with_shares_are_labelled_by_them():
    frame, metadata = synthesize("chat:0.7,code:0.3", 5.0, 4000 * NS_PER_S, 1)
    assert (frame["label"] == "chat").mean() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / frame.height))
    assert set(metadata["lengths_fitted_to"]) == {"chat", "code"}
    assert frame.filter(pl.col("label") == "code")["output_tokens"].mean() == pytest.approx(27.9, rel=0.1)
    assert frame["arrival_ns"].equals(synthesize("chat", 5.0, 4000 * NS_PER_S, 1)[0]["arrival_ns"])


def test_production_is_the_mixes_own_arrivals_and_rate():
    frame, metadata = synthesize("chat", None, 600 * NS_PER_S, 1, arrivals="production")
    assert metadata["parameters"] == {
        "mix": "chat", "rate_rps": 5.53, "duration_ns": 600 * NS_PER_S, "arrivals": "production",
    }  # fmt: skip
    model = "log-ou:sigma=0.246,tau=127.2,cv=1.026"
    assert frame.equals(synthesize("chat", 5.53, 600 * NS_PER_S, 1, arrivals=model)[0])


def test_production_of_several_mixes_has_each_ones_arrivals():
    frame, _ = synthesize("longdoc:1,code:1", 5.0, 3000 * NS_PER_S, 1, arrivals="production")

    def dispersion(label):
        counts = frame.filter(pl.col("label") == label)["arrival_ns"].to_numpy() // (10 * NS_PER_S)
        counts = np.bincount(counts, minlength=300)
        return counts.var() / counts.mean()

    assert dispersion("longdoc") < 1.5
    assert dispersion("code") > 20


def test_a_mix_files_structure_is_taken_for_production(tmp_path):
    path = tmp_path / "my.toml"
    text = (
        (files("tracegen.mixes") / "code.toml").read_text().replace("[source]", "[structure]\nturns = 3.0\n\n[source]")
    )
    path.write_text(text)
    frame, metadata = synthesize(str(path), 2.0, 300 * NS_PER_S, 1, arrivals="production")
    assert metadata["structure_of_mix"] == {"turns": 3.0}
    assert metadata["mix_files_sha256"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert frame["session_id"].n_unique() < frame.height
    assert "session_id" not in synthesize(str(path), 2.0, 300 * NS_PER_S, 1)[0].columns
    for wrong, says in (("terns = 3.0", "structure has no 'terns'"), ("turns = 'x'", "structure: '<=' not supported")):
        path.write_text(text.replace("turns = 3.0", wrong))
        with pytest.raises(TraceError, match=says):
            synthesize(str(path), 2.0, 300 * NS_PER_S, 1, arrivals="production")


def test_a_file_larger_than_its_disk_is_not_begun(tmp_path):
    with pytest.raises(TraceError, match=r"1e\+18 requests are expected, about 1e\+10 GB, and .* GB are free"):
        synthesize_file(tmp_path / "t.parquet", Workload("chat", 1e12, 10**6 * NS_PER_S))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mix": "nope"}, "there is no mix 'nope'; the mixes are chat, code"),
        ({"rate_rps": 0.0}, "rate 0 is not a positive"),
        ({"rate_rps": -1.0}, "rate -1 is not a positive"),
        ({"rate_rps": math.nan}, "rate nan is not a positive"),
        ({"rate_rps": math.inf}, "rate inf is not a positive"),
        ({"rate_rps": 1e9}, "at most 100,000,000 are made in memory"),
        ({"duration_ns": 0}, "duration 0 ns is not positive"),
        ({"duration_ns": 1000}, "no request arrived"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"arrivals": "nope"}, "there is no arrival model 'nope'; the models are poisson"),
        ({"arrivals": "production", "mix": "sharegpt"}, "mix 'sharegpt' has no arrivals of its own"),
        ({"arrivals": "production", "mix": "chat:1,code:1", "rate_rps": None}, "say with --rate"),
        ({"profile": "nope"}, "there is no profile 'nope'; use chat-day"),
        ({"arrivals": "clients", "structure": Structure(clients=3)}, "has clients of its own"),
        ({"shard": (3, 2)}, "shard 3/2 is none"),
        ({"shard": (0, 2)}, "shard 0/2 is none"),
    ],
)
def test_wrong_arguments_are_named(change, says):
    arguments = {"mix": "chat", "rate_rps": 1.0, "duration_ns": MINUTE_NS, "seed": 1, **change}
    with pytest.raises(TraceError, match=says):
        synthesize(**arguments)
