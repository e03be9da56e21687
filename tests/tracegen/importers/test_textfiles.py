import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tracegen.importers import textfiles

NAMES = ["a", "b", "c"]
PIECES = [
    b"1",
    b"x y",
    b",",
    b",",
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b'"',
    b"#",
    b" ",
    b"\xff",
    b"\x00",
    "é".encode(),
    b";",
]
FIELD = st.sampled_from([b"1", b"2023-11-16 18:15:46", b" x", b'"q"', b"#", "é".encode(), b"null", b"-"])
ROWS = st.lists(st.lists(FIELD, min_size=3, max_size=3).map(b",".join), min_size=1, max_size=6).map(b"\n".join)


@given(st.one_of(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30).map(b"".join), ROWS))
def test_the_fast_way_reads_as_the_slow_way_or_not_at_all(block):
    fast = textfiles._clean_rows(block, NAMES, ",")
    if fast is not None:
        slow = textfiles._any_rows(block, NAMES, ",")
        assert fast.select(NAMES).equals(slow.select(NAMES))
        assert slow["_why"].null_count() == slow.height


@given(ROWS)
def test_the_fast_way_takes_what_is_clean(block):
    assert textfiles._clean_rows(block, NAMES, ",") is not None
    assert textfiles._clean_rows(block.replace(b"\n", b"\r\n") + b"\r\n", NAMES, ",") is not None


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30).map(b"".join))
def test_lines_are_those_between_line_feeds(block):
    text = block.decode("utf-8", "replace")
    expected = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    assert textfiles.lines_of(block).to_list() == expected
    assert textfiles.lines_of(block).dtype == pl.String
