import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.errors import TraceError
from tracegen.rates import PROFILES, RatePath, linear_path, parse_profile, parse_rate, read_curve, steps_path
from tracegen.schema import write_trace

RATES = st.floats(0, 100)


@st.composite
def paths(draw):
    """Rates of a few pieces over [0, 10], each linear, with jumps between; some piece above zero."""
    inner = draw(st.lists(st.floats(0.1, 9.9), max_size=6, unique_by=lambda x: round(x, 2)))
    at_s = np.array([0.0, *sorted(inner), 10.0])
    start, end = (np.array(draw(st.lists(RATES, min_size=at_s.size - 1, max_size=at_s.size - 1))) for _ in "ab")
    start[0] += 0.1
    return RatePath(at_s, start, end)


@given(paths(), st.lists(st.floats(0, 0.999), min_size=1, max_size=30))
@settings(max_examples=100)
def test_times_undo_the_integral(path, shares):
    expected = np.sort(np.array(shares)) * path.expected[-1]
    times_s = path.times_s(expected)
    assert (np.diff(times_s) >= 0).all()
    assert ((times_s >= 0) & (times_s <= 10)).all()
    back = np.array([path.cut(0, t).expected[-1] if t > 0 else 0.0 for t in times_s])
    assert back == pytest.approx(expected, abs=1e-6 * path.expected[-1])


@given(paths(), st.floats(0.5, 9.5))
@settings(max_examples=50)
def test_parts_add_up_to_the_whole(path, at_s):
    parts = path.cut(0, at_s).expected[-1] + path.cut(at_s, 10).expected[-1]
    assert parts == pytest.approx(path.expected[-1])


@given(paths(), paths())
@settings(max_examples=50)
def test_a_product_is_right_at_all_knots(a, b):
    product = a.times(b)
    middle = (product.at_s[:-1] + product.at_s[1:]) / 2

    def rate(path, t):
        piece = np.searchsorted(path.at_s, middle, side="right") - 1
        share = (t - path.at_s[piece]) / np.diff(path.at_s)[piece]
        return path.start_rps[piece] * (1 - share) + path.end_rps[piece] * share

    for ours, t in ((product.start_rps, product.at_s[:-1]), (product.end_rps, product.at_s[1:])):
        assert ours == pytest.approx(rate(a, t) * rate(b, t), abs=1e-6)


def test_beyond_its_ends_a_rate_stays():
    path = linear_path(np.array([1.0, 3.0]), np.array([10.0, 20.0]))
    assert path.cut(0, 10).expected[-1] == pytest.approx(10)
    assert path.cut(20, 25).expected[-1] == pytest.approx(15)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 500.0),
        ("1..5", 300.0),
        ("5..0", 250.0),
        ("1,2,3,4", 250.0),
        ("1,2:10s", 10 + 180.0),  # the last step stays
        ("0,4:50s", 200.0),
    ],
)
def test_rates_as_typed(text, expected):
    assert parse_rate(text, 100.0).cut(0, 100).expected[-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x", "'x' is not a rate"),
        ("1..", "is not a rate"),
        ("1,,2", "is not a rate"),
        ("-1", "rate -1 is not a positive"),
        ("0", "rate 0 is not a positive"),
        ("0,0", "not a positive"),
        ("inf", "rate inf is not"),
        ("1,2:0s", "is not a duration"),
        ("none.csv", "none.csv: no such file"),
    ],
)
def test_wrong_rates_are_named(text, says):
    with pytest.raises(TraceError, match=says):
        parse_rate(text, 100.0)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_has_a_mean_of_one_over_its_period(name):
    period_s = 7 * 86400.0 if name.endswith("week") else 86400.0
    assert parse_profile(name, period_s).cut(0, period_s).mean_rps == pytest.approx(1, abs=1e-6)
    assert parse_profile(f"{name}@13h", period_s).cut(0, period_s).mean_rps == pytest.approx(1, abs=1e-6)


