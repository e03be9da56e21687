import math

import numpy as np
import polars as pl
import pytest
from scipy.stats import ks_1samp, norm, spearmanr

from tracegen.buckets import BUCKETS, bucket_expr
from tracegen.errors import TraceError
from tracegen.lengths import all_mixes, load_mix, mix_names, parse_mixes, sample_lengths

MIXES = all_mixes()
PURE = [mix for mix in MIXES if mix.name.isupper()]
FITTED = [mix for mix in MIXES if mix not in PURE]
each_mix = pytest.mark.parametrize("mix", FITTED, ids=lambda mix: mix.name)
each_pure_mix = pytest.mark.parametrize("mix", PURE, ids=lambda mix: mix.name)
with_buckets = pytest.mark.parametrize("mix", [m for m in FITTED if m.source_buckets], ids=lambda mix: mix.name)

# Quantiles (10, 50, 90 %) and means of the published files; for `reason` of the distributions that ServeGen publishes.
PUBLISHED = {
    "chat": {"n": 19366, "input": (207, 1020, 2734, 1154.7), "output": (54, 129, 424, 211.1)},
    "code": {"n": 8819, "input": (147, 1469, 5188, 2047.8), "output": (7, 13, 55, 27.9)},
    "longchat": {"n": 12031, "input": (964, 6909, 27367, 12035.1), "output": (24, 350, 597, 342.6)},
    "longdoc": {"n": 3993, "input": (30, 11587, 38611, 15325.5), "output": (4, 69, 389, 149.1)},
    "sharegpt": {"n": 30731, "input": (74, 1730, 5696, 2340.0), "output": (84, 415, 834, 438.7)},
    "summarize": {"n": 28257, "input": (1242, 2730, 3702, 2588.1), "output": (78, 167, 372, 291.4)},
    "reason": {"n": 60000, "input": (18, 208, 2092, 1268.2), "output": (287, 792, 3432, 1527.4)},
}


def mixture_cdf(mix, side, tokens):
    """P(length <= tokens) of the rounded and clipped mixture, from its definition."""
    i = ("in", "out").index(side)
    total = sum(
        c.weight * norm.cdf((np.log(tokens + 0.5) - getattr(c, f"mu_{side}")) / getattr(c, f"sigma_{side}"))
        for c in mix.components
    )
    return np.where(tokens < mix.low[i], 0.0, np.where(tokens >= mix.high[i], 1.0, total))


@each_mix
def test_a_mix_is_whole(mix):
    assert sum(c.weight for c in mix.components) == pytest.approx(1, abs=2e-5)  # five digits each
    assert all(c.sigma_in > 0 and c.sigma_out > 0 and abs(c.rho) < 1 for c in mix.components)
    assert mix.source.get("measured_rows", mix.source["rows"]) == PUBLISHED[mix.name]["n"]
    assert mix.source["licence"]
    assert mix.description


@with_buckets
def test_bucket_shares_of_a_source_are_whole(mix):
    assert set(mix.source_buckets) == set(BUCKETS)
    assert sum(mix.source_buckets.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["chat", "code"])
def test_chat_and_code_are_within_the_bars(name):
    """What benchmarks/mix_fit.py measured on the source, over 20 seeds at its number of rows."""
    mix = load_mix(name)
    for side in ("input", "output"):
        assert mix.goodness[f"ks_{side}_median"] < 0.02
        assert mix.goodness[f"ks_{side}_max"] < 0.03
    assert mix.goodness["mix_bucket_error"] < 0.01
    # Twenty samples of a few thousand rows miss by their own noise, as rows drawn from the source itself do.
    assert mix.goodness["worst_bucket_error_max"] < max(0.01, mix.goodness["resampled_bucket_error_max"])
    assert mix.goodness["spearman_error_max"] < 0.05


@each_pure_mix
def test_a_pure_mix_has_one_length_each_way(mix):
    (side_in, side_out) = sample_lengths(mix, 1000, seed=9)
    sizes = ({"S": 467, "M": 1010, "L": 4085}[mix.name[0]], {"S": 96, "M": 256, "L": 600}[mix.name[1]])
    assert (set(side_in.tolist()), set(side_out.tolist())) == ({sizes[0]}, {sizes[1]})
    assert mix.low == mix.high == sizes


def test_the_nine_sizes_are_there():
    assert {mix.name for mix in PURE} == {a + b for a in "SML" for b in "SML"}


@each_mix
@pytest.mark.parametrize("side", ["in", "out"])
def test_samples_follow_the_mixture(mix, side):
    n = 50_000
    tokens = sample_lengths(mix, n, seed=3)[("in", "out").index(side)].astype(float)
    # On a distribution with steps the bound of 0.1 % significance, 1.95/sqrt(n), holds all the more.
    # The steps themselves must not count, so both distributions are compared at the steps, from above.
    values = np.unique(tokens)
    ours = np.searchsorted(np.sort(tokens), values, side="right") / n
    assert np.abs(ours - mixture_cdf(mix, side, values)).max() < 1.95 / math.sqrt(n)


def test_the_bound_tells_another_mixture_apart():
    chat, code = load_mix("chat"), load_mix("code")
    tokens = sample_lengths(chat, 2000, seed=3)[0].astype(float)
    assert ks_1samp(tokens, lambda t: mixture_cdf(code, "in", t)).statistic > 0.1


