import math

import numpy as np
import polars as pl
import pytest
from scipy.stats import ks_1samp, norm, spearmanr

from tracegen.buckets import BUCKETS, bucket_expr
from tracegen.errors import TraceError
from tracegen.lengths import all_mixes, load_mix, mix_names, sample_lengths

MIXES = all_mixes()
each_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)

# Quantiles and means of the published files (AzureLLMInferenceDataset2023, Azure/AzurePublicDataset).
PUBLISHED = {
    "chat": {"n": 19366, "input": (207, 1020, 2734, 1154.7), "output": (54, 129, 424, 211.1)},
    "code": {"n": 8819, "input": (147, 1469, 5188, 2047.8), "output": (7, 13, 55, 27.9)},
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
    assert sum(c.weight for c in mix.components) == pytest.approx(1, abs=1e-9)
    assert all(c.sigma_in > 0 and c.sigma_out > 0 and abs(c.rho) < 1 for c in mix.components)
    assert set(mix.source_buckets) == set(BUCKETS)
    assert sum(mix.source_buckets.values()) == pytest.approx(1, abs=1e-5)
    assert mix.source["licence"] == "CC-BY-4.0"
    assert mix.source["rows"] == PUBLISHED[mix.name]["n"]
    assert mix.description


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
            # Within 2.5 % of all rows of its place: what the fit's Kolmogorov-Smirnov distance promises.
            below, up_to = np.mean(tokens < value), np.mean(tokens <= value)
            assert below - 0.025 <= q <= up_to + 0.025


@each_mix
def test_bucket_shares_are_within_a_point_of_the_source(mix):
    tokens = sample_lengths(mix, mix.source["rows"], seed=1)
    frame = pl.DataFrame(dict(zip(("i", "o"), tokens, strict=True)))
    bucket = frame.select(bucket_expr(pl.col("i"), pl.col("o"))).to_series()
    for name, share in mix.source_buckets.items():
        assert (bucket == name).mean() == pytest.approx(share, abs=0.01), name


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
    assert correlation == pytest.approx(mix.goodness["spearman"], abs=4 / math.sqrt(20_000))


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


def test_an_unknown_mix_lists_the_mixes():
    assert mix_names() == ["chat", "code"]
    for name in ("chatt", "", "../mixes/chat"):
        with pytest.raises(TraceError, match="the mixes are chat, code"):
            load_mix(name)
