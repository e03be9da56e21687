import math

import numpy as np
import pytest
from scipy.stats import gamma, kstest, weibull_min

from tracegen.arrivals import ARRIVALS, parse_arrivals
from tracegen.arrivals.modulation import LogOu, Switching
from tracegen.arrivals.points import gamma_points, poisson_points, weibull_points, weibull_shape
from tracegen.errors import TraceError
from tracegen.rates import linear_path, steps_path
from tracegen.streams import random_stream
from tracegen.synthesize import synthesize

S = 10**9


def constant_path(rps, length_s):
    return steps_path(np.array([float(rps)]), np.array([0.0, float(length_s)]))


def dispersion(arrival_ns, window_s, length_s):
    counts = np.bincount((arrival_ns // int(window_s * S)).astype(int), minlength=int(length_s / window_s))
    return counts.var(ddof=1) / counts.mean()


@pytest.mark.parametrize(
    ("points", "cdf"),
    [
        (gamma_points, lambda cv: gamma(1 / cv**2, scale=cv**2).cdf),
        (
            weibull_points,
            lambda cv: weibull_min(weibull_shape(cv), scale=1 / math.gamma(1 + 1 / weibull_shape(cv))).cdf,
        ),
    ],
)
@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0])  # beyond, gaps are below the digits of a double
def test_gaps_follow_their_distribution(points, cdf, cv):
    found = points(20_000.0, random_stream(3, "test"), cv)
    assert kstest(np.diff(found), cdf(cv)).pvalue > 0.001


@pytest.mark.parametrize("points", [gamma_points, weibull_points])
@pytest.mark.parametrize("cv", [0.3, 2.0, 5.0])
def test_a_renewal_process_has_its_rate_from_the_start(points, cv):
    """Without the equilibrium start, a process of CV 5 would have 13 times the rate in its first unit."""
    counts = np.array([points(2.0, random_stream(seed, "test"), cv).size for seed in range(3000)])
    assert counts.mean() == pytest.approx(2.0, abs=5 * counts.std() / math.sqrt(3000))


def test_counts_are_not_rescaled_to_fill_the_window():
    """A stretch of L expects L points with a variance of L·CV² in the long run; a count that is fixed has none."""
    for draw, cv in ((poisson_points, 1.0), (lambda length, s: gamma_points(length, s, 2.0), 2.0)):
        counts = np.array([draw(400.0, random_stream(seed, "test")).size for seed in range(400)])
        assert counts.var() / counts.mean() == pytest.approx(cv**2, rel=0.35)


def test_constant_arrivals_go_on_over_windows():
    model = parse_arrivals("constant")
    first = model.arrivals_ns(constant_path(2.5, 3.0), 0.0, 1, 0)[0]
    second = model.arrivals_ns(constant_path(2.5, 3.0), 7.5, 1, 1)[0] + 3 * S
    assert np.concatenate((first, second)).tolist() == [k * 400_000_000 for k in range(15)]


@pytest.mark.parametrize("kind", ARRIVALS)
def test_each_model_keeps_the_rate_it_is_asked_for(kind):
    length_s, rate = 20_000.0, 2.0
    counts = []
    for seed in range(12):
        model = parse_arrivals(kind)
        path = constant_path(rate, length_s)
        for i, modulation in enumerate(model.modulations):
            path = path.times(modulation.path(length_s, random_stream(seed, f"m{i}"), None)[0])
        found = model.arrivals_ns(path, 0.0, seed, 0)[0]
        assert (np.diff(found) >= 0).all()
        assert found[0] >= 0
        assert found[-1] < length_s * S
        counts.append(found.size)
    counts = np.array(counts)
    assert counts.mean() == pytest.approx(rate * length_s, abs=4 * max(counts.std(), 1) / math.sqrt(12) + 1)


def test_a_ramp_is_followed_exactly():
    found = parse_arrivals("poisson").arrivals_ns(
        linear_path(np.array([0.0, 10.0]), np.array([0.0, 4000.0])), 0.0, 1, 0
    )[0]
    assert kstest(found / S, lambda t: (t / 4000) ** 2).pvalue > 0.001