@each_mix
def test_quantiles_and_means_are_near_the_published_ones(mix):
    published = PUBLISHED[mix.name]
    for side, tokens in zip(("input", "output"), sample_lengths(mix, published["n"], seed=5), strict=True):
        *quantiles, mean = published[side]
        assert tokens.mean() == pytest.approx(mean, rel=0.05)
        for q, value in zip((0.1, 0.5, 0.9), quantiles, strict=True):
            # Within 3.2 % of all rows of its place: the worst Kolmogorov-Smirnov distance of any seed of any mix.
            below, up_to = np.mean(tokens < value), np.mean(tokens <= value)
            assert below - 0.032 <= q <= up_to + 0.032


@with_buckets
def test_bucket_shares_are_near_the_sources(mix):
    tokens = sample_lengths(mix, 200_000, seed=1)
    frame = pl.DataFrame(dict(zip(("i", "o"), tokens, strict=True)))
    bucket = frame.select(bucket_expr(pl.col("i"), pl.col("o"))).to_series()
    for name, share in mix.source_buckets.items():
        bar = 0.015 if mix.name == "longdoc" else 0.01
        assert (bucket == name).mean() == pytest.approx(share, abs=bar), name


@each_mix
def test_lengths_stay_in_range(mix):
    for side, tokens in enumerate(sample_lengths(mix, 50_000, seed=2)):
        assert tokens.dtype == np.uint32
        assert tokens.min() >= mix.low[side]
        assert tokens.max() <= mix.high[side]


@each_mix
def test_input_and_output_depend_only_as_fitted(mix):
    """One uniform draw behind both would give a rank correlation near 1."""
    correlation = spearmanr(*sample_lengths(mix, 20_000, seed=4)).statistic
    assert correlation == pytest.approx(mix.goodness.get("spearman", 0.0), abs=4 / math.sqrt(20_000))


def test_rho_couples_the_two_lengths_of_a_component():
    mix = load_mix("chat")
    strongest = max(mix.components, key=lambda c: abs(c.rho))
    alone = type(mix)(**{**vars(mix), "components": (strongest,), "low": (1, 1), "high": (10**6, 10**6)})
    log_in, log_out = (np.log(tokens) for tokens in sample_lengths(alone, 20_000, seed=4))
    assert np.corrcoef(log_in, log_out)[0, 1] == pytest.approx(strongest.rho, abs=0.02)


def test_rows_are_independent_of_each_other():
    inputs, _ = sample_lengths(load_mix("chat"), 20_000, seed=6)
    assert abs(spearmanr(inputs[1:], inputs[:-1]).statistic) < 4 / math.sqrt(20_000)


def test_same_seed_same_lengths_other_seed_others():
    mix = load_mix("chat")
    first, again, other = (sample_lengths(mix, 100, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_windows_and_suffixes_are_independent():
    mix = load_mix("chat")
    samples = [sample_lengths(mix, 5000, 1, *more)[0] for more in ((), (1,), (0, " chat"))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(spearmanr(samples[i], samples[j]).statistic) < 4 / math.sqrt(5000)


def test_an_unknown_mix_lists_the_mixes():
    assert mix_names()[:7] == ["chat", "code", "longchat", "longdoc", "reason", "sharegpt", "summarize"]
    for name in ("chatt", "", "../mixes/chat"):
        with pytest.raises(TraceError, match="the mixes are chat, code"):
            load_mix(name)


MINIMAL = """
description = "mine"
low = [1, 1]
high = [100, 10]
components = [{ weight = 1, mu_in = 3, sigma_in = 0.5, mu_out = 1, sigma_out = 0.5, rho = 0 }]
"""


def test_a_mix_file_of_ones_own(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(MINIMAL)
    mix = load_mix(str(path))
    assert (mix.name, mix.high, mix.arrivals) == ("my", (100, 10), {})
    assert [(m.name, share) for m, share in parse_mixes(f"{path}:3,chat:1")] == [("my", 0.75), ("chat", 0.25)]
    for name in ("a,b", "a:b"):
        path.with_name(f"{name}.toml").write_text(MINIMAL)
        assert [m.name for m, _ in parse_mixes(str(tmp_path / f"{name}.toml"))] == [name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("low = [1, 1]", ""), "key 'low' is missing"),
        (("low = [1, 1]", "low = [0, 1]"), "out of range"),
        (("rho = 0", "rho = 2"), "out of range"),
        (("mu_in = 3", "mu_in = nan"), "out of range"),
        (("mu_in = 3", "mu_in = inf"), "out of range"),
        (("weight = 1", "weight = 0"), "out of range"),
        (("weight = 1", "wait = 1"), "not a mix file"),
        (("low = [1, 1]", "low = ["), "not a mix file"),
    ],
)
def test_a_wrong_mix_file_is_named(tmp_path, change, says):
    path = tmp_path / "my.toml"
    path.write_text(MINIMAL.replace(*change))
    with pytest.raises(TraceError, match=says) as error:
        load_mix(str(path))
    assert "my.toml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("none.toml", "none.toml: no such mix file"),
        ("chat:0", "'0' is not a positive share"),
        ("chat:x,code", "'x' is not a positive share"),
        ("chat:1,chat:2", "comes twice"),
        ("chat:1,nope:2", "there is no mix 'nope'"),
    ],
)
def test_wrong_shares_are_named(text, says):
    with pytest.raises(TraceError, match=says):
        parse_mixes(text)
