import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegen.durations import format_duration, parse_duration_ns
from tracegen.errors import TraceError


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("90", 90_000_000_000),
        ("90s", 90_000_000_000),
        (" 5m ", 300_000_000_000),
        ("1.5h", 5_400_000_000_000),
        ("2d", 172_800_000_000_000),
        ("250ms", 250_000_000),
        ("0.1ms", 100_000),
    ],
)
def test_durations_as_typed(text, ns):
    assert parse_duration_ns(text) == ns


@pytest.mark.parametrize("text", ["", "m", "-5m", "5 m", "5min", "1e3s", "0", "0s", "0.0000001ms", "9" * 400, "nan"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(TraceError, match="is not a duration"):
        parse_duration_ns(text)


def test_zero_where_it_makes_sense():
    assert parse_duration_ns("0", zero_ok=True) == 0
    with pytest.raises(TraceError, match="is not a duration"):
        parse_duration_ns("x", zero_ok=True)


@given(st.integers(1, 9000 * 86400 * 10**9))
def test_what_people_read_is_right_to_four_digits(ns):
    if ns >= 1000:
        assert parse_duration_ns(format_duration(ns)) == pytest.approx(ns, rel=6e-4, abs=60)