def test_a_wandering_rate_has_its_moments():
    sigma, tau_s = 0.8, 10.0
    path, state = LogOu(sigma, tau_s).path(40_000.0, random_stream(1, "test"), None)
    x = np.log(path.start_rps) + sigma**2 / 2
    assert x.std() == pytest.approx(sigma, rel=0.05)
    assert np.exp(x - sigma**2 / 2).mean() == pytest.approx(1, abs=0.1)
    lag = 100  # knots: one correlation time
    assert np.corrcoef(x[:-lag], x[lag:])[0, 1] == pytest.approx(math.exp(-1), abs=0.06)
    again, _ = LogOu(sigma, tau_s).path(1.0, random_stream(2, "test"), state)
    assert again.start_rps[0] == pytest.approx(path.end_rps[-1])  # windows join


def test_a_switching_rate_stays_as_long_as_asked_and_has_mean_one():
    switching = Switching((0.0, 4.0, 1.0), (30.0, 10.0, 20.0), (1.0, 2.0, 0.5))
    path, (level, left_s) = switching.path(200_000.0, random_stream(1, "test"), None)
    assert path.mean_rps == pytest.approx(1, abs=0.05)
    assert np.isin(path.start_rps, np.array([0.0, 4.0, 1.0])).all()
    resting = np.diff(path.at_s)[path.start_rps == 0]
    assert resting.mean() == pytest.approx(30, rel=0.07)
    following, _ = switching.path(left_s / 2, random_stream(2, "test"), (level, left_s))
    assert following.start_rps.tolist() == [path.end_rps[-1]]


def test_batches_come_together():
    model = parse_arrivals("on-off:batch=3,spacing=1ms")
    found = model.arrivals_ns(constant_path(0.3, 20_000.0), 0.0, 1, 0)[0]
    gaps_ns = np.diff(found)
    # A geometric batch of mean 3 has 2 gaps in it for each one between batches.
    assert (gaps_ns == 10**6).mean() == pytest.approx(2 / 3, abs=0.03)


def test_clients_have_their_shares_and_their_own_burstiness():
    frame, _ = synthesize("chat", 20.0, 4000 * S, 1, arrivals="clients:n=30,zipf=1")
    counts = np.bincount(frame["client_id"].to_numpy().astype(int), minlength=30)
    shares = (1 / np.arange(1, 31)) / (1 / np.arange(1, 31)).sum()
    assert counts[:5] / counts.sum() == pytest.approx(shares[:5], abs=0.05)
    assert (counts > 0).all()


# Bands (5 % and 95 %) of the index of dispersion in simulations of the published hours with these models; the hours
# themselves have 1.39, 3.87, 16.4 and 13.2, 71.9, 166.9 at 1, 10 and 60 s.
BANDS = {
    "chat": (3501.7, {1: (1.20, 1.47), 10: (2.93, 5.62), 60: (10.5, 26.6)}),
    "code": (3435.9, {1: (11.9, 17.1), 10: (58.7, 87.8), 60: (127.0, 226.8)}),
}


@pytest.mark.parametrize("mix", BANDS)
def test_production_arrivals_are_as_bursty_as_their_source(mix):
    """In the median of a few seeds; benchmarks/synth.py holds twenty against the bands."""
    length_s, bands = BANDS[mix]
    found = [synthesize(mix, None, int(length_s * S), seed, arrivals="production")[0] for seed in range(7)]
    for window_s, (low, high) in bands.items():
        ours = np.median([dispersion(frame["arrival_ns"].to_numpy(), window_s, length_s) for frame in found])
        assert low < ours < high


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nope", "there is no arrival model 'nope'; the models are poisson, constant"),
        ("poisson:cv=1", "'poisson' has no parameter 'cv'; it has none"),
        ("gamma:shape=1", "'gamma' has no parameter 'shape'; it has cv"),
        ("gamma:cv=x", "cv is 'x', not a number from 0.05"),
        ("gamma:cv=0", "cv is '0', not a number"),
        ("gamma:cv=1/2", "cv is one number"),
        ("gamma:cv", "cv is '', not a number"),
        ("log-ou:tau=5x", "tau is '5x'"),
        ("mmpp:levels=1/2/3", "as many holds as levels"),
        ("mmpp:levels=0/0", "above 0"),
        ("on-off:floor=2", "floor is '2', not a number from 0 to 1"),
    ],
)
def test_wrong_models_are_named(text, says):
    with pytest.raises(TraceError, match=says):
        parse_arrivals(text)


@pytest.mark.parametrize(
    "text", ["poisson", "gamma:cv=3", "log-ou:sigma=0.5,tau=90", "mmpp:levels=1/2/5,holds=10/20/30"]
)
def test_a_model_says_what_it_is_as_it_is_typed(text):
    assert str(parse_arrivals(text)) == text
    assert parse_arrivals("log-ou:tau=2m") == parse_arrivals("log-ou:tau=120")