def test_profiles_have_the_published_swing():
    """Azure 2024: weekday peak over trough 1.92 (chat) and 10 (code); weekend over weekday 0.568 and 0.319."""
    for mix, swing, weekend in (("chat", 1.92, 0.568), ("code", 10.0, 0.319)):
        day = parse_profile(f"{mix}-day", 86400.0)
        hourly = [day.cut(h * 3600.0, (h + 1) * 3600.0).mean_rps for h in range(24)]
        assert max(hourly) / min(hourly) == pytest.approx(swing, rel=0.07)  # hours' means, straightened between
        week = parse_profile(f"{mix}-week", 7 * 86400.0)
        days = [week.cut(d * 86400.0, (d + 1) * 86400.0).mean_rps for d in range(7)]
        assert days[6] / days[2] == pytest.approx(weekend, rel=0.02)


def test_a_profile_starts_where_it_is_told():
    late = parse_profile("chat-day@14h", 3600.0).cut(0, 3600).mean_rps
    assert late == pytest.approx(parse_profile("chat-day", 86400.0).cut(14 * 3600, 15 * 3600).mean_rps)


def test_a_curve_from_a_file(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("time,rate\n0,1\n10,3\n")
    assert read_curve(path).expected[-1] == pytest.approx(20)
    assert parse_profile(str(path), 10.0).mean_rps == pytest.approx(1)
    pl.read_csv(path).write_parquet(tmp_path / "curve.parquet")
    assert parse_rate(str(tmp_path / "curve.parquet"), 10.0).expected[-1] == pytest.approx(20)


def test_a_curve_from_a_trace(tmp_path, make_frame):
    path = tmp_path / "t.parquet"
    make_frame([k * 10**9 for k in (0, 10, 20, 70, 125)]).write_parquet(path)
    assert read_curve(path).start_rps.tolist() == [3 / 60, 1 / 60]  # the minute that is not over is left out
    make_frame().write_parquet(path)
    with pytest.raises(TraceError, match="less than a minute"):
        read_curve(path)
    make_frame([65 * 10**9]).write_parquet(path)  # the only full minute has none
    with pytest.raises(TraceError, match="less than a minute"):
        read_curve(path)


def test_a_curve_of_a_damaged_trace_is_refused(tmp_path, make_frame):
    """A flipped bit is an error, and not another rate."""
    path = tmp_path / "t.parquet"
    write_trace(make_frame(range(0, 600 * 10**9, 10**8)), path, {})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"t\.parquet: not a readable Parquet file"):
        read_curve(path)


def test_a_curve_of_a_broken_trace_is_named_by_row(tmp_path, make_frame):
    path = tmp_path / "t.parquet"
    make_frame().with_columns(arrival_ns=pl.Series([5, -1, 7])).write_parquet(path)
    with pytest.raises(TraceError, match="row 1, column 'arrival_ns': -1 is negative"):
        read_curve(path)


def test_the_name_of_a_curves_file_is_no_pattern(tmp_path):
    (tmp_path / "a[1].csv").write_text("time,rate\n0,1\n1,2\n")
    assert read_curve(tmp_path / "a[1].csv").end_rps.tolist() == [2.0]
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(TraceError, match="not readable"):
        read_curve(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,rate\n0,1\n1,2\n", "column 'time' of numbers is missing"),
        ("time,rate\n0,x\n1,y\n", "column 'rate' of numbers is missing"),
        ("time,rate\n0,1\n1,-2\n", "row 1, column 'rate': -2 is not"),
        ("time,rate\n0,1\n1,\n", "row 1, column 'rate': None is not"),
        ("time,rate\n0,1\n0,2\n", "row 1, column 'time': is not later"),
        ("time,rate\n0,1\n", "two rows or more"),
        ("time,rate\n0,0\n1,0\n", "a rate above 0"),
    ],
)
def test_a_wrong_curve_is_named_by_row_and_column(tmp_path, text, says):
    path = tmp_path / "curve.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=says):
        read_curve(path)


def test_steps_may_rest():
    path = steps_path(np.array([0.0, 2.0, 0.0, 1.0]), np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert path.times_s(np.array([0.0, 1.0, 2.0, 2.5])).tolist() == [1.0, 1.5, 3.0, 3.5]
