import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegen.buckets import BUCKETS, INPUT_EDGES, OUTPUT_EDGES, bucket_expr


def bucket(input_tokens, output_tokens, **edges):
    frame = pl.DataFrame({"i": [input_tokens], "o": [output_tokens]}, schema={"i": pl.UInt32, "o": pl.UInt32})
    return frame.select(bucket_expr(pl.col("i"), pl.col("o"), **edges)).item()


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "expected"),
    [
        (1, 1, "SS"),
        (255, 99, "SS"),
        (256, 100, "MM"),
        (1023, 349, "MM"),
        (1024, 350, "LL"),
        (8192, 350, "LL"),
        (8193, 99, "XS"),
        (2**32 - 1, 2**32 - 1, "XL"),
    ],
)
def test_edges(input_tokens, output_tokens, expected):
    assert bucket(input_tokens, output_tokens) == expected


def test_thresholds_are_options():
    assert bucket(20, 20, input_edges=(10, 20, 30), output_edges=(21, 40)) == "LS"


@pytest.mark.parametrize(("input_tokens", "output_tokens"), [(None, 1), (1, None), (None, None)])
def test_no_length_no_bucket(input_tokens, output_tokens):
    assert bucket(input_tokens, output_tokens) is None


@given(st.integers(1, 20_000), st.integers(1, 2_000))
def test_the_rule_as_written(input_tokens, output_tokens):
    first = "SMLX"[sum((input_tokens >= INPUT_EDGES[0], input_tokens >= INPUT_EDGES[1], input_tokens > INPUT_EDGES[2]))]
    second = "SML"[sum(output_tokens >= edge for edge in OUTPUT_EDGES)]
    assert bucket(input_tokens, output_tokens) == first + second
    assert first + second in BUCKETS
