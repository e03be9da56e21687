"""The argument of a private fit, checked on neighbouring traces: one has a request that the other has not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.durations import NS_PER_S
from tracegen.fit import private
from tracegen.fit.private import release

EPSILON = 2.0
REQUESTS, SPAN_S = 1200, 700


@pytest.fixture(scope="module")
def requests():
    """Bursty arrivals whose first is alone in no minute, nor the last."""
    stream = np.random.default_rng(1)
    arrival_ns = np.sort((stream.beta(0.7, 0.7, REQUESTS) * SPAN_S * NS_PER_S).astype(np.int64))
    return *stream.integers(1, 3000, (2, REQUESTS)), arrival_ns


def asked_for(monkeypatch, requests, answers=None):
    """The counts that `release` asks noise for, with their sensitivity and epsilon, when it is given `answers`.

    With the same answers it must ask for the same counts of both neighbours, as far as these differ in themselves:
    what is asked for then depends on the trace through earlier answers only (adaptive composition).
    """
    asked = []

    def noisy(counts, sensitivity, epsilon, _stream):
        asked.append((np.asarray(counts), sensitivity, epsilon))
        return np.asarray(counts, float) if answers is None else answers[len(asked) - 1]

    with monkeypatch.context() as patched:
        patched.setattr(private, "_noisy", noisy)
        release(*requests, EPSILON)
    return asked


@given(left_out=st.one_of(st.sampled_from([0, REQUESTS - 1]), st.integers(0, REQUESTS - 1)))
@settings(max_examples=40, deadline=None)
def test_a_request_moves_what_is_released_by_no_more_than_epsilon_allows(requests, left_out):
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole = asked_for(monkeypatch, requests)
        answers = [np.asarray(counts, float) for counts, *_ in whole]
        fewer = asked_for(monkeypatch, [np.delete(column, left_out) for column in requests], answers)
    assert len(whole) == len(fewer)
    spent = 0.0
    for (counts, sensitivity, epsilon), (others, same, _) in zip(whole, fewer, strict=True):
        assert same == sensitivity
        moved = np.abs(counts - others).sum()
        assert moved <= sensitivity
        spent += epsilon * moved / sensitivity
    assert 0 < spent <= EPSILON + 1e-9
    assert sum(epsilon for *_, epsilon in whole) == pytest.approx(EPSILON)
